"""Batches of images for training and evaluation.

    for batch in train_batches(config, batch_size=32, seed=0, start=0, rank=0, world_size=1, workers=4): ...

A batch is a dict: image float32 [B, 3, S, S] in [-1, 1], label int64 [B] (-1 where the data has none), index int64 [B],
id: list[str] that names them (split[row], or shard:key), bad: list[str] of images that did not decode. Their places are
taken by others in training; in evaluation they are left out. In training also position: list[int], the samples' global
positions. Where images come from is in data/sources.py.

What this adds to torchdata's loader with a state: a place in the data is one number, the sample's position, which
belongs to no number of ranks or workers, so a run goes on elsewhere at the same sample.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, several_crops, to_tensor, training_crop
from nsvq.data.loading import batches_of, make_loader, restarting
from nsvq.data.sources import Split, open_split
from nsvq.errors import UserError

_ATTEMPTS = 20  # images tried for one place before the run ends
_ORDER, _AUGMENT, _REPLACE = range(3)  # independent random sequences of one seed


def train_batches(
    config: DataConfig, *, batch_size: int, seed: int, start=0, rank=0, world_size=1, workers=0
) -> Generator[dict, None, None]:
    """Shuffled training batches without end, from global sample `start` on.

    Position p of the sequence holds image permutation(seed, p // n)[p % n], cropped and flipped by (seed, p) alone, so
    neither the number of workers nor that of ranks changes it. Micro-batch m on rank r holds positions
    start + (m * world_size + r) * batch_size + [0, batch_size). In place of a bad image comes another one, drawn from
    (seed, p, attempt).

    Raises `UserError` where images in a row fail to decode, and what `open_split` raises."""
    data = open_split(config, "train")

    def batches_from(done: int) -> Iterator[dict]:
        first = start + done * batch_size * world_size
        positions = shuffled_positions(len(data), batch_size, seed, first, rank, world_size)
        collate = partial(_collate, size=config.image_size, full=True)
        images = _TrainImages(data, config, seed)
        size = batch_size * 12 * config.image_size**2
        return batches_of(make_loader(images, workers, size, batch_sampler=positions, collate_fn=collate))

    return restarting(batches_from)


def eval_batches(
    config: DataConfig, split: str, *, batch_size: int, rank=0, world_size=1, workers=0, limit: int | None = None
) -> Iterator[dict]:
    """Every image of `split` exactly once over all ranks, by ADM's centre crop; bad ones are left out and listed.

    `limit` takes that many, a fixed random choice (so that it covers the classes). Ranks may see different numbers of
    batches, and a batch may hold bad images only (image [0, 3, S, S]): reduce over ranks after the loop, not in it.
    Raises what `open_split` raises."""
    data = open_split(config, split)
    order = np.arange(len(data))
    if limit is not None and limit < len(order):
        order = np.random.default_rng(0).permutation(len(data))[:limit]
    return batches_in_order(data, order[rank::world_size], config.image_size, batch_size=batch_size, workers=workers)


def fixed_images(config: DataConfig, split: str, count: int) -> torch.Tensor:
    """Some images [B, 3, S, S] of `split` at random, B at most `count`, always the same. Raises `UserError` where none
    decodes, and what `open_split` raises."""
    data, found = open_split(config, split), torch.empty(0, 3, config.image_size, config.image_size)
    order = np.random.default_rng(0).permutation(len(data))  # class folders come class by class
    for batch in batches_in_order(data, order, config.image_size, batch_size=count):
        found = torch.cat([found, batch["image"]])[:count]
        if len(found) == count:
            break
    if not len(found):
        raise UserError(f"{config.source}: none of the images to {split} on decodes: look with python -m nsvq.data")
    return found


def batches_in_order(
    data: Split, order: np.ndarray, size: int, *, batch_size: int, workers: int = 0, crops: int = 1
) -> Iterator[dict]:
    """The images of `order`, indices [N], by ADM's centre crop of `size` pixels; bad ones are left out and listed. With
    more `crops`, image is [B * crops, 3, S, S], the crops of `several_crops` after each other."""
    rows = order.tolist()
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    collate = partial(_collate, size=size)
    bytes_each = batch_size * crops * 12 * size**2
    images = _EvalImages(data, size, crops)
    return batches_of(make_loader(images, workers, bytes_each, batch_sampler=batches, collate_fn=collate))


@dataclass
class _Item:
    """What a worker makes of one place in a batch; no images where it stays empty."""

    images: list[Image.Image]
    label: int
    index: int
    id: str
    bad: list[str]
    position: int = -1  # in training


def _collate(items: list[_Item], size: int, full: bool = False) -> dict:
    good = [item for item in items if item.images]
    bad = [id for item in items for id in item.bad]
    if full and len(good) < len(items):
        return {"failure": f"{_ATTEMPTS} images in a row do not decode: {', '.join(bad[-_ATTEMPTS:])}"}
    images = [image for item in good for image in item.images]
    return {
        "image": to_tensor(images) if images else torch.empty(0, 3, size, size),
        "label": torch.tensor([item.label for item in good], dtype=torch.int64),
        "index": torch.tensor([item.index for item in good], dtype=torch.int64),
        "id": [item.id for item in good],
        "bad": bad,
    } | ({"position": [item.position for item in good]} if full else {})


@dataclass
class _TrainImages(Dataset):
    """(position, index) -> the item at that position."""

    data: Split
    config: DataConfig
    seed: int

    def __getitem__(self, place: tuple[int, int]) -> _Item:
        position, index = place
        bad = []
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                image, label = self.data.load(index)
            except BadImage as error:
                bad.append(error.id)
                rng = np.random.default_rng([self.seed, _REPLACE, position, attempt])
                index = int(rng.integers(len(self.data)))
                continue
            rng = np.random.default_rng([self.seed, _AUGMENT, position])
            crop = training_crop(image, self.config.image_size, self.config.flip, rng)
            return _Item([crop], label, index, self.data.id(index), bad, position)
        return _Item([], -1, -1, "", bad)


@dataclass
class _EvalImages(Dataset):
    """index -> its item."""

    data: Split
    size: int
    crops: int

    def __getitem__(self, index: int) -> _Item:
        try:
            image, label = self.data.load(index)
        except BadImage as error:
            return _Item([], -1, index, "", [error.id])
        id = self.data.id(index)
        return _Item(several_crops(image, self.size, self.crops, id), label, index, id, [])


def shuffled_positions(n: int, batch_size: int, seed: int, start: int, rank: int, world_size: int) -> Iterator[list]:
    """Micro-batches of a rank, lists of (position, index): index = permutation(seed, position // n)[position % n]."""
    epoch, order = None, None
    for first in count(start + rank * batch_size, world_size * batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // n != epoch:
                epoch = position // n
                order = np.random.default_rng([seed, _ORDER, epoch]).permutation(n)
            batch.append((position, int(order[position % n])))
        yield batch
