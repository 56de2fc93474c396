"""Image bytes to upright RGB, and the crops: ADM's for evaluation and latents, resize and random crop for training.

What this adds to torchvision's v2 transforms: each draw comes from a generator that the caller gives (theirs draw from
torch's global one, so a crop would depend on the loading process), ADM's crop, and a name for each bad image.
"""

import contextlib
import hashlib
import io
import math
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# What Pillow's readers raise on damaged files: errors of Python's, and those of the libraries that they call.
_PYTHONS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError)
_DECODE_ERRORS = (*_PYTHONS, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
_LEAST_FRACTION = 0.8  # of the short side, in a random crop
_MOST_PIXELS = 2**27  # of a file: 400 MB as RGB
_LONGEST = 16  # long side over short side; of what is longer the middle is taken, or resizing it would take gigabytes


class BadImage(Exception):
    """An image that does not decode. `id` says which one: split[row] (path), or shard:key."""

    def __init__(self, id: str, reason: str):
        super().__init__(f"{id}: {reason}")
        self.id, self.reason = id, reason


def decode(data: bytes, id: str) -> Image.Image:
    """Encoded image bytes -> upright RGB (8 bits a channel); of an animation the first frame.

    Raises `BadImage(id)` where the bytes are damaged, truncated, in a pixel format without a defined RGB meaning, or of
    more than 2^27 pixels. Of an image longer than 16 times its short side the middle is taken.
    """
    try:
        # Pillow warns about odd EXIF blocks and large images, once for each of them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {_MOST_PIXELS}")
            image.load()
            return to_rgb(_middle(image))
    except _DECODE_ERRORS as error:
        raise BadImage(id, str(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> upright RGB: alpha on white, 16-bit grey scaled to 8 bits, CMYK without a profile.
    Raises `ValueError` for pixel formats without a defined range (floating point, 32-bit integers, CIELAB)."""
    with contextlib.suppress(*_DECODE_ERRORS):  # an EXIF block that can't be read says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels are not supported")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"pixel format {image.mode} is not supported")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    most = _LONGEST * min(image.size)
    if max(image.size) <= most:
        return image
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, left + min(image.width, most), top + min(image.height, most)))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), on which the field's FID statistics rest.

    Halved by box filter while the short side is at least 2 * size, then bicubic to short side = size, then the centre.
    """
    image = _shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def several_crops(image: Image.Image, size: int, count: int, id: str) -> list[Image.Image]:
    """The centre crop of ADM, and `count` - 1 of its random crops (arXiv 2105.05233), which `id` alone decides. A
    random crop is a random square of `size` pixels of the image resized as for the centre crop, to a random short side
    from `size` to `size` / 0.8."""
    crops = [center_crop(image, size)]
    digest = hashlib.sha256(id.encode()).digest()
    for number in range(1, count):
        rng = np.random.default_rng([number, *digest])
        scaled = _shrink(image, int(rng.integers(size, random_crop_source(size) + 1)))
        crops.append(_random_square(scaled, size, rng))
    return crops


def random_crop_source(size: int) -> int:
    """The short side of the largest image that a random crop of `size` pixels is taken from."""
    return math.ceil(size / _LEAST_FRACTION)


def _random_square(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _shrink(image: Image.Image, short: int) -> Image.Image:
    """ADM's resizing to short side = `short`."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return resize_short_side(image, short)


def training_crop(image: Image.Image, size: int, flip: bool, rng: np.random.Generator) -> Image.Image:
    """Short side to `size` (bicubic, antialiased), a random crop, and with `flip` a mirror image half of the time."""
    image = _random_square(resize_short_side(image, size), size, rng)
    mirror = rng.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirror else image


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, bicubic and antialiased."""
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    return image if short == size else image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size -> float32 [B, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3) uint8
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
