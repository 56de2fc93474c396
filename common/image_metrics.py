"""How close a reconstruction is to its original, one number an image.

Everything is measured on 8-bit images, as they would be saved: PSNR and SSIM in float64, in scikit-image's definitions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SSIM_WINDOW = 7  # scikit-image's default


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 images in [0, 255], clipped and rounded to the nearest level."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(255^2 / MSE) in dB, the MSE over all pixels and channels of one image.

    Two uint8 batches [B, 3, H, W] -> [B] float64; infinite where the two images are equal.
    """
    mse = (images.double() - references.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / mse)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13), as `skimage.metrics.structural_similarity` computes it with
    `data_range=255` and `channel_axis`: uniform 7 x 7 window, sample covariance, mean over windows that lie inside the
    image, then over channels.

    Two uint8 batches [B, 3, H, W] -> [B] float64. Raises `ValueError` where a side is shorter than the window.
    """
    if min(images.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of at least {_SSIM_WINDOW} pixels, got {tuple(images.shape[-2:])}")
    x, y = images.double(), references.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = map(_window_mean, (x, y, x * x, y * y, x * y))
    unbiased = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    variance_x = unbiased * (mean_xx - mean_x * mean_x)
    variance_y = unbiased * (mean_yy - mean_y * mean_y)
    covariance = unbiased * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return similarity.flatten(1).mean(1)


def _window_mean(x: Tensor) -> Tensor:
    """Mean over each full window: [B, C, H, W] -> [B, C, H - 6, W - 6]; the box filter is separable."""
    return F.avg_pool2d(F.avg_pool2d(x, (_SSIM_WINDOW, 1), stride=1), (1, _SSIM_WINDOW), stride=1)
