"""The token cache, and training batches from it. tokenizer/encode.py fills it, with latents or with codes.

<cache>/shard-*.safetensors   latents float16 [n, views, C, H, W], labels int64 [n], sums for the statistics; or
                              codes [n, views, H, W], uint16 for K <= 65,536 and else int32, and labels
<cache>/manifest.json         what it is a cache of, its shards, classes and, of latents, statistics; written last

Shards are read through memory maps. View 0 is the image's centre crop; crops follow each other, and with flips each one
is followed by its mirror image."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from nsvq.data.batches import shuffled_positions
from nsvq.data.loading import batches_of, make_loader, restarting
from nsvq.errors import UserError


class LatentCache:
    """A complete cache. Raises `UserError` where its manifest is damaged, or one of its shards is gone or not of the
    size that was written.

    `files`: its shards, in order; `classes`: names; `shape`: (C, H, W), of codes (H, W); `views`: how many there are of
    each image; `manifest`: all of that and more, of latents `mean` and `std`, per channel over all images, views and
    places, and `overall_std`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.classes: list[str] = self.manifest["classes"]
        self.views, *shape = self.manifest["shape"]
        self.shape: Any = tuple(shape)
        self.files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        if gone := [path.name for path in self.files if not path.exists()]:
            raise UserError(f"{self.folder} has lost {', '.join(gone[:3])}: delete that folder to encode it again")
        shards = zip(self.files, self.manifest["shards"], strict=True)
        if cut := [path.name for path, shard in shards if path.stat().st_size != shard["bytes"]]:
            what = f"{', '.join(cut[:3])} not of the size that was written"
            raise UserError(f"{self.folder}: {what}: delete manifest.json and these shards, and start again")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, view: int) -> tuple[Tensor, int]:
        """Latents [C, H, W] float16, or codes [H, W], of a view of image `index`, and its label (-1: none)."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._open:
            with safe_open(self.files[shard], "pt") as file:  # the tensors are views of the map, and keep it
                self._open[shard] = file.get_tensor(tensor_name(self.manifest["key"])), file.get_tensor("labels")
        tokens, labels = self._open[shard]
        row = index - int(self._ends[shard]) + len(labels)
        return tokens[row, view], int(labels[row])

    def damaged(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """Names of this rank's share of the shards whose contents have another SHA-256 than when they were written; it
        reads all of them."""
        found = []
        for path, shard in list(zip(self.files, self.manifest["shards"], strict=True))[rank::world_size]:
            with contextlib.suppress(SafetensorError):
                if shard_hash(load_file(path)) == shard["sha256"]:
                    continue
            found.append(path.name)
        return found

    def __getstate__(self) -> dict:  # loading processes open their own maps
        return self.__dict__ | {"_open": {}}


def read_manifest(folder: Path) -> dict:
    """What a complete cache says about itself. Raises `UserError` where that is damaged."""
    try:
        return json.loads((path := folder / "manifest.json").read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and start again, which keeps the shards") from None


def tensor_name(key: dict) -> str:
    """What the shards of a cache with this key hold, by the name that it has there: "latents" or "codes"."""
    return "codes" if key.get("latents") == "codes" else "latents"


def shard_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over a shard's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()


def train_batches(
    cache: LatentCache,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Batches without end: latents float16 [B, C, H, W], labels int64 [B], id: list[str] of names in the cache, and
    each sample's own draws: noise float32 [B, C, H, W], time_normal [B] (standard normal), drop_uniform [B] in [0, 1).

    Position p of the sequence holds image permutation(seed, p // n)[p % n]; its view and its draws come from (seed, p).
    So neither the number of ranks, nor of micro-batches, nor of workers changes a sample. Micro-batch m on rank r holds
    the positions start + (m * world_size + r) * batch_size + [0, batch_size)."""

    return _endless(_Batches(cache, seed, codes=False), batch_size, start, rank, world_size, workers)


def code_batches(
    cache: LatentCache,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """As `train_batches`, of a cache of codes: codes int64 [B, H, W], labels, id and drop_uniform, without noise."""
    return _endless(_Batches(cache, seed, codes=True), batch_size, start, rank, world_size, workers)


def _endless(batches: "_Batches", batch_size: int, start: int, rank: int, world_size: int, workers: int) -> Iterator:
    def batches_from(done: int) -> Iterator[dict]:
        first = start + done * batch_size * world_size
        places = shuffled_positions(len(batches.cache), batch_size, batches.seed, first, rank, world_size)
        size = batch_size * math.prod(batches.cache.shape) * (8 if batches.codes else 6)  # with float32 noise
        return batches_of(make_loader(batches, workers, size, batch_sampler=places, collate_fn=dict))

    return restarting(batches_from)


class _Batches(Dataset):
    """List of (position, index) -> the batch of these samples with their draws."""

    def __init__(self, cache: LatentCache, seed: int, codes: bool):
        self.cache, self.seed, self.codes = cache, seed, codes

    def __getitems__(self, places: list[tuple[int, int]]) -> dict:
        tokens = torch.empty(len(places), *self.cache.shape, dtype=torch.int64 if self.codes else torch.float16)
        noise = None if self.codes else np.empty(tokens.shape, np.float32)
        labels, times, drops = [], [], []
        for i, (position, index) in enumerate(places):
            rng = np.random.default_rng([self.seed, 1, position])
            stored, label = self.cache.read(index, int(rng.integers(self.cache.views)))
            tokens[i] = stored
            labels.append(label)
            if noise is not None:
                times.append(rng.standard_normal(dtype=np.float32))
            drops.append(rng.random(dtype=np.float32))
            if noise is not None:
                rng.standard_normal(out=noise[i], dtype=np.float32)
        name = "codes" if self.codes else "latents"
        batch = {
            name: tokens,
            "labels": torch.tensor(labels),
            "id": [f"{name}[{index}]" for _, index in places],
            "drop_uniform": torch.tensor(np.array(drops)),
        }
        if noise is not None:
            batch |= {"time_normal": torch.tensor(np.array(times)), "noise": torch.from_numpy(noise)}
        return batch
