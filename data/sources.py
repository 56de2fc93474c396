"""From a data config to images: which split, which columns, which classes.

Images stay undecoded until one is loaded, so that a damaged one is a `BadImage` with a name instead of a crash. How
tables come about (Hub, class folders, parquet) is in data/tables.py, webdataset shards are in data/shards.py.
"""

import hashlib
import json
import re
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
    the contents, and is the same in every process and on every machine."""

    def __init__(self, encoded: Rows | Shards, labels: np.ndarray, classes: list[str], rows: np.ndarray, name: str):
        self._encoded, self._labels, self._rows, self.classes = encoded, labels, rows, classes
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

    classes = synthetic.CLASSES

    def __init__(self, split: str, size: int):
        self._split, self._size = split, size
        what = json.dumps(["synthetic", synthetic.VERSION, split, len(self)])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()

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
    """The "train" or "test" images of `config`, with `.classes` and `.fingerprint`; opened once a process. Raises
    `UserError` or `UsageError` where the data can't be had, has no such split or column, or is empty."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    return _open(type(config), config.model_dump_json(exclude={"flip", "max_bad_fraction"}), split)


@lru_cache(maxsize=8)
def _open(schema: type, text: str, split: str) -> Split:
    config = schema(**json.loads(text))
    if config.source == "synthetic":
        return SyntheticImages(_choose(config, split, ["train", "test"])[0], config.image_size)
    files = tables.local_files(config.source)
    if files and files[0].endswith(".tar"):
        return _open_shards(config, split, tables.by_split(files))
    if files:
        return _open_table(config, split, tables.from_parquet(tables.by_split(files)))
    if files is None:
        return _open_table(config, split, tables.from_hub(config.source, config.subset))
    return _open_table(config, split, tables.from_class_folders(Path(config.source).expanduser()))


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
    chosen = _choose(config, split, list(found))
    table = found[chosen[0]]
    image, label = _columns(config, table.features)
    return _part(config, split, chosen, Rows(table, image, chosen[0]), *_labels(config, label, found, chosen[0]))


def _open_shards(config: DataConfig, split: str, files: dict[str, list[str]]) -> Images:
    name, _ = chosen = _choose(config, split, list(files))
    image, label = _fields(config, first_fields(files[name]), files[name][0])
    # The classes are those of all splits, unless they are named.
    wanted = files if label is not None and config.class_names is None else [name]
    found = {part: Shards(files[part], image, label) for part in wanted}
    classes, labels = ([], np.full(len(found[name]), -1)) if label is None else _shard_labels(config, found, name)
    return _part(config, split, chosen, found[name], classes, labels)


def _part(
    config: DataConfig, split: str, chosen: tuple[str, bool], encoded: Rows | Shards, classes: list, labels: np.ndarray
) -> Images:
    """The images that belong to "train" or "test": all, or a fixed random share where they share a split."""
    n, wrong = len(labels), np.flatnonzero((labels < -1) | (labels >= len(classes)))
    if len(wrong):
        place = f"label {labels[wrong[0]]} of {encoded.id(wrong[0])}"
        raise UserError(f"{config.source}: {place} is outside the classes 0..{len(classes) - 1}")
    rows, count = np.arange(n), round(n * config.holdout)
    if chosen[1]:
        if not 0 < count < n:
            raise UserError(f"{config.source}: of {n} images, data.holdout = {config.holdout} leaves none on one side")
        order = np.random.default_rng(0).permutation(n)
        rows = np.sort(order[:count] if split == "test" else order[count:])
    return Images(encoded, labels, classes, rows, chosen[0])


def _columns(config: DataConfig, features: datasets.Features) -> tuple[str, str | None]:
    """The columns of a table that hold the image and the label."""
    for key in ("image_column", "label_column"):
        name = getattr(config, key)
        if name is not None and name not in features:
            raise UsageError(f"{config.source} has no column data.{key} = {name!r}: it has {', '.join(features)}")
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name, kind in features.items() if _holds_bytes(kind)]
    if config.image_column is None and len(found) != 1:
        what = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise UsageError(f"{config.source} has {what}: set data.image_column to one of {', '.join(features)}")
    usual = {name: features[name] for name in LABEL_NAMES if name in features}
    labels = [name for name, kind in usual.items() if _is_int(kind) or _is_text(kind)]
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += typed if len(typed) == 1 else []
    return config.image_column or found[0], config.label_column or next(iter(labels), None)


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
    alike = {name: table for name, table in found.items() if table.features.get(column) == kind}
    values = {name: table.select_columns([column]).with_format("arrow")[:].column(0) for name, table in alike.items()}
    if _is_text(kind):
        names = sorted({text for texts in values.values() for text in texts.unique().to_pylist() if text is not None})
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
    return _named(config, names), labels


def _named(config: DataConfig, names: list[str]) -> list[str]:
    """`names` of classes, or those of the file that the config gives. Raises `UserError` where it can't be read."""
    if config.class_names is None:
        return list(names)
    try:
        lines = Path(config.class_names).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data.class_names = {config.class_names}: {error}") from None
    if not any(map(str.strip, lines)):
        raise UserError(f"data.class_names = {config.class_names} holds no names")
    return [line.strip() for line in lines if line.strip()]


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
        names = _named(config, [str(i) for i in range(top + 1)])
    else:
        names = _named(config, sorted(set(texts.values())))
        places = {name: i for i, name in enumerate(names)}
        for value in (value for value, text in texts.items() if text not in places):
            id = found[split].id(int(np.argmax(found[split].labels == value)))
            raise UserError(f"{config.source}: label {texts[value]!r} of {id} is none of those in data.class_names")
        ids = {value: places[text] for value, text in texts.items()}
    numbers = np.array([ids.get(value, -1) for value in values[split].tolist()], np.int64)
    return names, numbers[np.searchsorted(values[split], found[split].labels)]
