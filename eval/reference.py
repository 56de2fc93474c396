"""The real images of a generation result: measured once and kept, or read from a file in ADM's format.

A kept file's name is a hash over all that its numbers depend on: the data's fingerprint, split, count and transform,
the extractor and its files. Features of single images are kept only where `cache_features` asks for them.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from nsvq.common.image_metrics import to_uint8
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UserError
from nsvq.eval.distributed import build_in_turn
from nsvq.eval.feature_statistics import FeatureSet, Gaussian
from nsvq.eval.features import Collector, Extractor
from nsvq.files import atomic_file

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "nsvq" / "references"
ADM_ROWS = 10_000  # real images that ADM's precision and recall compare with
ADM_SIZES = {size: f"VIRTUAL_imagenet{size}_labeled" for size in (64, 128, 256)} | {512: "VIRTUAL_imagenet512"}
_BAD_SHOWN = 20
_FILE_BATCH = 64  # images of a file at once
_ADM_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


def key_of(data: DataConfig, split: str, limit: int | None, extractor: Extractor, transform: str) -> dict:
    """What the statistics of a set of real images depend on."""
    files = {name: value for name, value in extractor.about.items() if name.endswith("sha256")}
    return {
        "data": open_split(data, split).fingerprint,
        "split": split,
        "limit": limit,
        "transform": [data.image_size, "ADM centre crop", transform],
        "extractor": [type(extractor).__name__, extractor.name, files],
        "torch-fidelity": metadata.version("torch-fidelity"),
    }


class Cache:
    """References below `folder`, or none where it is None. `features`: keep the rows of single images, too."""

    def __init__(self, folder: Path | None, features: bool, accelerator: Accelerator):
        self.folder = None if folder is None else folder.expanduser()
        self.features, self.accelerator = features, accelerator

    def _path(self, key: dict) -> Path:
        return self.folder / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".npz")

    def find(self, key: dict, layers: set[str], rows: set[str]) -> tuple[FeatureSet, dict] | None:
        """The set of `key` and what was said of it, where it has statistics of all `layers` and single features of
        `rows`; on the other ranks without its numbers. A collective call."""
        found = None
        if self.folder is not None and self.accelerator.is_main_process and self._path(key).is_file():
            try:
                found = _read(self._path(key))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                print(f"warning: {self._path(key)} is damaged ({error}): made again", file=sys.stderr)
            if found and not (layers <= set(found[0].gaussians) and rows <= set(found[0].rows)):
                found = None
        about = broadcast_object_list([found and found[1]])[0]
        return None if about is None else (found[0] if found else FeatureSet(None, {}), about)

    def keep(self, key: dict, features: FeatureSet, about: dict) -> None:
        """Write the set of `key` in one step, with `about` (JSON) beside it."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        # The key is for people who look into the file.
        arrays: dict = {"count": features.count, "about": json.dumps(about), "key": json.dumps(key, sort_keys=True)}
        for layer, gaussian in features.gaussians.items():
            arrays |= {f"mean {layer}": gaussian.mean.numpy(), f"covariance {layer}": gaussian.covariance.numpy()}
        if self.features:
            arrays |= {f"rows {layer}": rows.numpy() for layer, rows in features.rows.items()}
        try:
            with atomic_file(self._path(key), shared=True) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            print(f"warning: the reference is not kept in {self.folder} ({error.strerror})", file=sys.stderr)


