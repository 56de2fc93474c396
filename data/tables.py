"""A source's splits as `datasets` tables: from parquet files, folders of images, saved data sets or the Hub.

What this adds to `datasets`' imagefolder: class folders with names like "test" stay classes (there they are splits, and
the other classes are lost), layouts and tables of labels as sets are downloaded, and a listing that is some 40 times as
fast. What a tree of files is understood as is in data/folders.py.
"""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from nsvq.data.folders import ARCHIVES, files_below, is_hidden, is_image, read_tree, split_of
from nsvq.data.hub import hub_answers
from nsvq.data.images import BadImage
from nsvq.data.label_tables import add_labels, names_of_synsets
from nsvq.errors import UsageError, UserError

_SAVED = ("dataset_dict.json", "state.json")  # of a folder that `save_to_disk` wrote


@lru_cache(maxsize=64)
def note(text: str) -> None:
    """A line on stderr, once, from the first process of the run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


class Rows:
    """The rows of a table: a column of encoded images, or of the paths of such."""

    def __init__(self, table: datasets.Dataset, column: str, name: str):
        self._table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column, self._name = column, name

    def id(self, row: int) -> str:
        """What names a row: split[row]."""
        return f"{self._name}[{row}]"

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of these images (-1: no image), without a look at them."""
        values = self._table.with_format("arrow")[:].column(self._column)
        lengths = pc.binary_length(pc.struct_field(values, "bytes")).fill_null(0)
        sizes = lengths.to_numpy()[rows].astype(np.int64)
        files = np.flatnonzero(sizes == 0)
        sizes[files] = [self._size(path.as_py()) for path in pc.struct_field(values, "path").take(rows[files])]
        return sizes

    @staticmethod
    def _size(path: str | None) -> int:
        try:
            return os.path.getsize(path)
        except (OSError, TypeError):
            return -1

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded image of a row, and its id, with its path where it has one. Raises `BadImage` without it."""
        value = self._table[row][self._column] or {}
        path, id = value.get("path"), self.id(row)
        id = f"{id} ({path})" if path else id
        if value.get("bytes"):
            return value["bytes"], id
        try:
            return Path(path).read_bytes(), id
        except (OSError, TypeError):
            raise BadImage(id, "no bytes") from None


@dataclass
class Found:
    """What a source turns out to be. `kind`: "hub", "saved", "folders", "parquet", "tar" or "synthetic"; `files`: of a
    folder all of them, relative to it, else the parquet files or tars; `splits`: the images of each (samples of tars).
    `skipped` and `said` as in `folders.Tree`."""

    kind: str
    files: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def copy(self) -> "Found":
        """To which one split can add what it skips and says."""
        return replace(self, skipped=Counter(self.skipped), said=[*self.said])


def find(source: str) -> Found:
    """Raises `UserError` where a path leads nowhere, and `UsageError` where it is one that has to be unpacked."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _find_in(path)
    if source.startswith("pipe:"):
        raise UsageError(f"data.source = {source}: a command cannot be read at any place; give the URL itself")
    if not source.endswith((".parquet", ".tar")):
        if path.is_file() or source.lower().endswith(ARCHIVES):
            what = "unpack it and give the folder" if source.lower().endswith(ARCHIVES) else "give its folder"
            raise UsageError(f"data.source = {source}: this file cannot be read as it is; {what}")
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) and not has_magic(source):
            return Found("hub")
        raise UserError(
            f"data.source = {source}: there is no such folder (give an existing folder, *.parquet or *.tar files, "
            "a Hugging Face data set id, or synthetic)"
        )
    kind = "tar" if source.endswith(".tar") else "parquet"
    if "://" in source:
        if has_magic(source) and kind == "tar":
            raise UserError(
                f"data.source = {source}: give remote shards by a brace range, as in train-{{000..099}}.tar"
            )
        return Found(kind, expand_braces(source))
    patterns = expand_braces(str(path))
    found = sorted({f for p in patterns for f in ([p] if os.path.isfile(p) else glob(p, recursive=True) or [p])})
    if missing := [f for f in found if not os.path.isfile(f)]:
        raise UserError(f"data.source = {source}: there is no file {missing[0]}")
    return Found(kind, found)


def _find_in(root: Path) -> Found:
    files = list(files_below(root))
    if any(name in files for name in _SAVED):
        return Found("saved", files)
    seen = [path for path in files if not is_hidden(path)]
    unpacked = any("/" in path and is_image(path) for path in seen)  # tars beside them are what they were unpacked from
    for kind in ("parquet", "tar"):
        found = [path for path in seen if path.endswith(f".{kind}") and not path.endswith("metadata.parquet")]
        if not found or (unpacked and not (kind == "parquet" and any(_holds_images(root / path) for path in found))):
            continue
        left = Counter({f"beside the {kind} files": len(files) - len(found)})
        images = sum(map(is_image, seen))
        said = [f"{root} holds {kind} files: the {images} images beside them are left out"] if images else []
        return Found(kind, [str(root / path) for path in found], skipped=left, said=said)
    return Found("folders", files)


