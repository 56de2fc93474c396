"""Samples that another program drew, in place of a pipeline: an .npz file in ADM's format, or a folder of images.

Both have `path`; `labels`, the class of each image, [] without classes; `size`, the side of all images; a length; and
`load`. They raise `UserError` for what is no such file or folder, or damaged, at once or while it is read.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from nsvq.data.folders import files_below, is_hidden, is_image
from nsvq.data.images import BadImage, decode
from nsvq.errors import UserError

_DAMAGE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class ImageFile:
    """The images of arr_0, uint8 [N, S, S, 3], and their classes in arr_1 [N], where that is there. A few images are in
    memory at a time; reading on is cheap, going back is not."""

    def __init__(self, path: Path):
        self.path = path
        try:
            archive = zipfile.ZipFile(path)
            self._array = archive.open("arr_0.npy")
            npy.read_magic(self._array)
            shape, columns_first, kind = npy.read_array_header_1_0(self._array)
            labels = npy.read_array(archive.open("arr_1.npy")) if "arr_1.npy" in archive.namelist() else None
        except _DAMAGE as error:
            raise UserError(f"--images {path} is no folder, and no .npz file with images in arr_0 ({error})") from None
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or columns_first or not shape[0]:
            what = f"{kind} {shape}{', columns first' if columns_first else ''}"
            raise UserError(f"--images {path}: arr_0 must hold images, uint8 [N, H, W, 3], not {what}")
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
            what = f"{labels.dtype} {labels.shape}"
            raise UserError(f"--images {path}: arr_1 must hold a class id, 0 or more, of each image, not {what}")
        self.labels: list[int] = [] if labels is None else labels.tolist()
        self._count, self._start, self.size = shape[0], self._array.tell(), _side(path, shape[2], shape[1])

    def __len__(self) -> int:
        return self._count

    def load(self, samples: range) -> Tensor:
        """Those of these images that there are, uint8 [B, 3, S, S]."""
        count, each = min(samples.stop, len(self)) - samples.start, 3 * self.size**2  # bytes
        try:
            self._array.seek(self._start + samples.start * each)
            pixels = bytearray(self._array.read(count * each))
            if len(pixels) < count * each:
                raise ValueError("it ends too early")
        except _DAMAGE as error:
            where = f"images {samples.start} to {samples.start + count - 1}"
            raise UserError(f"--images {self.path} is damaged at {where} ({error})") from None
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(count, self.size, self.size, 3)
        return images.permute(0, 3, 1, 2).contiguous()


class ImageFolder:
    """The image files below a folder, in the order of their names, without classes."""

    def __init__(self, path: Path):
        self.path = path
        self.labels: list[int] = []
        self._files = sorted(name for name in files_below(path) if is_image(name) and not is_hidden(name))
        if not self._files:
            raise UserError(f"--images {path} holds no images")
        height, width, _ = self._decode(self._files[0]).shape
        self.size = _side(path, width, height)

    def __len__(self) -> int:
        return len(self._files)

    def load(self, samples: range) -> Tensor:
        """Those of these images that there are, uint8 [B, 3, S, S]."""
        images = []
        for name in self._files[samples.start : samples.stop]:
            images.append(self._decode(name))
            height, width, _ = images[-1].shape
            if (width, height) != (self.size, self.size):
                found = f"{name} is {width} x {height} pixels, the first one {self.size} x {self.size}"
                raise UserError(f"--images {self.path}: {found}; all must be of one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, name: str) -> np.ndarray:
        try:
            return np.asarray(decode((self.path / name).read_bytes(), name))  # (H, W, 3) uint8
        except (BadImage, OSError) as error:
            raise UserError(f"--images {self.path}: an image does not decode ({error})") from None


GivenImages = ImageFile | ImageFolder


def given_images(path: Path) -> GivenImages:
    """The images at `path`."""
    return ImageFolder(path) if path.is_dir() else ImageFile(path)


def _side(path: Path, width: int, height: int) -> int:
    if width != height:
        raise UserError(f"--images {path}: images must be square, not {width} x {height} pixels")
    return width