def _read(path: Path) -> tuple[FeatureSet, dict]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}

    def of(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{kind} "): torch.from_numpy(a) for n, a in arrays.items() if n.startswith(f"{kind} ")}

    means, covariances = of("mean"), of("covariance")
    gaussians = {layer: Gaussian(mean, covariances[layer]) for layer, mean in means.items()}
    return FeatureSet(int(arrays["count"]), gaussians, of("rows")), json.loads(str(arrays["about"]))


def real_sets(
    extractors: dict[str, Extractor],
    metrics: Sequence[str],
    cache: Cache,
    data: DataConfig,
    split: str,
    limit: int | None = None,
    only_adm_rows: bool = False,
    **loading: int,
) -> tuple[dict[str, FeatureSet], dict]:
    """Features of a split's images by extractor, with numbers on the main process only; and what is said of the images.

    `only_adm_rows`: keep single features of a fixed random choice of 10,000. One pass over the split for all extractors
    that it is not kept for, none where `metrics` are of the samples alone. Raises `UserError` or `UsageError` for data
    that does not work. A collective call."""
    accelerator, keep = cache.accelerator, None
    if only_adm_rows:
        keep = torch.zeros(len(open_split(data, split)), dtype=torch.bool)
        keep[torch.from_numpy(np.random.default_rng(0).permutation(len(keep))[:ADM_ROWS])] = True
    found, keys, collectors, kept = {}, {}, {}, {}
    for name, extractor in extractors.items():
        collector = Collector(extractor, metrics, keep)
        if not collector.wants_images:
            found[name] = FeatureSet(None, {})
            continue
        keys[name] = key_of(data, split, limit, extractor, "8-bit")
        keys[name] |= {"single features": ADM_ROWS if only_adm_rows else "all"}
        earlier = cache.find(keys[name], set(collector.moments), set(collector.kept))
        if earlier is None:
            collectors[name] = collector
        else:
            found[name], kept[name] = earlier
    counts = next(iter(kept.values()), {})
    if collectors:
        bad, seen = BadImages(data.max_bad_fraction, accelerator), 0
        for batch in real_batches(data, split, limit, accelerator, "real images", **loading):
            bad.update(batch)
            seen += len(batch["image"])
            if len(batch["image"]):
                pixels = to_uint8(batch["image"].to(accelerator.device))
                for collector in collectors.values():
                    collector.add(pixels, batch["index"])
        about_bad = bad_images(bad)
        seen = int(accelerator.reduce(torch.tensor(seen, device=accelerator.device), "sum"))
        if seen == 0:
            raise UserError(f"the {split} split of {data.source} holds no image that decodes")
        counts = {"real_images": seen, **about_bad}
        for name, collector in collectors.items():
            found[name] = collector.total(accelerator)
            cache.keep(keys[name], found[name], counts)
    return found, {"counts": counts, "kept_from_an_earlier_run": sorted(kept)}


def real_batches(
    data: DataConfig, split: str, limit: int | None, accelerator: Accelerator, what: str, **loading: int
) -> Iterable[dict]:
    """This rank's share of a split, with a bar that says `what`; `loading`: batch_size and workers."""
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = eval_batches(data, split, limit=limit, **ranks, **loading)
    return tqdm(batches, what, unit="batch", disable=not accelerator.is_main_process, leave=False)


def bad_images(bad: BadImages) -> dict:
    """How many images of all ranks did not decode, and the first of them. Raises `UserError` where they are too many. A
    collective call."""
    bad.check(final=True)
    everywhere = sorted(gather_object(bad.bad))
    return {"bad_images": len(everywhere), "bad_images_shown": everywhere[:_BAD_SHOWN]}


def adm_file(size: int, accelerator: Accelerator) -> Path:
    """ADM's own reference for ImageNet-1k at `size` pixels, downloaded once. Raises `UserError` where that fails."""
    url = f"{_ADM_URL}/{size}/{ADM_SIZES[size]}.npz"
    path = Path(torch.hub.get_dir()) / "adm" / Path(url).name

    def fetch() -> Path:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            except OSError as error:
                how = "fetch it by other means and give it with --reference FILE.npz, or use --reference train"
                raise UserError(f"cannot download ADM's reference {url} ({error}): {how}") from None
        return path

    return build_in_turn(accelerator, fetch)


def set_from_file(
    path: Path, extractor: Extractor, metrics: Sequence[str], size: int, accelerator: Accelerator
) -> FeatureSet:
    """The statistics that a file in ADM's format gives, and the features of its images, of `size` pixels, of which each
    rank computes its share. Raises `UserError` for a file that is no such reference. A collective call."""
    features, images = read_adm(path, extractor.layers)
    probe = extractor(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=accelerator.device))
    for layer, gaussian in features.gaussians.items():
        if len(gaussian.mean) != (wanted := probe[layer].shape[1]):
            found = f"holds statistics of {len(gaussian.mean)} features"
            raise UserError(f"--reference {path} {found}; those of {extractor.name} have {wanted}")
    if images is None:
        return features
    if images.shape[1:3] != (size, size):
        found = f"{images.shape[2]} x {images.shape[1]}"
        raise UserError(f"--reference {path} holds images of {found} pixels, not {size} x {size}")
    collector = Collector(extractor, metrics)
    if not collector.wants_images:
        return features
    for start in range(accelerator.process_index * _FILE_BATCH, len(images), accelerator.num_processes * _FILE_BATCH):
        batch = torch.from_numpy(images[start : start + _FILE_BATCH]).permute(0, 3, 1, 2).contiguous()
        collector.add(batch.to(accelerator.device), torch.arange(start, start + len(batch)))
    own = collector.total(accelerator)
    # Statistics that the file gives are of more images than it holds.
    count = None if extractor.layers.get("fid") in features.gaussians else own.count
    return FeatureSet(count, own.gaussians | features.gaussians, own.rows)


def read_adm(path: Path, layers: dict[str, str]) -> tuple[FeatureSet, np.ndarray | None]:
    """A reference in ADM's format: statistics of the pooled features (mu, sigma) and of the spatial ones (mu_s,
    sigma_s), and images uint8 [N, H, W, 3] (arr_0), for precision and recall; at least mu and sigma, or images.

    `layers`: the extractor's layers {metric: layer}. Raises `UserError` where the file is something else."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if name in file.files}
            names = ", ".join(file.files) or "nothing"
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path} is no .npz file in ADM's format ({error})") from None
    gaussians = {}
    for metric, mean, covariance in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if metric in layers and mean in arrays and covariance in arrays:
            gaussians[layers[metric]] = _gaussian(path, arrays, mean, covariance)
    images = arrays.get("arr_0")
    if images is not None and not (images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8):
        what = f"{images.dtype} {images.shape}"
        raise UserError(f"--reference {path}: arr_0 must hold images, uint8 [N, H, W, 3], not {what}")
    if images is None and layers.get("fid") not in gaussians:
        raise UserError(f"--reference {path} must hold mu and sigma, or images in arr_0; it holds {names}")
    return FeatureSet(None, gaussians), images


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str) -> Gaussian:
    mean, covariance = arrays[mean_name], arrays[covariance_name]
    shapes = f"{mean_name} {mean.shape} and {covariance_name} {covariance.shape}"
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or mean.dtype.kind != "f":
        raise UserError(f"--reference {path}: expected a mean [D] and a covariance [D, D], found {shapes}")
    spread = covariance.astype(np.float64)
    finite = np.isfinite(mean).all() and np.isfinite(spread).all()
    if not finite or abs(spread - spread.T).max() > 1e-4 * abs(spread).max():
        raise UserError(f"--reference {path}: {shapes} are no finite mean and symmetric covariance")
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(spread))
