"""From a data config to images: which split, which columns, which classes.

Images stay undecoded until one is loaded, so that a damaged one is a `BadImage` with a name instead of a crash. How
tables come about (Hub, class folders, parquet) is in data/tables.py, webdataset shards are in data/shards.py, columns
and labels in data/labels.py, and what is said of a source before training is in data/understood.py.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from nsvq.data import synthetic, tables
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, decode
from nsvq.data.labels import image_column, label_by_name, label_column, shard_fields, shard_labels, table_labels
from nsvq.data.shards import Shards
from nsvq.data.tables import Found, Rows
from nsvq.errors import UsageError, UserError

_TEST_SPLITS = ("validation", "val", "valid", "test")  # in this order: ImageNet-1k's test split has no labels


class Images:
    """Images with random access: a split of a table or of shards; `rows` chooses and orders its rows.

    `classes`: names in label order, [] without labels. `fingerprint`: stands for split, count, labels and a sample of
    the contents, and is the same in every process and on every machine. `split`: the source's name of it; `found`: how
    the source was understood.
    """

    def __init__(
        self, encoded: Rows | Shards, labels: np.ndarray, classes: list[str], rows: np.ndarray, name: str, found: Found
    ):
        self._encoded, self._labels, self._rows = encoded, labels, rows
        self.classes, self.split, self.found = classes, name, found
        digest = hashlib.sha256(json.dumps([name, len(rows), classes]).encode() + labels[rows].tobytes())
        for i in np.linspace(0, len(rows) - 1, min(len(rows), 32)).astype(int):
            try:
                digest.update(hashlib.sha256(encoded.read(int(rows[i]))[0]).digest())
            except BadImage:
                digest.update(b"no image")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> np.ndarray:
        """The label of each image [N] (-1: none)."""
        return self._labels[self._rows]

    def load(self, i: int) -> tuple[Image.Image, int]:
        """Image i as upright RGB, and its label (-1: none). Raises `BadImage` where it does not decode."""
        row = int(self._rows[i])
        return decode(*self._encoded.read(row)), int(self._labels[row])

    def encoded(self, i: int) -> bytes:
        """The file of image i. Raises `BadImage` without it."""
        return self._encoded.read(int(self._rows[i]))[0]

    def sizes(self, chosen: np.ndarray) -> np.ndarray:
        """Bytes of the files of these images (-1: no file)."""
        return self._encoded.sizes(self._rows[chosen])

    def id(self, i: int) -> str:
        """What names image i: split[row], or shard:key."""
        return self._encoded.id(int(self._rows[i]))


class SyntheticImages:
    """The built-in data set (data/synthetic.py), with the attributes and methods of `Images`."""

    def __init__(self, split: str, size: int):
        self._split, self._size = split, size
        self.split, self.found = split, Found("synthetic", splits=dict(synthetic.LENGTHS))
        self.classes = list(synthetic.CLASSES)
        self.fingerprint = hashlib.sha256(
            json.dumps(["synthetic", synthetic.VERSION, split, len(self)]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return synthetic.LENGTHS[self._split]

    def labels(self) -> np.ndarray:
        return np.array([synthetic.label(i) for i in range(len(self))])

    def load(self, i: int) -> tuple[Image.Image, int]:
        return synthetic.render(self._split, i, self._size), synthetic.label(i)

    def id(self, i: int) -> str:
        return f"{self._split}[{i}]"


Split = Images | SyntheticImages


def open_split(config: DataConfig, split: str) -> Split:
    """The "train" or "test" images of `config`, with `.classes` and `.fingerprint`; opened once a process.

    Raises `UserError` or `UsageError` where the data can't be had, has no such split or column, or is empty.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    return _open(type(config), config.model_dump_json(exclude={"flip", "max_bad_fraction"}))(split)


@lru_cache(maxsize=8)
def _open(schema: type, text: str) -> Callable[[str], Split]:
    """Opens "train" or "test", of a listing of the source that both share: of a million files it takes a while."""
    config = schema(**json.loads(text))
    if config.source == "synthetic":
        return cache(lambda split: SyntheticImages(_choose(config, split, ["train", "test"])[0], config.image_size))
    found, root = tables.find(config.source), Path(config.source).expanduser()
    if found.kind == "tar":
        return cache(lambda split: _open_shards(config, split, found.copy()))
    read = {
        "hub": lambda: tables.from_hub(config.source, config.subset),
        "saved": lambda: tables.from_saved(root),
        "folders": lambda: tables.from_folders(root, found),
        "parquet": lambda: tables.from_parquet(tables.by_split(found.files)),
    }
    parts = read[found.kind]()
    return cache(lambda split: _open_table(config, split, parts, found.copy()))


def _choose(config: DataConfig, split: str, names: list[str]) -> tuple[str, bool]:
    """The name of the split to read, and whether train and test share it (then a share of it is held out)."""
    train = config.train_split or "train"
    test = config.test_split or next((name for name in _TEST_SPLITS if name in names and name != train), None)
    wanted = train if split == "train" or test is None else test
    if wanted not in names:
        key = "train_split" if wanted == train else "test_split"
        raise UsageError(f"{config.source} has no split {wanted!r}: set data.{key} to one of {', '.join(names)}")
    if test is None:
        tables.note(f"{config.source} has no split to measure on: {config.holdout:.2%} of {train!r} is held out for it")
    return wanted, test is None


def _open_table(config: DataConfig, split: str, parts: dict[str, datasets.Dataset], found: Found) -> Images:
    parts = {name: table for name, table in parts.items() if len(table)}
    if not parts:
        raise UserError(f"{config.source} is empty")
    found.splits = {name: len(table) for name, table in parts.items()}
    name, shared = _choose(config, split, list(parts))
    table = parts[name]
    encoded = Rows(table, image_column(config, table.features), name)
    classes, labels = table_labels(config, label_column(config, parts, name), parts, name, found)
    return Images(encoded, labels, classes, _rows(config, split, len(table), shared), name, found)


def _open_shards(config: DataConfig, split: str, found: Found) -> Images:
    files = tables.by_split(found.files)
    name, shared = _choose(config, split, list(files))
    fields = shard_fields(config, files)
    parts = {part: Shards(files[part], fields) for part in files}
    found.splits = {part: len(shards) for part, shards in parts.items()}
    members, hidden = np.sum([shards.members for shards in parts.values()], 0).tolist()
    found.skipped["hidden or the system's"] += hidden
    found.skipped["labels and other fields"] += members - hidden - sum(map(_images_in, parts.values()))
    by_name = label_by_name(config, parts, found, fields.label is not None)
    classes: list[str] = []
    labels = np.full(len(parts[name]), -1)
    if fields.label is not None or by_name:
        classes, labels = shard_labels(config, parts, name, found)
    return Images(parts[name], labels, classes, _rows(config, split, len(labels), shared), name, found)


def _images_in(shards: Shards) -> int:
    return int((shards.sizes(np.arange(len(shards))) >= 0).sum())


def _rows(config: DataConfig, split: str, n: int, shared: bool) -> np.ndarray:
    """Rows of a split that belong to "train" or "test": all, or a fixed random share where both are in one."""
    if not shared:
        return np.arange(n)
    count = round(n * config.holdout)
    if not 0 < count < n:
        raise UserError(f"{config.source}: of {n} images, data.holdout = {config.holdout} leaves none on one side")
    order = np.random.default_rng(0).permutation(n)
    return np.sort(order[:count] if split == "test" else order[count:])
