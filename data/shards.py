"""Webdataset shards: tar files in which a sample is the files that share a name up to its first dot.

The members of a shard are listed once, which reads headers and labels only. The index is kept in the user's cache
folder: that one can be written where data lie on a read-only disk or behind a URL. From then on images are read by
seek. A remote shard, of a URL that fsspec opens and seeks in, is fetched about once as a whole for its index.

What this adds to `datasets`' webdataset reader: random access without a copy of the data in Arrow files. What it adds
to webdataset's own random access (wids): the index is kept, lengths and classes are found, and a remote shard is not
copied to read an image of it.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from tqdm import tqdm

from nsvq.data.folders import is_hidden, is_image
from nsvq.data.images import BadImage
from nsvq.data.tables import note
from nsvq.errors import UserError
from nsvq.files import atomic_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nsvq" / "shards"
_VERSION = 2  # of what an index holds
_ARRAYS = ("keys", "labels", "offsets", "sizes", "members")
_THREADS = 16  # for disks and networks that are slow to answer
_MAX_LABEL = 1000  # bytes; what is longer is a caption or a record
_LOOKED_AT = 100  # samples of a shard, to see what fields there are


@dataclass(frozen=True)
class Fields:
    """Where a sample's image and label are. `image`: a field; None: the one with an image's suffix. `label`: a field,
    or field:key of a JSON record. `last_dot`: names are cut at their last dot, for names that have dots of their own.
    """

    image: str | None = None
    label: str | None = None
    last_dot: bool = False


class Shards:
    """The samples of tar shards, in order, undecoded. `labels`: the text of each label [N] (bytes; empty: none).
    `members`: files in the shards, and hidden ones among them.

    Raises `UserError` where a shard can't be read, is damaged or cut off.
    """

    def __init__(self, shards: list[str], fields: Fields):
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(partial(_index, fields=fields), shards)
            # Shown where it takes long: indexes of earlier runs are read at once.
            indexes = list(tqdm(found, "index of shards", len(shards), unit="shard", leave=False, delay=3))
        arrays = (np.concatenate([index[name] for index in indexes]) for name in _ARRAYS)
        self.keys, self.labels, self._offsets, self._sizes, members = arrays
        self.members = members.reshape(-1, 2).sum(0)
        self._ends = np.cumsum([len(index["keys"]) for index in indexes])
        self._shards = shards

    def __len__(self) -> int:
        return len(self.keys)

    def id(self, row: int) -> str:
        """What names a sample: shard:key."""
        return f"{Path(self._shard(row)).name}:{self.keys[row].decode(errors='surrogateescape')}"

    def folders(self) -> list[str]:
        """The folder of each sample inside of its shard [N]; empty: none."""
        return [key.decode(errors="replace").rpartition("/")[0] for key in self.keys.tolist()]

    def stems(self) -> list[str]:
        """The name of each sample's shard, without folder and suffix [N]."""
        return np.repeat([Path(s).stem for s in self._shards], np.diff(self._ends, prepend=0)).tolist()

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of these images (-1: no image)."""
        return self._sizes[rows]

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded image of a sample, and its id. Raises `BadImage` where there is none, or it can't be read."""
        id, shard, size = self.id(row), self._shard(row), int(self._sizes[row])
        if size < 0:
            raise BadImage(id, "the sample has no image")
        try:
            # Without fsspec's cache, which would read far ahead.
            with _open(shard, cache_type="none") as file:
                file.seek(int(self._offsets[row]))
                data = file.read(size)
        except Exception as error:  # each file system of fsspec has its own
            raise BadImage(id, f"{shard} cannot be read: {error}") from None
        if len(data) < size:
            raise BadImage(id, f"{shard} has become shorter")
        return data, id

    def _shard(self, row: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, row, "right"))]


def look(shards: list[str], last_dot: bool = False) -> list[dict[str, Any]]:
    """The fields of some samples of the first shard that has any: of "json" the record, of others anything. Raises
    `UserError` where there is none, or the shard can't be read."""
    for shard in shards:
        samples = [fields for _, fields in islice(_samples(shard, "json", last_dot), _LOOKED_AT)]
        if samples and all(field == "tar" for sample in samples for field in sample):
            how = _UNPACK.format(shard)
            raise UserError(f"{shard} is a tar of tars: unpack it with `{how}`, and give the folder of class folders")
        if samples:
            return [{k: _record(v) if k == "json" else v for k, v in sample.items()} for sample in samples]
    raise UserError(f"{shards[0]} and the other shards hold no samples")


