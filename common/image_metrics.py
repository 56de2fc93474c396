"""How close a reconstruction is to its original, one number an image.

Everything is measured on 8-bit images, as they would be saved: PSNR and SSIM in float64, in scikit-image's definitions.
"""

import torch
from torch import Tensor

_SSIM_WINDOW = 7  # scikit-image's default


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 images in [0, 255], clipped and rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def truncate_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 images in [0, 255], clipped and cut to the level below, as SimVQ does."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def squared_error(images: Tensor, references: Tensor) -> Tensor:
    """Mean over all pixels and channels of (x - y)^2, exact: two uint8 batches [B, 3, H, W] -> [B] float64."""
    difference = images.to(torch.int32) - references.to(torch.int32)
    return difference.square().flatten(1).sum(1).double() / images[0].numel()


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(255^2 / MSE) in dB, the MSE over all pixels and channels of one image. Two
    uint8 batches [B, 3, H, W] -> [B] float64; infinite where the two images are equal."""
    return decibels(squared_error(images, references))


def decibels(mse: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors of 8-bit images; infinite where they are 0."""
    return 10 * torch.log10(255**2 / mse)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), as `skimage.metrics.structural_similarity` computes it with
    `data_range=255` and `channel_axis`: uniform 7 x 7 window, sample covariance, mean over windows that lie inside the
    image, then over channels.

    Two uint8 batches [B, 3, H, W] -> [B] float64. Raises `ValueError` where a side is shorter than the window."""
    if min(images.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of at least {_SSIM_WINDOW} pixels, got {tuple(images.shape[-2:])}")
    # Two images at a time stay in a processor's cache, which makes it six times as fast as 64.
    at_once = 2 if images.device.type == "cpu" else len(images)
    pairs = zip(images.split(at_once), references.split(at_once), strict=True)
    return torch.cat([_ssim(x.float(), y.float()) for x, y in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    n = _SSIM_WINDOW**2
    # Sums of 49 products of 8-bit levels are integers below 2^24: float32 holds them exactly.
    sums = (_window_sum(product).double() for product in (x, y, x * x, y * y, x * y))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (total / n for total in sums)
    unbiased = n / (n - 1)
    variance_x = unbiased * (mean_xx - mean_x * mean_x)
    variance_y = unbiased * (mean_yy - mean_y * mean_y)
    covariance = unbiased * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return similarity.flatten(1).mean(1)


def _window_sum(x: Tensor) -> Tensor:
    """Sum over each full 7 x 7 window: [B, C, H, W] -> [B, C, H - 6, W - 6], axis by axis as 4 + 2 + 1 neighbours."""
    for axis in (2, 3):
        size = x.shape[axis]
        two = x.narrow(axis, 0, size - 1) + x.narrow(axis, 1, size - 1)
        four = two.narrow(axis, 0, size - 3) + two.narrow(axis, 2, size - 3)
        x = four.narrow(axis, 0, size - 6) + two.narrow(axis, 4, size - 6) + x.narrow(axis, 6, size - 6)
    return x
