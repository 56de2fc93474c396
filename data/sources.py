"""From a data config to images: which split, which columns, which classes.

Images stay undecoded until one is loaded, so that a damaged one is a `BadImage` with a name instead of a crash. How
tables come about (Hub, class folders, parquet) is in data/tables.py, webdataset shards are in data/shards.py.
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from nsvq.data import synthetic, tables
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, decode
from nsvq.data.shards import Shards, first_fields
from nsvq.data.tables import IMAGE_SUFFIXES, Rows
from nsvq.errors import UsageError, UserError

LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_TEST_SPLITS = ("validation", "val", "valid", "test")  # in this order: ImageNet-1k's test split has no labels
_MAX_CLASSES = 100_000


class Images:
    """Images with random access: a split of a table or of shards; `rows` chooses and orders its rows.

    `classes`: names in label order, [] without labels. `fingerprint`: stands for split, count, labels and a sample of
    the contents, and is the same in every process and on every machine.
    """

    def __init__(self, encoded: Rows | Shards, labels: np.ndarray, classes: list[str], rows: np.ndarray, name: str):
        self._encoded, self._labels, self._rows = encoded, labels, rows
        self.classes = classes
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

    def id(self, i: int) -> str:
        """What names image i: split[row], or shard:key."""
        return self._encoded.id(int(self._rows[i]))


class SyntheticImages:
    """The built-in data set (data/synthetic.py), with the attributes and methods of `Images`."""

    def __init__(self, split: str, size: int):
        self._split, self._size = split, size
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
    return _open(type(config), config.model_dump_json(exclude={"flip", "max_bad_fraction"}), split)


@lru_cache(maxsize=8)
def _open(schema: type, text: str, split: str) -> Split:
    config = schema(**json.loads(text))
    if config.source == "synthetic":
        return SyntheticImages(_choose(config, split, ["train", "test"])[0], config.image_size)
    files = tables.local_files(config.source)
    if files is None:
        return _open_table(config, split, tables.from_hub(config.source, config.subset))
    if not files:
        return _open_table(config, split, tables.from_class_folders(Path(config.source).expanduser()))
    if files[0].endswith(".tar"):
        return _open_shards(config, split, tables.by_split(files))
    return _open_table(config, split, tables.from_parquet(tables.by_split(files)))


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


def _open_table(config: DataConfig, split: str, found: dict[str, datasets.Dataset]) -> Images:
    found = {name: table for name, table in found.items() if len(table)}
    if not found:
        raise UserError(f"{config.source} is empty")
    name, shared = _choose(config, split, list(found))
    table = found[name]
    encoded = Rows(table, _image_column(config, table.features), name)
    classes, labels = _labels(config, _label_column(config, table.features), found, name)
    return Images(encoded, labels, classes, _rows(config, split, len(table), shared), name)


def _open_shards(config: DataConfig, split: str, files: dict[str, list[str]]) -> Images:
    name, shared = _choose(config, split, list(files))
    image, label = _fields(config, first_fields(files[name]), files[name][0])
    # The classes are those of all splits, unless they are named.
    wanted = files if label is not None and config.class_names is None else [name]
    found = {part: Shards(files[part], image, label) for part in wanted}
    classes, labels = ([], np.full(len(found[name]), -1)) if label is None else _shard_labels(config, found, name)
    return Images(found[name], labels, classes, _rows(config, split, len(labels), shared), name)


def _rows(config: DataConfig, split: str, n: int, shared: bool) -> np.ndarray:
    """Rows of a split that belong to "train" or "test": all, or a fixed random share where both are in one."""
    if not shared:
        return np.arange(n)
    count = round(n * config.holdout)
    if not 0 < count < n:
        raise UserError(f"{config.source}: of {n} images, data.holdout = {config.holdout} leaves none on one side")
    order = np.random.default_rng(0).permutation(n)
    return np.sort(order[:count] if split == "test" else order[count:])


# Columns


def _image_column(config: DataConfig, features: datasets.Features) -> str:
    if config.image_column is not None:
        return _existing(config, "image_column", features)
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name, kind in features.items() if _holds_bytes(kind)]
    if len(found) != 1:
        what = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise UsageError(f"{config.source} has {what}: set data.image_column to one of {', '.join(features)}")
    return found[0]


def _label_column(config: DataConfig, features: datasets.Features) -> str | None:
    if config.label_column is not None:
        return _existing(config, "label_column", features)
    usual = [name for name in LABEL_NAMES if name in features and (_is_int(features[name]) or _is_text(features[name]))]
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return usual[0] if usual else typed[0] if len(typed) == 1 else None


def _existing(config: DataConfig, key: str, features: datasets.Features) -> str:
    name = getattr(config, key)
    if name not in features:
        raise UsageError(f"{config.source} has no column data.{key} = {name!r}: it has {', '.join(features)}")
    return name


def _holds_bytes(kind: Any) -> bool:
    """Encoded images without the library's own type: bytes, or a record of bytes and path."""
    return getattr(kind, "dtype", "") == "binary" or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _is_int(kind: Any) -> bool:
    return isinstance(kind, datasets.ClassLabel) or re.fullmatch(r"u?int\d+", getattr(kind, "dtype", "")) is not None


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


