"""DiffAugment (arXiv 2006.10738): changes of images that gradients pass through, each image's by its own numbers.

They are a function of (seed, the sample's position in the run), so that ranks, micro-batches and restarts change
nothing."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 12  # uniform numbers that an image takes: 10 here, 2 for the place of a window
_SEQUENCE = 3  # of the seed's random sequences; data/batches.py has 0 to 2


def uniform_numbers(seed: int, positions: Sequence[int]) -> Tensor:
    """U[0, 1) [B, NUMBERS] float32, on the CPU, for the samples at these global positions."""
    rows = [np.random.default_rng([seed, _SEQUENCE, p]).random(NUMBERS, np.float32).tolist() for p in positions]
    return torch.tensor(rows)


def diffaugment(images: Tensor, u: Tensor, probability: float, cutout: float) -> Tensor:
    """images [B, 3, S, S] in [-1, 1] with u [B, 10 or more]: colour, translation by up to S/8 and a square hole of
    `cutout` S, each with `probability`. What comes in from outside, and the hole, is 0."""
    size = images.shape[2]
    does = u[:, 7:10] < probability
    images = torch.where(does[:, 0, None, None, None], _recoloured(images, u), images)
    most = int(size / 8 + 0.5)
    top, left = torch.where(does[:, 1, None], (u[:, 3:5] * (2 * most + 1)).long(), most).unbind(1)
    images = window(F.pad(images, [most] * 4), top, left, size)
    side = int(size * cutout + 0.5)
    first = (u[:, 5:7] * (size + 1 - side % 2)).long() - side // 2  # the hole's middle is anywhere in the image
    place = torch.arange(size, device=u.device)
    inside = (place >= first[..., None]) & (place < first[..., None] + side)  # (B, 2, S)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :] & does[:, 2, None, None]
    return images.masked_fill(hole[:, None], 0.0)


def _recoloured(images: Tensor, u: Tensor) -> Tensor:
    """Brightness by -0.5 to 0.5, then saturation by 0 to 2 and contrast by 0.5 to 1.5 times."""
    brightness, saturation, contrast = u[:, :3, None, None, None].unbind(1)
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def window(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """[B, C, size, size] of images [B, C, H, W], each at its own top [B] and left [B]."""
    place = torch.arange(size, device=images.device)
    rows = (top[:, None] + place)[:, None, :, None].expand(-1, images.shape[1], -1, images.shape[3])
    columns = (left[:, None] + place)[:, None, None, :].expand(-1, images.shape[1], size, -1)
    return images.gather(2, rows).gather(3, columns)
