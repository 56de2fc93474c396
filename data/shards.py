"""Webdataset shards: tar files in which a sample is the files that share a name up to its first dot.

Local shards are read header by header, and an image only when it is wanted: skipping costs no image. Remote ones
(URLs that fsspec can open and seek in) are read from front to back.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from zlib import crc32

import fsspec
import numpy as np
from PIL import Image

from nsvq.data.images import BadImage, decode
from nsvq.errors import UsageError, UserError

LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
_IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")


@dataclass
class Sample:
    """An undecoded sample: where its image lies in a local shard, or the bytes of it, and the text of its label."""

    key: str
    shard: str
    image: tuple[int, int] | bytes | None  # (offset, size)
    label: str | None


class Stream:
    """Shards read in order. `classes`: names in label order, [] without labels. `fingerprint`: names shards and part.

    Raises `UserError` where the first shard is no readable tar, or which field holds the image is not clear.
    """

    def __init__(
        self,
        shards: list[str],
        every_shard: list[str],
        image_field: str | None,
        label_field: str | None,
        names: list[str] | None,
        part: tuple[str, float] | None,
    ):
        self.shards, self._every_shard, self._names, self._part = shards, every_shard, names, part
        fields = self._first_fields()
        images = [image_field] if image_field else [field for field in fields if field.lower() in _IMAGE_FIELDS]
        if len(images) != 1 or images[0] not in fields:
            raise UsageError(f"{shards[0]}: set data.image_column to the image's field, one of {', '.join(fields)}")
        if label_field is not None and label_field not in fields:
            raise UsageError(
                f"{shards[0]} has no field data.label_column = {label_field!r}: it has {', '.join(fields)}"
            )
        self._image_field = images[0]
        usual = [f"{name}{suffix}" for name in LABEL_NAMES for suffix in ("", ".txt")]
        self._label_field = label_field or next((field for field in usual if field in fields), None)
        sizes = [Path(shard).stat().st_size if _is_local(shard) else -1 for shard in shards]
        text = repr((part, [(Path(shard).name, size) for shard, size in zip(shards, sizes, strict=True)]))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def _first_fields(self) -> list[str]:
        for shard in self.shards:
            for _, fields in _groups(shard):
                return list(fields)
        raise UserError(f"{self.shards[0]} and the other shards hold no samples")

    @cached_property
    def classes(self) -> list[str]:
        """From data.class_names; else from one pass over the labels of all local shards, which reads no image."""
        if self._names is not None:
            return self._names
        if self._label_field is None:
            return []
        if not all(map(_is_local, self._every_shard)):
            raise UserError("the classes of remote shards are not known: give their names with --data.class_names FILE")
        found = {s.label for shard in self._every_shard for s in self._samples(shard) if s.label is not None}
        if all(re.fullmatch(r"\d+", label) for label in found):
            return [str(i) for i in range(max(map(int, found)) + 1)]
        return sorted(found)

    def samples(self, shard: str) -> Iterator[Sample]:
        """The samples of one shard that belong to this part, in order. Raises `UserError` where it is damaged."""
        for sample in self._samples(shard):
            if self._part is None:
                yield sample
            else:
                split, share = self._part
                if (crc32(sample.key.encode()) < share * 2**32) == (split == "test"):
                    yield sample

    def _samples(self, shard: str) -> Iterator[Sample]:
        for key, fields in _groups(shard, wanted=(self._image_field, self._label_field)):
            label = fields.get(self._label_field)
            if isinstance(label, tuple):
                label = _read(shard, label)
            text = None if label is None else label.decode(errors="replace").strip()
            yield Sample(key, shard, fields.get(self._image_field), text)

    def load(self, sample: Sample) -> tuple[Image.Image, int]:
        """The image as upright RGB, and its label (-1: none). Raises `BadImage` where it does not decode, `UserError`
        where its label is none of the classes."""
        id = self.id(sample)
        label = self._label(sample, id)
        if sample.image is None:
            raise BadImage(id, f"no field {self._image_field}")
        data = _read(sample.shard, sample.image) if isinstance(sample.image, tuple) else sample.image
        return decode(data, id), label

    def id(self, sample: Sample) -> str:
        """What names a sample: shard:key."""
        return f"{Path(sample.shard).name}:{sample.key}"

    def _label(self, sample: Sample, id: str) -> int:
        if sample.label is None:
            return -1
        if re.fullmatch(r"-?\d+", sample.label):
            label = int(sample.label)
            if label < -1 or (self._names is not None and label >= len(self._names)):
                top = f"0..{len(self._names) - 1}" if self._names is not None else "0 and up"
                raise UserError(f"label {label} of {id} is outside the classes {top}")
            return label
        if sample.label not in self.classes:
            raise UserError(f"label {sample.label!r} of {id} is none of the classes in data.class_names")
        return self.classes.index(sample.label)


def shuffled(stream: Stream, seed: int, share: int, shares: int, buffer_size: int) -> Iterator[tuple[Sample, list]]:
    """Samples without end for one of `shares` readers, with the buffer that each was drawn from.

    Each epoch has its own order of shards. Readers take turns on shards where there are enough, else on samples.
    """
    rng = np.random.default_rng([seed, 0, share])
    endless = _endless(stream, seed, share, shares)
    buffer: list[Sample] = []
    for epoch, sample in endless:
        if epoch == 0 and len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        i = int(rng.integers(len(buffer)))
        drawn, buffer[i] = buffer[i], sample
        yield drawn, buffer


def _endless(stream: Stream, seed: int, share: int, shares: int) -> Iterator[tuple[int, Sample]]:
    by_shard = len(stream.shards) >= shares
    for epoch in count():
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(stream.shards))
        mine = order[share::shares] if by_shard else order
        i = found = 0
        for shard in mine:
            for sample in stream.samples(stream.shards[shard]):
                if by_shard or i % shares == share:
                    found += 1
                    yield epoch, sample
                i += 1
        if not found:
            raise UserError(f"{stream.shards[mine[0]]} and others hold too few samples for {shares} loading processes")


def in_order(stream: Stream, share: int, shares: int, limit: int | None) -> Iterator[Sample]:
    """One reader's samples of a single pass: every `shares`-th of the first `limit`."""
    i = 0
    for shard in stream.shards:
        for sample in stream.samples(shard):
            if limit is not None and i >= limit:
                return
            if i % shares == share:
                yield sample
            i += 1


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


def _groups(shard: str, wanted: tuple | None = None) -> Iterator[tuple[str, dict]]:
    """(key, {field: (offset, size) or bytes}) of each sample: consecutive files of one key."""
    key, fields = None, {}
    for name, value in _members(shard, wanted):
        folder, _, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key and fields:
            yield key, fields
            fields = {}
        key = this
        fields[field] = value
    if fields:
        yield key, fields


def _members(shard: str, wanted: tuple | None) -> Iterator[tuple[str, tuple[int, int] | bytes]]:
    local = _is_local(shard)
    try:
        with (
            open(shard, "rb") if local else fsspec.open(shard, "rb") as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                if not member.isfile():
                    continue
                if local:
                    yield member.name, (member.offset_data, member.size)
                else:
                    field = member.name.rpartition("/")[2].partition(".")[2]
                    use = wanted is None or field in wanted
                    yield member.name, tar.extractfile(member).read() if use else b""
            # To tarfile a damaged header is the end; the true end is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"the shard {shard} is damaged or cut off at byte {tar.offset}: fetch it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"cannot read the shard {shard}: {error}") from None


def _read(shard: str, place: tuple[int, int]) -> bytes:
    with open(shard, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _is_local(shard: str) -> bool:
    return "://" not in shard
