"""Image features: torch-fidelity's extractors, one of its registered names or a Python file that registers another.

An extractor may name layers for the metrics "fid", "kid", "prc" and "isc", and for "sfid" one of spatial features;
Inception's, which torch-fidelity does not give out, are taken from inside of it.
"""

import difflib
import inspect
import pickle
import re
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from nsvq.common.extractors import BUILD_ERRORS, build_registered, register_file
from nsvq.errors import UsageError, UserError
from nsvq.eval.distributed import build_in_turn, gather_by_index, in_groups
from nsvq.eval.feature_statistics import FeatureSet, InceptionScore, Moments
from nsvq.files import file_hash, state_hash

INCEPTION = "inception-v3-compat"
DINOV2 = "dinov2-vit-l-14"
METRICS = ("fid", "kid", "prc", "isc", "sfid")
_DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
_SPATIAL = "mixed_6/conv:7"  # the layer that we add to Inception
_WEIGHTS_ERRORS = (pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError)  # of a file that holds others


class Unavailable(UserError):
    """The extractor's weights could not be downloaded; the message says how to get them."""


class Extractor:
    """A frozen feature extractor on a device.

    Attributes: `name`; `layers` {metric: layer} for "fid", and as far as it has them for "sfid", "kid", "prc" and
    "isc"; `about`: what identifies it (file, weights and their SHA-256); `warnings`."""

    def __init__(self, name: str, layers: dict[str, str], module: FeatureExtractorBase):
        self.name, self.layers, self.module = name, layers, module
        self.about: dict = {}
        self.warnings: list[str] = []
        self._spatial: list[Tensor] = []
        if layers.get("sfid") == _SPATIAL:
            module.Mixed_6d.branch1x1.register_forward_hook(lambda *call: self._spatial.append(call[-1]))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images [B, 3, H, W] -> {layer: features [B, D] float32}, on the images' device."""
        return in_groups(self._features, images)

    @torch.no_grad()
    def _features(self, images: Tensor) -> dict[str, Tensor]:
        self._spatial.clear()
        features = self.module.convert_features_tuple_to_dict(self.module(images))
        if self._spatial:
            # ADM's spatial features: the first 7 channels of TensorFlow's mixed_6/conv, in its order (B, 17, 17, 7).
            features[_SPATIAL] = self._spatial.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {layer: rows.float() for layer, rows in features.items()}


class PytorchFidInception(Extractor):
    """Inception as SimVQ's evaluation runs it (pytorch-fid): on float images that are not rounded to 8 bits, resized by
    torch's bilinear filter, with pixels from -1 to 1. It needs torch-fidelity's extractor, whose layers it calls."""

    def __init__(self, extractor: Extractor):
        super().__init__(extractor.name, {"fid": extractor.layers["fid"]}, extractor.module)
        self.about, self.warnings = extractor.about, extractor.warnings
        layers = [layer for name, layer in extractor.module.named_children() if name != "fc"]
        self.layers_in_order = nn.Sequential(*layers)

    @torch.no_grad()
    def _features(self, images: Tensor) -> dict[str, Tensor]:
        """Float images [B, 3, H, W] in [-1, 1] -> {"2048": features [B, 2048]}."""
        images = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        return {self.layers["fid"]: self.layers_in_order(images).flatten(1)}


