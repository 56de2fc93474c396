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
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
from tqdm import tqdm

from nsvq.data.images import BadImage
from nsvq.data.tables import note
from nsvq.errors import UserError
from nsvq.files import atomic_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nsvq" / "shards"
_VERSION = 1  # of what an index holds
_ARRAYS = ("keys", "labels", "offsets", "sizes")
_THREADS = 16  # for disks and networks that are slow to answer
_MAX_LABEL = 1000  # bytes; what is longer is a caption or a record


class Shards:
    """The samples of tar shards, in order, undecoded. `labels`: the text of each label [N] (bytes; empty: none). Raises
    `UserError` where a shard can't be read, is damaged or cut off."""

    def __init__(self, shards: list[str], image_field: str, label_field: str | None):
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(partial(_index, image_field=image_field, label_field=label_field), shards)
            # Shown where it takes long: indexes of earlier runs are read at once.
            indexes = list(tqdm(found, "index of shards", len(shards), unit="shard", leave=False, delay=3))
        joined = (np.concatenate([index[name] for index in indexes]) for name in _ARRAYS)
        self._keys, self.labels, self._offsets, self._sizes = joined
        self._ends = np.cumsum([len(index["keys"]) for index in indexes])
        self._shards, self._image_field = shards, image_field

    def __len__(self) -> int:
        return len(self._keys)

    def id(self, row: int) -> str:
        """What names a sample: shard:key."""
        return f"{Path(self._shard(row)).name}:{self._keys[row].decode(errors='surrogateescape')}"

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded image of a sample, and its id. Raises `BadImage` where there is none, or it can't be read."""
        id, shard, size = self.id(row), self._shard(row), int(self._sizes[row])
        if size < 0:
            raise BadImage(id, f"no field {self._image_field}")
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


def first_fields(shards: list[str]) -> list[str]:
    """The fields of the first sample. Raises `UserError` where there is none, or the shard can't be read."""
    for shard in shards:
        for _, fields in _samples(shard):
            return list(fields)
    raise UserError(f"{shards[0]} and the other shards hold no samples")


def _index(shard: str, image_field: str, label_field: str | None) -> dict[str, np.ndarray]:
    """keys, labels (bytes [n]), offsets and sizes (int64 [n]; -1: no image) of a shard's samples, from the cache where
    it was indexed as it is now."""
    try:
        fs, path = fsspec.core.url_to_fs(shard)
        info = fs.info(path)
    except Exception as error:  # each file system of fsspec has its own
        raise UserError(f"cannot read the shard {shard}: {error}") from None
    state = {name: str(info.get(name)) for name in ("size", "mtime", "LastModified", "ETag")}
    what = [fs.unstrip_protocol(path), image_field, label_field]
    about = json.dumps([_VERSION, *what, state])
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    kept = CACHE / f"{name}.npz"
    try:
        with np.load(kept) as file:
            if str(file["about"]) == about:
                return {name: file[name] for name in _ARRAYS}
    except Exception:  # there is none yet, or it is damaged in one of many ways
        pass
    arrays = _scan(shard, image_field, label_field)
    try:
        # Ranks may index the same shard at once.
        with atomic_file(kept, shared=True) as part, open(part, "wb") as file:
            np.savez(file, about=np.array(about), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        note(f"the index of the shards is not kept in {CACHE} ({error.strerror}), and made again at each start")
    return arrays


def _scan(shard: str, image_field: str, label_field: str | None) -> dict[str, np.ndarray]:
    keys, labels, places = [], [], []
    for key, fields in _samples(shard, label_field):
        keys.append(key.encode(errors="surrogateescape"))
        labels.append(fields.get(label_field, b""))
        places.append(fields.get(image_field, (0, -1)))
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return dict(zip(_ARRAYS, (np.array(keys, "S"), np.array(labels, "S"), offsets, sizes), strict=True))


def _samples(shard: str, label_field: str | None = None) -> Iterator[tuple[str, dict]]:
    """(key, {field: (offset, size)}) of each sample, consecutive files of one key; of `label_field` the content."""
    key: str | None = None
    fields: dict[str, tuple[int, int] | bytes] = {}
    for tar, member in _members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, _, field = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key and fields:
            yield key, fields
            fields = {}
        key = this
        fields[field] = (member.offset_data, member.size)
        if field == label_field:
            if member.size > _MAX_LABEL:
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
