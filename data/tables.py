"""A source's splits as `datasets` tables: from parquet files, class folders or the Hub.

What this adds to `datasets`' imagefolder: class folders with names like "test" stay classes (there they are splits, and
the other classes are lost), and a listing that is some 40 times as fast.
"""

import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path

import datasets
import huggingface_hub
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from nsvq.data.images import BadImage
from nsvq.errors import UserError

_SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing", "eval"), "test")
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_HUB_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


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


def local_files(source: str) -> list[str] | None:
    """Parquet or tar files that `source` names, sorted; [] for a folder of images; None for a Hub id. Raises
    `UserError` where a path leads nowhere."""
    path = Path(source).expanduser()
    if path.is_dir():
        for suffix in (".parquet", ".tar"):
            if found := sorted(str(p) for pattern in ("*", "*/*") for p in path.glob(pattern + suffix)):
                return found
        return []
    if not source.endswith((".parquet", ".tar")):
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) and not has_magic(source):
            return None
        give = "give an existing folder, *.parquet or *.tar files, a Hugging Face data set id, or synthetic"
        raise UserError(f"data.source = {source}: there is no such folder ({give})")
    if "://" in source:
        if has_magic(source) and source.endswith(".tar"):
            how = "give remote shards by a brace range, as in train-{000..099}.tar"
            raise UserError(f"data.source = {source}: {how}")
        return expand_braces(source)
    patterns = expand_braces(str(path))
    found = sorted({f for p in patterns for f in ([p] if os.path.isfile(p) else glob(p, recursive=True) or [p])})
    if missing := [f for f in found if not os.path.isfile(f)]:
        raise UserError(f"data.source = {source}: there is no file {missing[0]}")
    return found


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` -> a00.tar a01.tar a02.tar; `{train,val}.tar` -> train.tar val.tar."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    parts = found[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        low, high = span.groups()
        parts = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    return [tail for part in parts for tail in expand_braces(pattern[: found.start()] + part + pattern[found.end() :])]


def by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the split that their name or folder, below the one they share, tells: train-0.parquet, val/0.tar.

    Files that tell none are "train"."""
    splits: dict[str, list[str]] = {}
    folder = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(map(os.path.dirname, files))
    for file in files:
        words = re.split(r"[^a-z]+", file[len(folder) :].lower())
        splits.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), "train"), []).append(file)
    return splits


def from_parquet(files: dict[str, list[str]]) -> dict[str, datasets.Dataset]:
    """One table a split. Raises `UserError` where a file is damaged or the files have different columns."""
    try:
        return dict(datasets.load_dataset("parquet", data_files=files))
    except (DatasetsError, OSError, ValueError) as error:
        first = next(iter(files.values()))[0]
        raise UserError(f"cannot read {first} and the files beside it: {_line(error.__cause__ or error)}") from None


def from_class_folders(root: Path) -> dict[str, datasets.Dataset]:
    """root/class/**/image or root/split/class/**/image; a folder without class folders holds images without labels.

    Class ids follow the sorted names over all splits. Raises `UserError` where there is no image."""
    folders = _subfolders(root)
    splits = {_SPLITS[name.lower()]: root / name for name in folders if name.lower() in _SPLITS}
    if not splits or not (len(splits) == len(folders) or any(map(_subfolders, splits.values()))):
        splits = {"train": root}  # "test" and "dev" may be classes
    classes = sorted({name for folder in splits.values() for name in _subfolders(folder)})
    label_kind = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(decode=False), label=label_kind)
    tables = {}
    for split, folder in splits.items():
        labels = {name: classes.index(name) for name in _subfolders(folder)}
        loose = _images(folder.glob("*"))
        if labels and loose:
            note(f"{folder} has class folders: the {len(loose)} images beside them are left out")
        rows = [(path, label) for name, label in labels.items() for path in _images((folder / name).rglob("*"))]
        rows = rows if labels else [(path, -1) for path in loose]
        columns = {"image": [{"path": path, "bytes": None} for path, _ in rows], "label": [label for _, label in rows]}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    if not any(map(len, tables.values())):
        raise UserError(f"{root} holds no images in class folders, no *.parquet and no *.tar files")
    return tables


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(paths) -> list[str]:
    return sorted(str(path) for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def from_hub(id: str, subset: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a Hub data set, from the cache where the Hub is out of reach (known within seconds). Raises
    `UserError` where it is gated, absent, or neither reachable nor cached, with what to do about it."""
    how = "give a local copy with --data.source PATH (or use --data.source synthetic)"
    page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{id}"
    terms = f"accept its terms on {page} if it has any (ILSVRC/imagenet-1k does)"
    access = f"{terms}, log in with `hf auth login`, or {how}"
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Out of reach, the library would retry for a long time before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = offline or not _hub_answers()
        return dict(datasets.load_dataset(id, subset))
    except DatasetNotFoundError:
        raise UserError(f"{id} is no folder here, and no data set on the Hub that you may read: {access}") from None
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # What is of the library's own kind was found, but with no files that it reads.
        if isinstance(error, ConnectionError | FileNotFoundError) and not isinstance(error, DatasetsError):
            absent = "there is no such folder, no cached copy, and the Hugging Face Hub is out of reach"
            raise UserError(f"data set {id}: {absent}; with a network, {access}") from None
        raise UserError(f"cannot load the data set {id}: {_line(error)}; or {how}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError as error:  # with wrong certificates it answers; the library may know others
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
