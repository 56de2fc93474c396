"""Fill the token cache, with latents or codes: every image of a split through the frozen tokenizer once, over all
ranks, in shards. A start after an interruption keeps the shards that are complete."""

import itertools
import json
import math
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nsvq.common.run import on_main_process, progress_bar
from nsvq.data.batches import batches_in_order
from nsvq.data.config import DataConfig
from nsvq.data.sources import Split, open_split
from nsvq.errors import UsageError, UserError
from nsvq.files import atomic_file
from nsvq.tokenizer.latents import LatentCache, read_manifest, shard_hash, tensor_name
from nsvq.tokenizer.pretrained import Tokenizer

BATCH_IMAGES = 32
SHARD_IMAGES = 64 * BATCH_IMAGES  # 256 MiB at 16 x 16 x 128; a multiple, so that no batch is of two shards
_LATE = 90  # seconds after which a network file system shows a file of another node at the latest
_ABANDONED = 3600  # seconds after which nobody writes to the part of a shard any more
_SHARED = "give a --cache on a file system that all nodes share"
_CODES_CHECKED = 1024
_FORMAT = 2
_KEY_NAMES = {
    "tokenizer": "another tokenizer",
    "data": "other data",
    "image_size": "another image size",
    "flips": "another data.flip",
    "limit": "another cache_images",
    "crops": "another cache_crops",
    "latents": "another setting of latents",
    "format": "another version of this program",
}


def open_cache(
    folder: Path,
    tokenizer: Tokenizer,
    data: DataConfig,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    limit: int | None = None,
    crops: int = 1,
    kind: Literal["continuous", "quantized", "codes"] = "continuous",
    split: Literal["train", "test"] = "train",
    verify: bool = False,
) -> LatentCache:
    """The cache at `folder`, encoded first as far as it is not complete. Called on all ranks, which share the work.

    Of each image it holds ADM's centre crop and `crops` - 1 of ADM's random crops, and of each crop, with `data.flip`,
    the mirror image. `kind`: the encoder's latents, the vectors of their codes, or the codes themselves. `limit` takes
    that many images of the split, spread at random, instead of all. `verify` compares the shards of a complete
    cache with their checksums.

    Raises `UserError` where `folder` holds latents of another tokenizer, data, size or kind, or is another folder on
    another node, where the disk is too small, where too many images are bad, and where a shard is damaged; `UsageError`
    where the image size is no multiple of the tokenizer's f, and where "quantized" latents would not decode to their
    own codes."""
    folder = Path(folder)
    if data.image_size % (f := tokenizer.downsampling):
        raise UsageError(f"data.image_size = {data.image_size} must be a multiple of the tokenizer's f = {f}")
    if kind != "continuous" and not tokenizer.codebook_size:
        raise UsageError(f"an {type(tokenizer.model).__name__} has no codebook: use latents: continuous, or a VQModel")
    if kind == "quantized":
        _check_codes(tokenizer)
    with accelerator.main_process_first():
        images = open_split(data, split)
    key = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "data": images.fingerprint,
        "image_size": data.image_size,
        "flips": 2 if data.flip else 1,
        "limit": limit,
        "crops": crops,
        "latents": kind,
    }
    if not on_main_process(accelerator, lambda: _is_complete(folder, key)):
        _Encoding(folder, tokenizer, data, images, accelerator, key, workers).run()
        verify = False
    _check_shared(folder / "manifest.json", accelerator)
    cache = LatentCache(folder)
    if verify and (damaged := gather_object(cache.damaged(accelerator.process_index, accelerator.num_processes))):
        what = f"{', '.join(damaged[:3])} not what was written"
        raise UserError(f"{folder}: {what}: delete manifest.json and these shards, and start again")
    return cache


def _check_codes(tokenizer: Tokenizer) -> None:
    """Raises `UsageError` where the decoder, which quantizes, would see a code as another one."""
    codes = tokenizer.codebook[:_CODES_CHECKED]
    again = tokenizer.codebook[tokenizer.quantize(codes.T[None, :, None])[0, 0]]
    # Clones that replacement left may stand for each other: a distance of nearly zero is not exact in float32.
    if not torch.allclose(again, codes, rtol=0, atol=1e-2 * float(codes.std())):
        what = "latents: quantized needs a tokenizer whose codes are their own nearest codes"
        raise UsageError(f"{what}, and this one compares latents elsewhere: use latents: continuous")


def _is_complete(folder: Path, key: dict) -> bool:
    """Raises `UserError` where `folder` holds tokens of another `key`."""
    if complete := (folder / "manifest.json").exists():
        found = [read_manifest(folder)["key"]]
    else:
        found = [json.loads(_metadata(path)["key"]) for path in folder.glob("shard-*.safetensors")]
    for other in found:
        if what := [text for name, text in _KEY_NAMES.items() if other.get(name) != key[name]]:
            held = f"{folder} holds {tensor_name(other)} of {', '.join(what)}"
            raise UserError(f"{held}: delete that folder, or give another --cache")
    return complete


