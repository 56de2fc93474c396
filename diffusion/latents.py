"""The latent cache, and training batches from it. diffusion/encode.py fills it.

<cache>/shard-*.safetensors   latents float16 [n, flips, C, H, W], labels int64 [n], sums for the statistics
<cache>/manifest.json         what it is a cache of, its shards, classes and statistics; written last

Shards are read through memory maps. Flip 0 is the image, flip 1 its mirror image.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from common.data import shuffled_positions
from common.errors import UserError
from common.loading import batches_of, make_loader, restarting


class LatentCache:
    """A complete cache. Raises `UserError` where one of its shards is gone.

    `classes`: names; `shape`: (C, H, W); `flips`: 1 or 2; `mean`, `std`: per channel, over all images, flips and
    places; `overall_std`: over all channels as well; `manifest`: all of that and more.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.classes: list[str] = self.manifest["classes"]
        self.flips, *shape = self.manifest["shape"]
        self.shape: tuple[int, int, int] = tuple(shape)
        self.mean: list[float] = self.manifest["mean"]
        self.std: list[float] = self.manifest["std"]
        self.overall_std: float = self.manifest["overall_std"]
        self._files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        if gone := [path.name for path in self._files if not path.exists()]:
            raise UserError(f"{self.folder} has lost {', '.join(gone[:3])}: delete that folder to encode it again")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, flip: int) -> tuple[Tensor, int]:
        """Latents [C, H, W] float16 of image `index` (flip 1: of its mirror image), and its label (-1: none)."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._open:
            with safe_open(self._files[shard], "pt") as file:  # the tensors are views of the map, and keep it
                self._open[shard] = file.get_tensor("latents"), file.get_tensor("labels")
        latents, labels = self._open[shard]
        row = index - int(self._ends[shard]) + len(labels)
        return latents[row, flip], int(labels[row])

    def __getstate__(self) -> dict:  # loading processes open their own maps
        return self.__dict__ | {"_open": {}}


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
    """Batches without end: latents float32 [B, C, H, W], labels int64 [B], id: list[str] of names in the cache, and
    each sample's own draws: noise float32
    [B, C, H, W] and time_normal [B] (standard normal), drop_uniform [B] in [0, 1).

    Position p of the sequence holds image permutation(seed, p // n)[p % n]; its flip and its draws come from (seed, p).
    So neither the number of ranks, nor of micro-batches, nor of workers changes a sample. Micro-batch m on rank r holds
    the positions start + (m * world_size + r) * batch_size + [0, batch_size).
    """

    def batches_from(done: int) -> Iterator[dict]:
        first = start + done * batch_size * world_size
        places = shuffled_positions(len(cache), batch_size, seed, first, rank, world_size)
        return batches_of(make_loader(_Samples(cache, seed), workers, batch_sampler=places))

    return restarting(batches_from)


class _Samples(Dataset):
    """(position, index) -> one sample with its draws."""

    def __init__(self, cache: LatentCache, seed: int):
        self.cache, self.seed = cache, seed

    def __getitem__(self, place: tuple[int, int]) -> dict:
        position, index = place
        rng = np.random.default_rng([self.seed, 1, position])
        latents, label = self.cache.read(index, int(rng.integers(self.cache.flips)))
        return {
            "latents": latents.float(),
            "labels": label,
            "id": f"latents[{index}]",
            "time_normal": rng.standard_normal(dtype=np.float32),
            "drop_uniform": rng.random(dtype=np.float32),
            "noise": torch.from_numpy(rng.standard_normal(self.cache.shape, dtype=np.float32)),
        }