def _holds_images(path: Path) -> bool:
    """Whether a parquet file has a column of bytes, or of records with bytes, as pictures are kept."""
    try:
        kinds = pq.read_schema(path).types
    except (OSError, ValueError):
        return False
    records = [kind for kind in kinds if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    kinds += [kind.field("bytes").type for kind in records]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds)


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` -> a00.tar a01.tar a02.tar; `{train,val}.tar` -> train.tar val.tar."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        low, high = span.groups()
        parts = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    else:
        parts = found[1].split(",")
    return [tail for part in parts for tail in expand_braces(pattern[: found.start()] + part + pattern[found.end() :])]


def by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the split that their name or folder, below the one they share, tells: train-0.parquet, val/0.tar.

    Files that tell none are "train".
    """
    splits: dict[str, list[str]] = {}
    folder = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(map(os.path.dirname, files))
    for file in files:
        splits.setdefault(split_of(file[len(folder) :]) or "train", []).append(file)
    return splits


def from_parquet(files: dict[str, list[str]]) -> dict[str, datasets.Dataset]:
    """One table a split. Raises `UserError` where a file is damaged, the files have different columns, or splits number
    their classes differently: all would get the names of one."""
    try:
        named = {split: _class_names(paths[0]) for split, paths in files.items()}
        first = next(iter(named))
        for split, names in named.items():
            if apart := [column for column in names if named[first].get(column, names[column]) != names[column]]:
                what = f"{files[first][0]} and {files[split][0]} name the classes of {apart[0]!r} differently"
                raise UserError(f"{what}: write them with the same ClassLabel")
        return dict(datasets.load_dataset("parquet", data_files=files))
    except (DatasetsError, OSError, ValueError) as error:
        first = next(iter(files.values()))[0]
        raise UserError(f"cannot read {first} and the files beside it: {_line(error.__cause__ or error)}") from None


def _class_names(path: str) -> dict[str, list[str]]:
    """The names that a parquet file of `datasets` has for its columns of classes."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(path))
    return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def from_saved(root: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder that `save_to_disk` of `datasets` wrote. Raises `UserError` where it is damaged."""
    try:
        found = datasets.load_from_disk(str(root))
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the saved data set {root}: {_line(error)}") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def from_folders(root: Path, found: Found) -> dict[str, datasets.Dataset]:
    """root/class/**/image or root/split/class/**/image, as data/folders.py understands them; what that leaves out and
    says goes to `found`. A class of -1 is none.

    Class ids follow the sorted names over all splits, and synsets have their names. Raises `UserError` where there is
    no image.
    """
    tree = read_tree(root, found.files)
    add_labels(root, tree)
    found.skipped, found.said = tree.skipped, tree.said
    if not any(tree.splits.values()):
        packed = [path for path in found.files if path.lower().endswith(ARCHIVES)]
        advice = f": unpack {packed[0]} and the other archives" if packed else ""
        raise UserError(f"{root} holds no images in class folders, no *.parquet and no *.tar files{advice}")
    labels = [label for rows in tree.splits.values() for _, label in rows]
    names = sorted({label for label in labels if isinstance(label, str)})
    top = max((label for label in labels if isinstance(label, int)), default=-1)
    if names and top >= len(names):
        raise UserError(f"{root}: a table gives class {top}, but there are {len(names)} class folders")
    ids = {name: i for i, name in enumerate(names)} | {None: -1}
    kind = datasets.ClassLabel(names=names_of_synsets(names, root)) if names else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(decode=False), label=kind)
    tables = {}
    for split, rows in tree.splits.items():
        image = [{"path": str(root / path), "bytes": None} for path, _ in rows]
        label = [label if isinstance(label, int) else ids[label] for _, label in rows]
        tables[split] = datasets.Dataset.from_dict({"image": image, "label": label}, features=features)
    return tables


def from_hub(id: str, subset: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a Hub data set, from the cache where the Hub is out of reach (known within seconds).

    Raises `UserError` where it is gated, absent, or neither reachable nor cached, with what to do about it.
    """
    how = "give a local copy with --data.source PATH (or use --data.source synthetic)"
    page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{id}"
    access = (
        f"accept its terms on {page} if it has any (ILSVRC/imagenet-1k does), log in with `hf auth login`, or {how}"
    )
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Out of reach, the library would retry for a long time before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = offline or not hub_answers()
        return dict(datasets.load_dataset(id, subset))
    except DatasetNotFoundError:
        raise UserError(f"{id} is no folder here, and no data set on the Hub that you may read: {access}") from None
    except (ConnectionError, FileNotFoundError) as error:
        if isinstance(error, DatasetsError):  # found, but with no files that the library reads
            raise UserError(f"cannot load the data set {id}: {_line(error)}; or {how}") from None
        raise UserError(
            f"data set {id}: there is no such folder, no cached copy, and the Hugging Face Hub is out of reach; "
            f"with a network, {access}"
        ) from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the data set {id}: {_line(error)}; or {how}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