def _absent(paths: list[Path]) -> list[Path]:
    """Those that are not there, and do not come: a network file system shows files of other nodes late."""
    end = time.monotonic() + _LATE
    while (absent := [path for path in paths if not path.exists()]) and time.monotonic() < end:
        time.sleep(1)
    return absent


def _check_shared(path: Path, accelerator: Accelerator) -> None:
    """Raises `UserError` on every rank where one of them does not see a file of the main process."""
    if any(gather_object([bool(_absent([path]))])):
        raise UserError(f"not every rank sees {path}: {_SHARED}")


@dataclass
class _Encoding:
    """The work on one cache; every rank does a part."""

    folder: Path
    tokenizer: Tokenizer
    data: DataConfig
    images: Split
    accelerator: Accelerator
    key: dict
    workers: int

    def __post_init__(self) -> None:
        side, views = self.data.image_size // self.tokenizer.downsampling, self.key["crops"] * self.key["flips"]
        self.shape: tuple[int, ...] = (views, self.tokenizer.latent_channels, side, side)
        self.name, self.dtype = tensor_name(self.key), torch.float16
        if self.name == "codes":
            self.shape = (views, side, side)
            self.dtype = torch.uint16 if self.tokenizer.codebook_size <= 2**16 else torch.int32
        order, limit = np.arange(len(self.images)), self.key["limit"]
        if limit is not None and limit < len(order):
            order = np.sort(np.random.default_rng(0).permutation(len(order))[:limit])
        self.parts = np.split(order, range(SHARD_IMAGES, len(order), SHARD_IMAGES))
        count = len(self.parts)
        self.paths = [self.folder / f"shard-{i:06d}-of-{count:06d}.safetensors" for i in range(count)]

    def run(self) -> None:
        """Write the shards that are missing, and the manifest."""
        count = sum(map(len, self.parts))
        missing, marker = on_main_process(self.accelerator, lambda: self.begin(count))
        try:
            _check_shared(self.folder / marker, self.accelerator)  # not after hours of encoding
        finally:
            if self.accelerator.is_main_process:
                (self.folder / marker).unlink()
        bad: list[str] = []
        with progress_bar(self.accelerator, None, 0, desc="tokens", unit="img") as bar, ThreadPoolExecutor(1) as writer:
            writing: Future | None = None  # of the shard before, while this one is encoded
            for shard, batches in self.shards(missing):
                tensors, bad_here = self.encode_shard(batches, bar)
                bad += bad_here
                if writing:
                    writing.result()
                self.check_bad(len(bad), count, bad)  # it can't come right any more
                writing = writer.submit(self.write_shard, self.paths[shard], tensors, len(bad_here))
            if writing:
                writing.result()
        self.accelerator.wait_for_everyone()
        on_main_process(self.accelerator, lambda: self.end(bad))

    def begin(self, count: int) -> tuple[list[int], str]:
        """Which shards are missing, and the name of a new file in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".shard-*.part"):  # of another run, or of one that was killed
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink(missing_ok=True)
        self.announce(count)
        marker = f".{uuid.uuid4().hex}"
        (self.folder / marker).touch()
        return [i for i, path in enumerate(self.paths) if not path.exists()], marker

    def shards(self, missing: list[int]) -> Iterator[tuple[int, Iterator[dict]]]:
        """This rank's part of the shards that are missing, and the batches of each, all of one loader."""
        mine = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        order = np.concatenate([np.arange(0), *(self.parts[shard] for shard in mine)])  # only the last may be short
        how = {"batch_size": BATCH_IMAGES, "workers": self.workers, "crops": self.key["crops"]}
        batches = batches_in_order(self.images, order, self.data.image_size, **how)
        for shard in mine:
            yield shard, itertools.islice(batches, math.ceil(len(self.parts[shard]) / BATCH_IMAGES))

    def end(self, bad: list[str]) -> None:
        """Write the manifest."""
        manifest = self.manifest()
        self.check_bad(manifest["bad_images"], manifest["count"] + manifest["bad_images"], bad)
        with atomic_file(self.folder / "manifest.json", shared=True) as part:
            part.write_text(json.dumps(manifest, indent=2))

    def check_bad(self, count: int, total: int, names: list[str]) -> None:
        """Raises `UserError` where too many images are bad."""
        limit = self.data.max_bad_fraction
        if count > limit * total:
            such = f", such as {', '.join(names[:3])}" if names else ""
            what = f"{count} of {total} images of {self.data.source} do not decode{such}"
            raise UserError(f"{what}: more than data.max_bad_fraction = {limit}")

    def announce(self, count: int) -> None:
        """Say what the cache takes. Raises `UserError` where the disk has less."""
        each, crops, flips = self.dtype.itemsize * math.prod(self.shape), self.key["crops"], self.key["flips"]
        views = f"{crops} crops x {flips} flips" if crops > 1 else f"{flips} flips"
        done = sum(path.stat().st_size for path in self.paths if path.exists())
        needed, free = count * each - done, shutil.disk_usage(self.folder).free
        print(f"token cache {self.folder}: {count} images x {views}, {count * each / 2**30:.2f} GiB", flush=True)
        if needed > free:
            raise UserError(
                f"{self.folder} needs {needed / 2**30:.1f} GiB more for tokens, and its disk has "
                f"{free / 2**30:.1f} GiB free: give a --cache on a larger one, or fewer --cache_images"
            )

    def encode_shard(self, batches: Iterable[dict], bar: tqdm) -> tuple[dict[str, Tensor], list[str]]:
        """Tokens and labels of the images of one shard, and the names of bad ones. A GPU is waited for at the end
        alone, so that the host loads images while it encodes."""
        device = self.accelerator.device
        ahead = device.type == "cuda"  # elsewhere copies that do not block may not be complete when they are read
        tokens = [torch.zeros(0, *self.shape, dtype=self.dtype)]
        labels, bad = [torch.zeros(0, dtype=torch.int64)], []
        sums, squares = torch.zeros(2, self.shape[1], dtype=torch.float64, device=device)
        for batch in batches:
            bad += batch["bad"]
            if not len(batch["label"]):
                continue
            crops = batch["image"].to(device, non_blocking=ahead)  # (B crops, 3, S, S)
            views = [crops, crops.flip(-1)][: self.key["flips"]]
            z = torch.stack([self.tokens(view) for view in views], dim=1)
            z = z.reshape(len(batch["label"]), *self.shape)  # (B, crops flips, C, H, W), of codes without C
            if self.name == "latents":
                sums += z.double().sum((0, 1, 3, 4))
                squares += z.double().square().sum((0, 1, 3, 4))
            tokens.append(z.to(self.dtype).to("cpu", non_blocking=ahead))
            labels.append(batch["label"])
            bar.update(len(z))
        if ahead:
            torch.cuda.synchronize(device)
        tensors = {self.name: torch.cat(tokens), "labels": torch.cat(labels)}
        if self.name == "latents":
            tensors |= {"sums": sums.cpu().clone(), "squares": squares.cpu().clone()}
            if not tensors[self.name].isfinite().all():
                raise UserError("the tokenizer's latents of some images do not fit into float16, or are no numbers")
        return tensors, bad

    def write_shard(self, path: Path, tensors: dict[str, Tensor], bad: int) -> None:
        """The file takes its name when it is complete."""
        about = {"key": json.dumps(self.key), "bad": str(bad), "sha256": shard_hash(tensors)}
        try:
            with atomic_file(path, shared=True) as part:  # two runs may fill one cache at the same time
                save_file(tensors, part, metadata=about)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            what = f"cannot write {path} ({error})"
            raise UserError(f"{what}; the next start goes on from the shards there are") from None

    def tokens(self, images: Tensor) -> Tensor:
        """As the generator is to see them."""
        if self.name == "codes":
            return self.tokenizer.encode(images)
        z = self.tokenizer.latents(images).float()
        if self.key["latents"] == "continuous":
            return z
        scale = self.tokenizer.model.config.scaling_factor
        return self.tokenizer.codebook[self.tokenizer.quantize(z / scale)].permute(0, 3, 1, 2) * scale  # (B, d, h, w)

    def manifest(self) -> dict:
        """What all shards hold together. Raises `UserError` where there are not all."""
        if absent := _absent(self.paths):
            what = f"{len(absent)} of {len(self.paths)} shards, such as {absent[0].name}"
            raise UserError(f"{self.folder} lacks {what}, which other nodes wrote: {_SHARED}")
        shards, bad = [], 0
        sums, squares = torch.zeros(2, self.shape[1], dtype=torch.float64)
        for path in self.paths:
            about = _metadata(path)
            bad += int(about["bad"])
            with safe_open(path, "pt") as file:
                count = file.get_slice("labels").get_shape()[0]
                if self.name == "latents":
                    sums, squares = sums + file.get_tensor("sums"), squares + file.get_tensor("squares")
            if count:
                size, digest = path.stat().st_size, about["sha256"]
                shards.append({"file": path.name, "count": count, "bytes": size, "sha256": digest})
        count = sum(shard["count"] for shard in shards)
        if not count:
            raise UserError(f"{self.folder}: none of its images decodes")
        counted: dict = {"key": self.key, "count": count, "bad_images": bad, "shape": self.shape}
        counted |= {"dtype": str(self.dtype).removeprefix("torch."), "classes": self.images.classes, "shards": shards}
        if self.name == "codes":
            return counted
        per_channel = count * self.shape[0] * self.shape[2] * self.shape[3]
        mean, square = sums / per_channel, squares / per_channel
        return counted | {
            "mean": mean.tolist(),
            "std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
            "overall_std": (square.mean() - mean.mean().square()).clamp(min=0).sqrt().item(),
        }


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and start again") from None
