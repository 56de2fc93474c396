"""Image features and the distances between sets of them: torch-fidelity's extractors and its own metric functions.

An extractor is one of torch-fidelity's registered names, or a Python file that registers one. Features stay one row an
image, so a result does not depend on how the images were spread over batches and ranks.
"""

import difflib
import functools
import http.client
import importlib.util
import inspect
import pickle
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from common.errors import UsageError, UserError
from eval.ranks import build_in_turn

INCEPTION = "inception-v3-compat"
_KID_SUBSET = 1000  # images a subset, torch-fidelity's default
_ISC_SPLITS = 10
_NEIGHBOURS = 3
_DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


class Unavailable(UserError):
    """The extractor's weights could not be downloaded; the message says how to get them."""


class Extractor:
    """A frozen feature extractor on a device. Attributes: `name`, and `layers` {metric: layer} for "fid", "kid", "prc",
    and "isc" where the extractor has class outputs."""

    def __init__(self, name: str, layers: dict[str, str], module: FeatureExtractorBase):
        self.name, self.layers, self.module = name, layers, module

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images [B, 3, H, W] -> {layer: features [B, D] float32 on the CPU}."""
        features = self.module.convert_features_tuple_to_dict(self.module(images))
        return {layer: rows.float().cpu() for layer, rows in features.items()}


def resolve(features: str) -> str:
    """The registered name that `--features` means: a name of torch-fidelity, or a Python file that registers one.

    Raises `UsageError` for anything else.
    """
    if features.endswith(".py"):
        return _register_file(Path(features).resolve())
    if features not in FEATURE_EXTRACTORS_REGISTRY:
        near = difflib.get_close_matches(features, FEATURE_EXTRACTORS_REGISTRY, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"--features {features}: neither a Python file (.py) nor one of "
            f"{', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}{hint}"
        )
    return features


@functools.cache
def _register_file(path: Path) -> str:
    """Run the file once a process; exactly one new name must be in the registry afterwards."""
    before = set(FEATURE_EXTRACTORS_REGISTRY)
    spec = importlib.util.spec_from_file_location(f"features_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import would, so that the file may define dataclasses
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError, ValueError) as error:
        raise UsageError(f"--features {path}: the file does not load: {type(error).__name__}: {error}") from error
    new = sorted(set(FEATURE_EXTRACTORS_REGISTRY) - before)
    if len(new) != 1:
        raise UsageError(
            f"--features {path}: the file must register exactly one new extractor "
            f"(torch_fidelity.register_feature_extractor), it registered {', '.join(new) or 'none'}"
        )
    return new[0]


def load_extractor(
    features: str,
    weights: Path | None,
    accelerator: Accelerator,
    metrics: tuple[str, ...] = ("fid", "isc", "prc", "kid"),
) -> Extractor:
    """Build the extractor on every rank, with torch-fidelity's default layers for `metrics`. A collective call.

    Raises `Unavailable` where its weights cannot be downloaded, `UsageError` or `UserError` for a wrong name, file or
    weights; always on all ranks.
    """
    name = resolve(features)
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    if weights is not None and "feature_extractor_weights_path" not in inspect.signature(cls.__init__).parameters:
        raise UsageError(f"--features_weights: the extractor {name} takes no weights by path; leave the option out")
    if weights is not None and not weights.is_file():
        raise UserError(f"--features_weights: there is no file {weights}")
    layers = {metric: layer for metric, layer in _default_layers(cls).items() if metric in metrics}
    # Inception's forward wants a list, and returns features in the order of its layers.
    wanted = [layer for layer in cls.get_provided_features_list() if layer in layers.values()]

    def build() -> FeatureExtractorBase:
        with _socket_timeout(_DOWNLOAD_TIMEOUT):
            return _build(name, wanted, weights, from_file=features.endswith(".py"))

    module = build_in_turn(accelerator, build)
    return Extractor(name, layers, module.to(accelerator.device))


def _build(name: str, layers: list[str], weights: Path | None, from_file: bool) -> FeatureExtractorBase:
    path = str(weights) if weights else None
    try:
        return create_feature_extractor(name, layers, cuda=False, verbose=False, feature_extractor_weights_path=path)
    except (OSError, RuntimeError, ValueError, NotImplementedError, http.client.HTTPException) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError) as error:
        if weights is None:
            raise  # a fault of the extractor's code, whose author needs the traceback
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if weights is not None:
        raise UserError(f"--features_weights {weights} does not hold the weights of {name} ({cause})")
    if from_file:
        raise UserError(f"the extractor {name} cannot be built ({cause})")
    url = f" {URL_INCEPTION_V3} by other means and give it" if name == INCEPTION else " its weights by other means"
    raise Unavailable(
        f"the weights of {name} cannot be had ({cause}); fetch{url} with --features_weights FILE, "
        "or give another extractor with --features"
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A network that drops packets must not hold up the evaluation for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _default_layers(cls: type[FeatureExtractorBase]) -> dict[str, str]:
    """The extractor's own layer for each metric; its only layer where it names none."""
    layers = {}
    for metric in ("fid", "kid", "prc", "isc"):
        try:
            layers[metric] = cls.get_default_feature_layer_for_metric(metric)
        except (NotImplementedError, KeyError):
            provided = cls.get_provided_features_list()
            if len(provided) == 1 and metric != "isc":
                layers[metric] = provided[0]
    if "fid" not in layers:
        raise UsageError(f"the extractor {cls.__name__} names no default layer for the Frechet distance")
    # The Inception Score needs class outputs: an extractor that names its embedding for everything has none.
    if layers.get("isc") == layers["fid"]:
        del layers["isc"]
    return layers