class Collector:
    """Statistics of the images of one set, gathered image by image on each rank, and brought together at the end.

    `metrics` says what will be computed, and so what has to be kept: rows for "kid" and "prc" alone. `keep` [N] bool,
    where given, chooses by image number whose rows to keep; `splits` [N] are those of the Inception Score."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str], keep: Tensor | None = None, splits=None):
        self.extractor, self.keep = extractor, keep
        layers = {metric: layer for metric, layer in extractor.layers.items() if metric in metrics}
        self.moments = {layers[metric]: Moments() for metric in ("fid", "sfid") if metric in layers}
        self.score = InceptionScore(splits) if "isc" in layers and splits is not None else None
        self.kept = sorted({layers[metric] for metric in ("kid", "prc") if metric in layers})
        self.rows: list[dict[str, Tensor]] = []

    @property
    def wants_images(self) -> bool:
        """Whether there is anything to gather: not for the Inception Score alone of a set without splits."""
        return bool(self.moments or self.kept or self.score)

    def add(self, images: Tensor, index: Tensor) -> None:
        """Images [B, 3, H, W] as the extractor takes them, with their numbers [B]. Raises `UserError` where a feature
        is not finite."""
        features, name = self.extractor(images), self.extractor.name
        if not all(rows.isfinite().all() for rows in features.values()):
            raise UserError(f"the extractor {name} gives features that are not finite: are its weights right?")
        for layer, moments in self.moments.items():
            moments.add(features[layer])
        if self.score is not None:
            self.score.add(features[self.extractor.layers["isc"]].cpu(), index)
        if self.kept:
            chosen = torch.ones(len(index), dtype=torch.bool) if self.keep is None else self.keep[index]
            rows = {name: features[name].cpu()[chosen] for name in self.kept}
            self.rows.append({"index": index[chosen], **rows})

    def total(self, accelerator: Accelerator) -> FeatureSet:
        """The set over all ranks. A collective call."""
        totals = {layer: moments.total(accelerator) for layer, moments in self.moments.items()}
        counts = [count for count, _ in totals.values()] or [0]
        rows = gather_by_index(accelerator, self.rows) if self.kept else None
        gaussians = {layer: gaussian for layer, (_, gaussian) in totals.items() if gaussian is not None}
        rows = {name: values for name, values in (rows or {}).items() if name != "index"}
        score = None if self.score is None else self.score.total(accelerator)
        return FeatureSet(counts[0], gaussians, rows, score)


def resolve(features: str) -> str:
    """The registered name that `--features` means: a name of torch-fidelity, or a Python file that registers one.
    Raises `UsageError` for anything else."""
    if features.endswith(".py"):
        return register_file(Path(features).resolve())
    if features not in FEATURE_EXTRACTORS_REGISTRY:
        near = difflib.get_close_matches(features, FEATURE_EXTRACTORS_REGISTRY, n=1)
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY)) + (f"; did you mean {near[0]}?" if near else "")
        raise UsageError(f"--features {features}: neither a Python file (.py) nor one of {known}")
    return features


def load_extractor(
    features: str, weights: Path | None, accelerator: Accelerator, metrics: Sequence[str] = METRICS
) -> Extractor:
    """Build the extractor on every rank, with torch-fidelity's default layers for `metrics`. A collective call. Raises
    `Unavailable` where its weights cannot be downloaded, `UsageError` or `UserError` for a wrong name, file or weights;
    always on all ranks."""
    name = resolve(features)
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    if weights is not None and "feature_extractor_weights_path" not in inspect.signature(cls.__init__).parameters:
        raise UsageError(f"--features_weights: the extractor {name} takes no weights by path; leave the option out")
    if weights is not None and not weights.is_file():
        raise UserError(f"--features_weights: there is no file {weights}")
    layers = {metric: layer for metric, layer in _default_layers(cls).items() if metric in metrics}
    # Inception's forward wants a list, and returns features in the order of its layers.
    wanted = [layer for layer in cls.get_provided_features_list() if layer in layers.values()]

    own = features.endswith(".py") and weights is None
    build = partial(build_registered, name, wanted) if own else partial(_build, name, wanted, weights)
    module = build_in_turn(accelerator, build)
    if accelerator.device.type == "cpu":
        module = module.to(memory_format=torch.channels_last)  # convolutions are faster so, by about a third
    extractor = Extractor(name, layers, module.to(accelerator.device))
    extractor.about = {"extractor": name, "layers": layers, "state_sha256": state_hash(module)}
    if features.endswith(".py"):
        extractor.about |= {"file": features, "file_sha256": file_hash(Path(features))}
    if name == INCEPTION:
        _check_inception(extractor, weights)
    elif weights is not None:
        extractor.about |= {"weights": str(weights), "weights_sha256": file_hash(weights)}
    return extractor


def _check_inception(extractor: Extractor, weights: Path | None) -> None:
    """The name of torch-fidelity's file ends in the first digits of its SHA-256: another file by path is warned of, a
    download that does not match is an error."""
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    digest, known = file_hash(path), re.search("-([0-9a-f]{8})[.]", URL_INCEPTION_V3).group(1)
    extractor.about |= {"weights": str(path), "weights_sha256": digest}
    if not digest.startswith(known):
        problem = f"the Inception weights in {path} are not torch-fidelity's (SHA-256 {digest[:8]}..., not {known}...)"
        if weights is None:
            raise UserError(f"{problem}: delete the file, so that it is downloaded again")
        extractor.warnings.append(f"{problem}: no number of theirs compares with a published one")


def _build(name: str, layers: list[str], weights: Path | None) -> FeatureExtractorBase:
    path, timeout = str(weights) if weights else None, socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # a network that drops packets must not hold up the evaluation
    try:
        return create_feature_extractor(name, layers, cuda=False, verbose=False, feature_extractor_weights_path=path)
    except (*BUILD_ERRORS, *_WEIGHTS_ERRORS) as error:
        if weights is None and not isinstance(error, BUILD_ERRORS):
            raise  # a fault of the extractor's code, whose author needs the traceback
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        socket.setdefaulttimeout(timeout)
    if weights is not None:
        raise UserError(f"--features_weights {weights} does not hold the weights of {name} ({cause})")
    how = f"fetch its weights by other means into {torch.hub.get_dir()}"
    if name == INCEPTION:
        how = f"fetch {URL_INCEPTION_V3} by other means and give it with --features_weights FILE"
    how += ", or give another extractor with --features"
    raise Unavailable(f"the weights of {name} cannot be had ({cause}); {how}")


def _default_layers(cls: type[FeatureExtractorBase]) -> dict[str, str]:
    """The extractor's own layer for each metric; its only layer where it names none."""
    layers = {}
    for metric in METRICS:
        try:
            layers[metric] = cls.get_default_feature_layer_for_metric(metric)
        except (NotImplementedError, KeyError):
            provided = cls.get_provided_features_list()
            if len(provided) == 1 and metric in ("fid", "kid", "prc"):
                layers[metric] = provided[0]
    if "fid" not in layers:
        raise UsageError(f"the extractor {cls.__name__} names no default layer for the Frechet distance")
    # The Inception Score needs class outputs: an extractor that names its embedding for everything has none.
    if layers.get("isc") == layers["fid"]:
        del layers["isc"]
    if cls is FEATURE_EXTRACTORS_REGISTRY[INCEPTION]:
        layers["sfid"] = _SPATIAL
    return layers


def metric_name(metric: str, extractor: str) -> str:
    """The honest name of a number: only Inception's features give "fid", "kid", "is", "precision" and "recall".

    ("fid", "mobilenet-v2") -> "fd_mobilenet-v2", and "rfid" -> "rfd_..." likewise; "kid" -> "kd_..."."""
    return metric if extractor == INCEPTION else f"{metric.replace('fid', 'fd').replace('kid', 'kd')}_{extractor}"
