"""Which column or field holds the images and which the labels, and what classes the labels name.

Tables have columns (Hub, class folders, parquet); samples of shards have fields, or tell their class by name.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from nsvq.data.config import DataConfig
from nsvq.data.folders import classes_of_paths, is_image, split_of
from nsvq.data.label_tables import LABEL_NAMES, imagenet_synsets, names_of_synsets
from nsvq.data.shards import Fields, Shards, look
from nsvq.data.tables import Found
from nsvq.errors import UsageError, UserError

_MAX_CLASSES = 100_000
_MOST_FIELDS = 8  # that hold images, in a sample of a shard


def image_column(config: DataConfig, features: datasets.Features) -> str:
    """The column of images. Raises `UsageError` where it is none or several."""
    if config.image_column is not None:
        return _existing(config, "image_column", features)
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name, kind in features.items() if _holds_bytes(kind)]
    if len(found) != 1:
        what = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise UsageError(f"{config.source} has {what}: set data.image_column to one of {', '.join(features)}")
    return found[0]


def label_column(config: DataConfig, parts: dict[str, datasets.Dataset], name: str) -> str | None:
    """The column of labels of split `name`, None without one. Raises `UsageError` for one that is not there."""
    if config.label_column is not None:
        return _existing(config, "label_column", parts[name].features)
    features = {column: kind for table in [*parts.values(), parts[name]] for column, kind in table.features.items()}
    holds = {column.lower(): column for column, kind in features.items() if _is_number(kind) or _is_text(kind)}
    usual = [holds[name] for name in LABEL_NAMES if name in holds]
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


def _is_number(kind: Any) -> bool:
    number = r"u?int\d+|float\d+|bool"
    return isinstance(kind, datasets.ClassLabel) or re.fullmatch(number, getattr(kind, "dtype", "")) is not None


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


def table_labels(
    config: DataConfig, column: str | None, parts: dict, split: str, found: Found
) -> tuple[list[str], np.ndarray]:
    """Class names, alike for every split, and the labels [n] int64 of `split` (-1: none)."""
    if column is None:
        return [], np.full(len(parts[split]), -1)
    kinds = {name: table.features[column] for name, table in parts.items() if column in table.features}
    kind = kinds.get(split, next(iter(kinds.values())))
    values = {
        name: _values(config, column, parts[name].select_columns([column]).with_format("arrow")[:].column(0))
        for name in kinds
        if _is_text(kinds[name]) == _is_text(kind)
    }
    named = {name: kinds[name].names for name in values if isinstance(kinds[name], datasets.ClassLabel)}
    # Each split may number its own classes: then by their names.
    apart = len(named) == len(values) and len({tuple(names) for names in named.values()}) > 1
    apart = apart and all((values[name] < len(names)).all() for name, names in named.items())  # else told below
    if apart:
        values = {name: [named[name][i] if i >= 0 else None for i in part.tolist()] for name, part in values.items()}
    text = _is_text(kind)
    if text and config.class_names is None and all(_is_id(value) for part in values.values() for value in part):
        text = False
        values = {name: np.array([-1 if id is None else int(id) for id in part]) for name, part in values.items()}
    if text or apart:
        texts = sorted({text for part in values.values() for text in part if text is not None})
        known = texts if config.class_names is None else read_class_names(config.class_names)
        if unknown := sorted(set(texts) - set(known)):
            raise UserError(f"{config.source}: label {unknown[0]!r} is none of those in data.class_names")
        ids = {None: -1} | {text: i for i, text in enumerate(known)}
        values = {name: np.array([ids[text] for text in part], np.int64) for name, part in values.items()}
        names = names_of_synsets(known)
    else:
        top = max(int(part.max()) for part in values.values())
        if top >= _MAX_CLASSES:
            raise UserError(f"{config.source}: column {column!r} goes up to {top}: these are no class ids")
        is_bool = getattr(kind, "dtype", "") == "bool"
        names = ["false", "true"] if is_bool else [str(i) for i in range(top + 1)]
        names = _named(config, list(kind.names) if isinstance(kind, datasets.ClassLabel) else names, found)
    labels = values.get(split, np.full(len(parts[split]), -1))
    _check(config, names, labels, lambda row: f"{split}[{row}]")
    return names, labels


def _is_id(text: str | None) -> bool:
    return text is None or re.fullmatch(r"-?\d+", text) is not None


def _values(config: DataConfig, column: str, values: Any) -> Any:
    """A column of arrow as a list of texts, or as ids [n] int64 (-1: none)."""
    kind = str(values.type)
    if kind in ("string", "large_string"):
        return values.to_pylist()
    if not re.fullmatch(r"u?int\d+|float|double|bool", kind):
        raise UsageError(f"{config.source}: data.label_column = {column!r} holds {kind}, not class ids or names")
    numbers = np.array([-1 if value is None or value != value else value for value in values.to_pylist()], np.float64)
    if (numbers != numbers.round()).any():
        raise UsageError(f"{config.source}: {column!r} holds numbers that are no class ids: set data.label_column")
    return numbers.astype(np.int64)


def _check(config: DataConfig, names: list[str], labels: np.ndarray, id: Callable[[int], str]) -> None:
    wrong = np.flatnonzero((labels < -1) | (labels >= len(names)))
    if len(wrong):
        place = f"label {labels[wrong[0]]} of {id(wrong[0])}"
        raise UserError(f"{config.source}: {place} is outside the classes 0..{len(names) - 1}")


def shard_fields(config: DataConfig, files: dict[str, list[str]]) -> Fields:
    """Which fields of the samples hold the image and the label, seen in some samples of each split."""
    samples = [sample for shards in files.values() for sample in look(shards)]
    images = [{field for field in sample if is_image(f".{field}")} for sample in samples]
    dotted = {field for found in images for field in found if "." in field}
    # Fields such as left.jpg are few, and in all samples; what varies belongs to the names.
    varies = any(dotted - found for found in images) and all(len(found) <= 1 for found in images)
    last_dot = varies or len(dotted) > _MOST_FIELDS
    if last_dot:
        samples = [sample for shards in files.values() for sample in look(shards, last_dot=True)]
        images = [{field for field in sample if is_image(f".{field}")} for sample in samples]
    fields = list(dict.fromkeys(field for sample in samples for field in sample))
    shard, image, label = next(iter(files.values()))[0], config.image_column, config.label_column
    if image not in fields if image else not any(images) or any(len(found) > 1 for found in images):
        raise UsageError(f"{shard}: set data.image_column to the image's field, one of {', '.join(fields)}")
    records = [sample.get("json", {}) for sample in samples]
    inside = {key: f"json:{key}" for record in records for key in record if isinstance(record[key], int | str)}
    if label is not None:
        if label not in fields and label not in inside:
            raise UsageError(f"{shard} has no field data.label_column = {label!r}: it has {', '.join(fields)}")
        return Fields(image, label if label in fields else inside[label], last_dot)
    usual = [(name, f"{name}.txt") for name in LABEL_NAMES]
    plain = next((field for names in usual for field in fields if field.lower() in names), None)
    in_json = next((inside[key] for name in LABEL_NAMES for key in inside if key.lower() == name), None)
    return Fields(image, plain or in_json, last_dot)


def label_by_name(config: DataConfig, parts: dict[str, Shards], found: Found, has_labels: bool) -> bool:
    """Labels from the folders inside of the tars, or from the tars' names (n01440764.tar), where these tell classes and
    samples have none of their own. Raises `UserError` where the folders are splits."""
    folders, stems = ({part: read(shards) for part, shards in parts.items()} for read in (Shards.folders, Shards.stems))
    placed = classes_of_paths(sorted({f"{folder}/x" for inside in folders.values() for folder in inside if folder}))
    if len({split for split, _ in placed.values()}) > 1:
        raise UserError(f"{config.source}: the tars hold folders for splits: unpack them, and give the folder")
    if has_labels:
        return False
    classes = {path[:-2]: name for path, (_, name) in placed.items() if name}
    tars = {stem for inside in stems.values() for stem in inside}
    if len(set(classes.values())) > 1:
        names = {part: [classes.get(folder, "") for folder in inside] for part, inside in folders.items()}
        found.said.append("classes are the folders inside of the tars")
    elif len(tars) > 1 and all(re.fullmatch(r"n\d{8}|[A-Za-z_ -]+", stem) and not split_of(stem) for stem in tars):
        names = stems
        found.said.append("classes are the names of the tars")
    else:
        return False
    for part, shards in parts.items():
        shards.labels = np.array([name.encode() for name in names[part]], "S")
    return True


def shard_labels(
    config: DataConfig, found: dict[str, Shards], split: str, about: Found
) -> tuple[list[str], np.ndarray]:
    """Class names, alike for every split, and the labels [n] int64 of `split` (-1: none)."""
    values = {name: np.unique(shards.labels) for name, shards in found.items()}
    texts = {value: value.decode(errors="replace") for part in values.values() for value in part.tolist() if value}
    if all(map(_is_id, texts.values())):
        ids = {value: int(text) for value, text in texts.items()}
        top = max(ids.values(), default=-1)
        if top >= _MAX_CLASSES:
            raise UserError(f"{config.source}: labels go up to {top}: these are no class ids")
        names = _names_by_keys(found, ids) or [str(i) for i in range(top + 1)]
        names = _named(config, names, about)
    else:
        names = sorted(set(texts.values())) if config.class_names is None else read_class_names(config.class_names)
        places = {name: i for i, name in enumerate(names)}
        names = names_of_synsets(names)
        for value in (value for value, text in texts.items() if text not in places):
            id = found[split].id(int(np.argmax(found[split].labels == value)))
            raise UserError(f"{config.source}: label {texts[value]!r} of {id} is none of those in data.class_names")
        ids = {value: places[text] for value, text in texts.items()}
    numbers = np.array([ids.get(value, -1) for value in values[split].tolist()], np.int64)
    labels = numbers[np.searchsorted(values[split], found[split].labels)]
    _check(config, names, labels, found[split].id)
    return names, labels


def _names_by_keys(found: dict[str, Shards], ids: dict[bytes, int]) -> list[str]:
    """ImageNet's names of ids that all of ImageNet-1k's synsets have, as the samples' keys tell (timm's shards)."""
    synsets = imagenet_synsets()
    if len(ids.keys() - {b""}) != len(synsets):
        return []
    seen: dict[int, set[str]] = {}
    for shards in found.values():
        for key, label in zip(shards.keys.tolist(), shards.labels.tolist(), strict=True):
            if label and (synset := re.search(rb"n\d{8}", key)):
                seen.setdefault(ids[label], set()).add(synset[0].decode())
    return names_of_synsets(synsets) if [seen.get(i) for i in range(len(synsets))] == [{s} for s in synsets] else []


def read_class_names(path: str) -> list[str]:
    """Names, one a line. Raises `UserError` where the file can't be read or holds none."""
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
        if text.lstrip().startswith(("[", "{")):
            raise UserError(f"data.class_names = {path} is JSON: write one name a line, in label order")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data.class_names = {path}: {error}") from None
    if not names:
        raise UserError(f"data.class_names = {path} holds no names")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"data.class_names = {path} has {twice[0]!r} twice")
    return names


def _named(config: DataConfig, names: list[str], found: Found) -> list[str]:
    """`names`, or those of data.class_names; another number of them is said."""
    if config.class_names is None:
        return names
    given = read_class_names(config.class_names)
    if given != names and set(given) == set(names):
        what = f"data.class_names = {config.class_names} has the names of {config.source} in another order"
        raise UserError(f"{what}, and its classes have their numbers: bring the file into their order, or leave it out")
    if len(given) != len(names):
        found.said.append(f"data.class_names has {len(given)} names, and the data {len(names)} classes")
    return given