def metric_name(metric: str, extractor: str) -> str:
    """The honest name of a number: only Inception's features give "fid", "kid", "is", "precision" and "recall".

    ("fid", "mobilenet-v2") -> "fd_mobilenet-v2", and "rfid" -> "rfd_..." likewise; "kid" -> "kd_...".
    """
    if extractor == INCEPTION:
        return metric
    return metric.replace("fid", "fd").replace("kid", "kd") + f"_{extractor}"


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of sets [N, D] float32, N >= 2 (arXiv 1706.08500, eq. 6)."""
    statistics = [fid_features_to_statistics(rows) for rows in (features, references)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def _fid(features: Tensor, references: Tensor) -> dict[str, float]:
    return {"fid": frechet_distance(features, references)}


def _inception_score(logits: Tensor, _: Tensor) -> dict[str, float]:
    score = isc_features_to_metric(logits, splits=_ISC_SPLITS)
    return {"is": score[KEY_METRIC_ISC_MEAN], "is_std": score[KEY_METRIC_ISC_STD]}


def _precision_recall(features: Tensor, references: Tensor) -> dict[str, float]:
    # In parts: all distances of 50,000 against 50,000 images at once would take 10 GB, several times.
    prc = prc_features_to_metric(features, references, prc_neighborhood=_NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}


def _kid(features: Tensor, references: Tensor) -> dict[str, float]:
    kid = kid_features_to_metric(features, references, kid_subset_size=_KID_SUBSET, verbose=False)
    return {"kid": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}


# torch-fidelity's metric: (its function, least images on each side, the names it gives)
_METRICS = {
    "fid": (_fid, 2, ("fid",)),
    "isc": (_inception_score, _ISC_SPLITS, ("is",)),
    "prc": (_precision_recall, _NEIGHBOURS + 1, ("precision", "recall")),
    "kid": (_kid, _KID_SUBSET, ("kid",)),
}


def metric_names(extractor: str) -> list[str]:
    """The names of all numbers of `distances`, for a result that has to say that they were skipped."""
    return [metric_name(name, extractor) for _, _, names in _METRICS.values() for name in names]


def distances(
    extractor: Extractor, features: dict[str, Tensor], references: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """All metrics between generated and real images that the extractor's layers and the counts allow.

    features, references: {layer: [N, D] float32}. Returns (metrics, skipped {name: why}, warnings). The Inception Score
    is of the generated set alone; precision and recall are those of arXiv 1904.06991 with 3 neighbours, KID that of
    arXiv 1801.01401. Raises `UserError` where a feature is not finite.
    """
    metrics, skipped = {}, {}
    for metric, (function, least, names) in _METRICS.items():
        layer = extractor.layers.get(metric)
        why = f"the extractor {extractor.name} has no outputs for it"
        if layer is not None:
            x, y = _finite(extractor, features[layer]), _finite(extractor, references[layer])
            if min(len(x), len(y)) >= least:
                metrics |= {metric_name(key, extractor.name): value for key, value in function(x, y).items()}
                continue
            why = f"needs at least {least} images on each side, there are {len(x)} and {len(y)}"
        skipped |= {metric_name(key, extractor.name): why for key in names}
    layer = extractor.layers["fid"]
    return metrics, skipped, rank_warnings(metric_name("fid", extractor.name), features[layer], references[layer])


def _finite(extractor: Extractor, rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise UserError(f"the extractor {extractor.name} gives features that are not finite: are its weights right?")
    return rows


def rank_warnings(name: str, features: Tensor, references: Tensor) -> list[str]:
    """Why to read a Frechet distance of these sets [N, D] with care: fewer images than the covariance's full rank."""
    n, d = min(len(features), len(references)), features.shape[1]
    if n > d:
        return []
    return [
        f"{name}: {n} images give a covariance of rank at most {max(n - 1, 0)} in {d} dimensions, which raises the "
        "distance; compare it only at equal numbers of images"
    ]