def _labels(config: DataConfig, column: str | None, found: dict, split: str) -> tuple[list[str], np.ndarray]:
    """Class names, alike for every split, and the labels [n] int64 of `split` (-1: none)."""
    if column is None:
        return [], np.full(len(found[split]), -1)
    kind = found[split].features[column]
    values = {
        name: table.select_columns([column]).with_format("arrow")[:].column(0)
        for name, table in found.items()
        if table.features.get(column) == kind
    }
    if _is_text(kind):
        names = sorted({text for column in values.values() for text in column.unique().to_pylist() if text is not None})
        ids = {None: -1} | {text: i for i, text in enumerate(names)}
        labels = np.array([ids[text] for text in values[split].to_pylist()], np.int64)
    elif _is_int(kind):
        labels = values[split].fill_null(-1).to_numpy().astype(np.int64)
        top = max(int(column.fill_null(-1).to_numpy().max()) for column in values.values())
        if top >= _MAX_CLASSES:
            raise UserError(f"{config.source}: column {column!r} goes up to {top}: these are no class ids")
        names = kind.names if isinstance(kind, datasets.ClassLabel) else [str(i) for i in range(top + 1)]
    else:
        raise UsageError(f"{config.source}: data.label_column = {column!r} holds {kind}, not class ids or names")
    names = list(names) if config.class_names is None else read_class_names(config.class_names)
    _check(config, names, labels, lambda row: f"{split}[{row}]")
    return names, labels


def _check(config: DataConfig, names: list[str], labels: np.ndarray, id: Callable[[int], str]) -> None:
    wrong = np.flatnonzero((labels < -1) | (labels >= len(names)))
    if len(wrong):
        place = f"label {labels[wrong[0]]} of {id(wrong[0])}"
        raise UserError(f"{config.source}: {place} is outside the classes 0..{len(names) - 1}")


def _fields(config: DataConfig, fields: list[str], shard: str) -> tuple[str, str | None]:
    """Which fields of a shard's samples hold the image and the label."""
    images = [config.image_column] if config.image_column else [f for f in fields if f".{f.lower()}" in IMAGE_SUFFIXES]
    if len(images) != 1 or images[0] not in fields:
        raise UsageError(f"{shard}: set data.image_column to the image's field, one of {', '.join(fields)}")
    label = config.label_column
    if label is not None and label not in fields:
        raise UsageError(f"{shard} has no field data.label_column = {label!r}: it has {', '.join(fields)}")
    usual = [f"{name}{suffix}" for name in LABEL_NAMES for suffix in ("", ".txt")]
    return images[0], label or next((field for field in usual if field in fields), None)


def _shard_labels(config: DataConfig, found: dict[str, Shards], split: str) -> tuple[list[str], np.ndarray]:
    """Class names, alike for every split, and the labels [n] int64 of `split` (-1: none)."""
    values = {name: np.unique(shards.labels) for name, shards in found.items()}
    texts = {value: value.decode(errors="replace") for part in values.values() for value in part.tolist() if value}
    if all(re.fullmatch(r"-?\d+", text) for text in texts.values()):
        ids = {value: int(text) for value, text in texts.items()}
        top = max(ids.values(), default=-1)
        if top >= _MAX_CLASSES:
            raise UserError(f"{config.source}: labels go up to {top}: these are no class ids")
        names = [str(i) for i in range(top + 1)] if config.class_names is None else read_class_names(config.class_names)
    else:
        names = sorted(set(texts.values())) if config.class_names is None else read_class_names(config.class_names)
        places = {name: i for i, name in enumerate(names)}
        for value in (value for value, text in texts.items() if text not in places):
            id = found[split].id(int(np.argmax(found[split].labels == value)))
            raise UserError(f"{config.source}: label {texts[value]!r} of {id} is none of those in data.class_names")
        ids = {value: places[text] for value, text in texts.items()}
    numbers = np.array([ids.get(value, -1) for value in values[split].tolist()], np.int64)
    labels = numbers[np.searchsorted(values[split], found[split].labels)]
    _check(config, names, labels, found[split].id)
    return names, labels


def read_class_names(path: str) -> list[str]:
    """Names, one a line. Raises `UserError` where the file can't be read or holds none."""
    try:
        names = [line.strip() for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data.class_names = {path}: {error}") from None
    if not names:
        raise UserError(f"data.class_names = {path} holds no names")
    return names
