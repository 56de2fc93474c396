"""Batches of images for training and evaluation.

    for batch in train_batches(config, batch_size=32, seed=0, start=0, rank=0, world_size=1, workers=4): ...

A batch is a dict: image float32 [B, 3, S, S] in [-1, 1], label int64 [B] (-1 where the data has none), index int64 [B]
(-1 in streams), id: list[str] that names them (split[row], or shard:key), bad: list[str] of images that did not decode.
Their places are taken by others in training; in evaluation they are left out. Where images come from is in
data/sources.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, several_crops, to_tensor, training_crop
from nsvq.data.loading import batches_of, make_loader, restarting
from nsvq.data.shards import Sample, Stream, in_order, shuffled
from nsvq.data.sources import Images, SyntheticImages, open_split
from nsvq.errors import UserError

_ATTEMPTS = 20  # images tried for one place before the run ends
_ORDER, _AUGMENT, _REPLACE = range(3)  # independent random sequences of one seed


def train_batches(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[dict]:
    """Shuffled training batches without end, from global sample `start` on.

    Position p of the sequence holds image permutation(seed, p // n)[p % n], cropped and flipped by (seed, p) alone, so
    neither the number of workers nor that of ranks changes it. Micro-batch m on rank r holds positions
    start + (m * world_size + r) * batch_size + [0, batch_size). In place of a bad image comes another one, drawn from
    (seed, p, attempt).

    A stream is shuffled by shards and within a buffer instead, and its sequence belongs to one number of ranks and
    workers. `start` then passes over what was consumed without decoding it: the headers of local shards (some 20,000
    images a second and process), all bytes of remote ones.

    Raises `UserError` where images in a row fail to decode, and what `open_split` raises.
    """
    data = open_split(config, "train")

    def batches_from(done: int) -> Iterator[dict]:
        place = (batch_size, seed, start + done * batch_size * world_size, rank, world_size)
        if isinstance(data, Stream):
            return batches_of(make_loader(_StreamBatches(data, config, *place), workers, batch_size=None))
        collate = partial(_collate, size=config.image_size, full=True)
        positions = shuffled_positions(len(data), *place)
        return batches_of(
            make_loader(_TrainImages(data, config, seed), workers, batch_sampler=positions, collate_fn=collate)
        )

    return restarting(batches_from)


def eval_batches(
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: int | None = None,
    crops: int = 1,
) -> Iterator[dict]:
    """Every image of `split` exactly once over all ranks, by ADM's centre crop; bad ones are left out and listed.

    With more `crops`, image is [B * crops, 3, S, S], the crops of `several_crops` after each other.
    `limit` takes that many: of a stream the first, else a fixed random choice (so that it covers the classes). Ranks
    may see different numbers of batches, and a batch may hold bad images only (image [0, 3, S, S]): reduce over ranks
    after the loop, not in it. Raises what `open_split` raises.
    """
    data = open_split(config, split)
    if isinstance(data, Stream):
        dataset = _StreamEval(data, config, batch_size, rank, world_size, limit, crops)
        return batches_of(make_loader(dataset, workers, batch_size=None))
    order = np.arange(len(data))
    if limit is not None and limit < len(order):
        order = np.random.default_rng(0).permutation(len(data))[:limit]
    mine = order[rank::world_size].tolist()
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    collate = partial(_collate, size=config.image_size)
    return batches_of(make_loader(_EvalImages(data, config, crops), workers, batch_sampler=batches, collate_fn=collate))


class BadImages:
    """Counts images that did not decode, and ends the run when their share passes `limit`.

    `update` each batch on its own rank; the rest on all ranks alike (it reduces or gathers).
    """

    def __init__(self, limit: float, accelerator: Accelerator | None = None, minimum: int = 100):
        self.limit, self.accelerator, self.minimum = limit, accelerator, minimum
        self.seen = 0  # on this rank, bad ones included
        self.bad: list[str] = []  # on this rank
        self._before = (0, 0)  # bad and seen on all ranks, before a restart; kept by the first rank
        self._told = 0  # of self.bad

    def update(self, batch: dict) -> None:
        """Count a batch of `train_batches` or `eval_batches`."""
        self.seen += len(batch["label"]) + len(batch["bad"])
        self.bad += batch["bad"]

    def check(self, final: bool = False) -> int:
        """Bad images so far on all ranks. Raises `UserError` on every rank where their share of all images passes the
        limit; looks at no fewer than `minimum` images unless `final`."""
        bad, seen = self._counts()
        if bad > self.limit * seen and (final or seen >= self.minimum):
            some = ", ".join(dict.fromkeys(self.bad[:100])) or "on other ranks"
            some = some if len(some) < 400 else some[:400] + " ..."
            raise UserError(
                f"{bad} of {seen} images do not decode ({some}), more than data.max_bad_fraction = {self.limit}; "
                "repair or remove them, or raise the limit"
            )
        return bad

    def news(self) -> list[str]:
        """Those that `news` has not told yet, on all ranks."""
        fresh, self._told = list(dict.fromkeys(self.bad[self._told :])), len(self.bad)
        return gather_object(fresh) if self.accelerator is not None else fresh

    def _counts(self) -> tuple[int, int]:
        counts = torch.tensor([self._before[0] + len(self.bad), self._before[1] + self.seen])
        if self.accelerator is not None:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), "sum")
        return tuple(counts.tolist())

    def state_dict(self) -> dict:
        """Counts over all ranks, and what `news` is still to tell."""
        untold = self.bad[self._told :]
        return {"counts": self._counts(), "untold": gather_object(untold) if self.accelerator is not None else untold}

    def load_state_dict(self, state: dict) -> None:
        """The first rank takes up the counts, so that the total is right."""
        self.seen, self.bad, self._told, self._before = 0, [], 0, (0, 0)
        if self.accelerator is None or self.accelerator.is_main_process:
            bad, seen = state["counts"]
            self.bad = list(state["untold"])
            self._before = (bad - len(self.bad), seen)


@dataclass
class _Item:
    """What a worker makes of one place in a batch; no images where it stays empty."""

    images: list[Image.Image]
    label: int
    index: int
    id: str
    bad: list[str]


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
    }


class _TrainImages(Dataset):
    """(position, index) -> the item at that position."""

    def __init__(self, data: Images | SyntheticImages, config: DataConfig, seed: int):
        self.data, self.config, self.seed = data, config, seed

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
            return _Item([training_crop(image, self.config.image_size, self.config.flip, rng)], label, index,
                         self.data.id(index), bad)  # fmt: skip
        return _Item([], -1, -1, "", bad)


class _EvalImages(Dataset):
    """index -> its item."""

    def __init__(self, data: Images | SyntheticImages, config: DataConfig, crops: int):
        self.data, self.config, self.crops = data, config, crops

    def __getitem__(self, index: int) -> _Item:
        try:
            image, label = self.data.load(index)
        except BadImage as error:
            return _Item([], -1, index, "", [error.id])
        id = self.data.id(index)
        return _Item(several_crops(image, self.config.image_size, self.crops, id), label, index, id, [])


class _StreamBatches(IterableDataset):
    """Training batches of one rank. Batch m comes from reader m % readers, which is what makes a resume exact."""

    def __init__(self, stream, config, batch_size, seed, start, rank, world_size):
        done, rest = divmod(start, batch_size * world_size)
        if rest:
            raise ValueError(f"start = {start} is no multiple of batch_size x world_size = {batch_size * world_size}")
        self.stream, self.config, self.batch_size, self.seed = stream, config, batch_size, seed
        self.done, self.rank, self.world_size = done, rank, world_size

    def __iter__(self) -> Iterator[dict]:
        worker, readers = _worker()
        reader = (worker + self.done) % readers
        batches_done = self.done // readers + (reader < self.done % readers)
        share = self.rank * readers + reader
        shares = self.world_size * readers
        try:
            samples = shuffled(self.stream, self.seed, share, shares, self.config.shuffle_buffer)
            places = enumerate(samples)
            next(islice(places, batches_done * self.batch_size, batches_done * self.batch_size), None)
            while True:
                items = [self._item(share, *place) for place in islice(places, self.batch_size)]
                yield _collate(items, self.config.image_size, full=True)
        except UserError as error:  # torch would wrap it in a traceback of the worker
            yield {"failure": str(error)}

    def _item(self, share: int, k: int, drawn: tuple[Sample, list[Sample]]) -> "_Item":
        sample, buffer = drawn
        bad = []
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                image, label = self.stream.load(sample)
            except BadImage as error:
                bad.append(error.id)
                rng = np.random.default_rng([self.seed, _REPLACE, share, k, attempt])
                sample = buffer[int(rng.integers(len(buffer)))]
                continue
            rng = np.random.default_rng([self.seed, _AUGMENT, share, k])
            return _Item([training_crop(image, self.config.image_size, self.config.flip, rng)], label, -1,
                         self.stream.id(sample), bad)  # fmt: skip
        return _Item([], -1, -1, "", bad)


class _StreamEval(IterableDataset):
    """Batches of one rank in one pass."""

    def __init__(self, stream, config, batch_size, rank, world_size, limit, crops):
        self.stream, self.config, self.batch_size, self.crops = stream, config, batch_size, crops
        self.rank, self.world_size, self.limit = rank, world_size, limit

    def __iter__(self) -> Iterator[dict]:
        worker, readers = _worker()
        try:
            samples = in_order(self.stream, self.rank * readers + worker, self.world_size * readers, self.limit)
            while chunk := list(islice(samples, self.batch_size)):
                yield _collate([self._item(sample) for sample in chunk], self.config.image_size)
        except UserError as error:
            yield {"failure": str(error)}

    def _item(self, sample: Sample) -> "_Item":
        try:
            image, label = self.stream.load(sample)
        except BadImage as error:
            return _Item([], -1, -1, "", [error.id])
        id = self.stream.id(sample)
        return _Item(several_crops(image, self.config.image_size, self.crops, id), label, -1, id, [])


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def shuffled_positions(n: int, batch_size: int, seed: int, start: int, rank: int, world_size: int) -> Iterator[list]:
    """Micro-batches of a rank, lists of (position, index): index = permutation(seed, position // n)[position % n]."""
    epoch, order = None, None
    for m in count():
        first = start + (m * world_size + rank) * batch_size
        batch = []
        for position in range(first, first + batch_size):
            if position // n != epoch:
                epoch = position // n
                order = np.random.default_rng([seed, _ORDER, epoch]).permutation(n)
            batch.append((position, int(order[position % n])))
        yield batch