_UNPACK = "tar -xf {} && for t in *.tar; do mkdir ${{t%.tar}} && tar -xf $t -C ${{t%.tar}} && rm $t; done"


def _record(content: object) -> dict:
    try:
        value = json.loads(content) if isinstance(content, bytes) else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _index(shard: str, fields: Fields) -> dict[str, np.ndarray]:
    """keys, labels (bytes [n]), offsets and sizes (int64 [n]; -1: no image) of a shard's samples, from the cache where
    it was indexed as it is now."""
    try:
        fs, path = fsspec.core.url_to_fs(shard)
        info = fs.info(path)
    except Exception as error:  # each file system of fsspec has its own
        raise UserError(f"cannot read the shard {shard}: {error}") from None
    state = {name: str(info.get(name)) for name in ("size", "mtime", "LastModified", "ETag")}
    what = [fs.unstrip_protocol(path), *astuple(fields)]
    about = json.dumps([_VERSION, *what, state])
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    kept = CACHE / f"{name}.npz"
    try:
        with np.load(kept) as file:
            if str(file["about"]) == about:
                return {name: file[name] for name in _ARRAYS}
    except Exception:  # there is none yet, or it is damaged in one of many ways
        pass
    arrays = _scan(shard, fields)
    try:
        # Ranks may index the same shard at once.
        with atomic_file(kept, shared=True) as part, open(part, "wb") as file:
            np.savez(file, about=np.array(about), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        note(f"the index of the shards is not kept in {CACHE} ({error.strerror}), and made again at each start")
    return arrays


def _scan(shard: str, wanted: Fields) -> dict[str, np.ndarray]:
    keys, labels, places = [], [], []
    members = np.zeros(2, np.int64)
    label_field, _, label_key = (wanted.label or "").partition(":")
    for key, fields in _samples(shard, label_field, wanted.last_dot, members):
        images = [wanted.image] if wanted.image else [name for name in fields if is_image(f".{name}")]
        if len(images) > 1:
            raise UserError(f"{shard}: {key} has the images {', '.join(images)}: set data.image_column to one of them")
        label = fields.get(label_field, b"")
        if label_key:
            value = _record(label).get(label_key)
            label = b"" if value is None else str(value).encode()
        keys.append(key.encode(errors="surrogateescape"))
        labels.append(label)
        places.append(fields.get(images[0], (0, -1)) if images else (0, -1))
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return dict(zip(_ARRAYS, (np.array(keys, "S"), np.array(labels, "S"), offsets, sizes, members), strict=True))


def _samples(
    shard: str, read: str | None = None, last_dot: bool = False, members: np.ndarray | None = None
) -> Iterator[tuple[str, dict]]:
    """(key, {field: (offset, size)}) of each sample, consecutive files of one key; of the field `read` the content.
    `members` [2] counts files and hidden ones."""
    key: str | None = None
    fields: dict[str, tuple[int, int] | bytes] = {}
    counts = np.zeros(2, np.int64) if members is None else members
    for tar, member in _members(shard):
        hidden = is_hidden(member.name)  # as in a tar made on macOS
        counts += (1, hidden)
        if hidden:
            continue
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        stem, _, field = base.rpartition(".") if last_dot and "." in base else base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key and fields:
            yield key, fields
            fields = {}
        key = this
        fields[field] = (member.offset_data, member.size)
        if field == read:
            if field != "json" and member.size > _MAX_LABEL:
                raise UserError(f"{shard}: {member.name} is no class label, for it has {member.size} bytes")
            fields[field] = tar.extractfile(member).read().strip()
    if fields:
        yield key, fields


def _members(shard: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from ((tar, member) for member in tar if member.isfile())
            # To tarfile a damaged header is the end; the true end is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"the shard {shard} is damaged or cut off at byte {tar.offset}: fetch it again")
    except UserError:
        raise
    except Exception as error:  # of tarfile, or of one of many file systems
        raise UserError(f"cannot read the shard {shard}: {error}") from None


def _open(shard: str, **how):
    fs, path = fsspec.core.url_to_fs(shard)  # anew, because a file system of another process does not work in this one
    return fs.open(path, "rb", **how)
