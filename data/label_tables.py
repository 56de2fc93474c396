"""Classes that stand in tables beside the images, and the names of ImageNet's classes.

Read are StyleGAN's dataset.json, the metadata.csv, .jsonl and .parquet of `datasets`, ImageNet's LOC_val_solution.csv,
its annotations in XML and its devkit's ground truth, the val_annotations.txt of Tiny ImageNet, Kaggle's labels.csv,
lists of "file class" lines, and what else has a column of the images' names and one of classes.
"""

import csv
import json
import os
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath

import datasets
import scipy.io
from datasets.exceptions import DatasetsError

from nsvq.data.folders import Tree, split_of

# The names of a column, a field or a key that holds classes, in this order, whatever their case.
_RARE_NAMES = ("category_id", "label_id", "fine_label", "class_name", "label_name", "wnid", "synset")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "target", "targets", "category", *_RARE_NAMES)
_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_FILE_NAMES = ("file_name", "filename", "file", "image", "image_id", "imageid", "id", "path", "img", "name")
_NO_TABLE = re.compile("submission|readme|license|words|wnids|synset|classes|requirements", re.IGNORECASE)
_KAGGLE = "LOC_val_solution.csv"  # lies up to three folders above the images
_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"  # lies beside meta.mat, which says what its numbers are
_XML = "Annotations/CLS-LOC/val"  # a file for each image
_LARGEST_TABLE = 2**28  # bytes
_WNID = re.compile(r"n\d{8}")


def add_labels(root: Path, tree: Tree) -> None:
    """Give the images of `tree` their classes from tables beside them: those of a split without class folders; what
    dataset.json and metadata.* say goes before folders."""
    others = tree.others
    tables = [path for path in others if path.endswith(_TABLES) and not _NO_TABLE.search(path.rpartition("/")[2])]
    tables += [path for path in others if path.rpartition("/")[2] == "metadata.parquet"]
    tables += sorted({path.rpartition("/")[0] for path in others if path.rpartition("/")[0].endswith(_XML)})
    above = [f"{'../' * k}{_KAGGLE}" for k in (1, 2, 3) if (root / ("../" * k) / _KAGGLE).is_file()]
    known = {name for rows in tree.splits.values() for _, name in rows if name}
    used = set()
    for split, rows in tree.splits.items():
        flat = all(name is None for _, name in rows)
        ranked = sorted(tables + above, key=lambda table: (not _sure(table), split_of(table) != split, table))
        for table in ranked if rows else ():
            folder, _, name = table.rpartition("/")
            if any(split_of(part) not in (None, split) for part in (folder, name)) or not (flat or _sure(table)):
                continue
            found = _labels_in(root, table, [path for path, _ in rows], known)
            if found is None:
                continue
            missing = sum(label is None for label in found)
            tree.splits[split] = [(path, label) for (path, _), label in zip(rows, found, strict=True)]
            what = f"no classes, says {table}" if missing == len(rows) else f"classes are those in {table}"
            rest = f"; {missing} images are not in it" if 0 < missing < len(rows) else ""
            tree.said.append(f"{split}: {what}{rest}")
            used.add(table)
            break
    tree.skipped["tables of labels"] += len(used & set(others))
    tree.skipped["no images"] -= len(used & set(others))


def _sure(table: str) -> bool:
    name = table.rpartition("/")[2]
    return name in ("dataset.json", "metadata.csv", "metadata.jsonl", "metadata.parquet", _KAGGLE)


def _labels_in(root: Path, table: str, images: list[str], known: set) -> list[str | int | None] | None:
    """The class of each image in a table of file names and classes, some of them `known`; None where it is no such
    table, or is about less than half of the images."""
    try:
        if (root / table).stat().st_size > _LARGEST_TABLE:
            return None
        records = _records(root / table)
    except (OSError, ValueError, KeyError, csv.Error, DatasetsError, RecursionError):
        return None
    if records is None:  # StyleGAN's dataset.json, which says that there are no classes
        return [None] * len(images)
    width = Counter(map(len, records)).most_common(1)[0][0] if records else 0
    records = [row for row in records if len(row) == width]
    names: dict[str, int] = {}
    paths = {os.path.relpath(path, os.path.dirname(table) or "."): i for i, path in enumerate(images)}
    if any(_whole(cell) in paths for row in records for cell in row):
        names = paths  # a table of several splits may have a file name in each
    else:
        for i, path in enumerate(images):
            for name in (path.rpartition("/")[2], PurePosixPath(path).stem):
                names.setdefault(name, i)
    if width < 2 or not (places := _columns(records, names)):
        return None
    file, label, named = places
    named |= table.endswith("dataset.json")
    values = {_plain(row[label]) for row in records}
    if not (named or values <= known or len(values) <= max(2, len(records) // 2)):
        return None  # captions or numbers
    found: list[str | int | None] = [None] * len(images)
    for row in records:
        if (i := _find(names, row[file])) is not None:
            found[i] = _plain(row[label])
    if 2 * sum(label is not None for label in found) < len(images):
        return None
    if set(found) - {None} <= known:  # the folders' names, be they numbers
        return found
    if all(label is None or re.fullmatch(r"\d+", str(label)) for label in found):
        return [None if label is None else int(label) for label in found]
    return found


def _records(path: Path) -> list[list] | None:
    """Rows of cells; a first row may hold names. None for a `dataset.json` without labels."""
    if path.is_dir():
        found = [(file.stem, re.search(r"<name>(n\d{8})</name>", file.read_text())) for file in path.glob("*.xml")]
        return [[stem, synset[1]] for stem, synset in found if synset]
    if path.name == _DEVKIT:  # line i is the number of the class of image i
        synsets = scipy.io.loadmat(path.with_name("meta.mat"), squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = enumerate(path.read_text().split(), 1)
        return [[f"ILSVRC2012_val_{i:08}", wnids[int(number)]] for i, number in numbers]
    if path.suffix == ".parquet":
        table = datasets.Dataset.from_parquet(str(path))
        return [table.column_names, *(list(row.values()) for row in table)]
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text("utf-8-sig")
        lines = [text] if path.suffix == ".json" else text.splitlines()
        values = [json.loads(line) for line in lines if line.strip()]
        value = values[0] if path.suffix == ".json" and values else values
        if isinstance(value, dict) and "labels" in value and value["labels"] is None:
            return None
        value = value.get("labels", value) if isinstance(value, dict) else value
        if isinstance(value, dict):
            value = [list(item) for item in value.items()]
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return [list(value[0]), *([row.get(name) for name in value[0]] for row in value)]
        return [row for row in value if isinstance(row, list)] if isinstance(value, list) else []
    with open(path, newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        if path.suffix == ".txt" and "\t" not in first:
            return [line.rsplit(None, 1) for line in file]
        return [row for row in csv.reader(file, delimiter=next((d for d in "\t;," if d in first), ",")) if row]


def _columns(records: list[list], names: dict[str, int]) -> tuple[int, int, bool] | None:
    """Where the file names are, and where the classes, and whether that column's name says so."""
    width = len(records[0])
    files = [k for k in range(width) if any(_find(names, row[k]) is not None for row in records)]
    if not files:
        return None
    first = [str(cell).strip().lower() for cell in records[0]]
    header = first if all(_find(names, cell) is None for cell in records[0]) else []
    file = next((k for name in _FILE_NAMES for k in files if header and header[k] == name), files[0])
    for name in (*LABEL_NAMES, "predictionstring"):
        if name in header:
            return file, header.index(name), True
    if header and width > 2:
        return None
    return file, file + 1 if file + 1 < width else file - 1, False


def _whole(cell: object) -> str:
    return str(cell).strip().replace("\\", "/").removeprefix("./")


def _find(names: dict[str, int], cell: object) -> int | None:
    text = _whole(cell)
    return next((names[name] for name in (text, text.rpartition("/")[2]) if name in names), None)


def _plain(cell: object) -> str | None:
    """A cell as a class: of an annotation with boxes the synset alone."""
    text = "" if cell is None else str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()
    synset = _WNID.match(text)
    return synset[0] if synset else text or None


@lru_cache(maxsize=1)
def _imagenet() -> dict[str, str]:
    """synset -> names of ImageNet-1k, in the order of its labels, as its own LOC_synset_mapping.txt has them."""
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def imagenet_synsets() -> list[str]:
    """ImageNet-1k's synsets in the order of its labels, which is that of their names."""
    return list(_imagenet())


def imagenet_names() -> list[str]:
    """The names of ImageNet-1k's classes in the order of its labels."""
    return names_of_synsets(imagenet_synsets())


def names_of_synsets(classes: list[str], root: Path | None = None) -> list[str]:
    """The names of classes that are WordNet synsets (n02099601): ImageNet-1k's, or those in a words.txt or
    LOC_synset_mapping.txt in `root`; others stay as they are."""
    if not classes or not all(_WNID.fullmatch(name) for name in classes):
        return classes
    known = dict(_imagenet())
    for file in ("words.txt", "LOC_synset_mapping.txt") if root else ():
        path = Path(root) / file
        if path.is_file() and not known.keys() >= set(classes):
            lines = path.read_text("utf-8-sig", errors="replace").splitlines()
            pairs = (line.split(None, 1) for line in lines)
            known = {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2} | known
    names = [known.get(name, name) for name in classes]
    return names if len(set(names)) == len(names) else classes
