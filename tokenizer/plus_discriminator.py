"""VQGAN+'s discriminator (MaskBit, arXiv 2409.16211): 3x3 convolutions that keep the size, and blurs that halve it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GRID = 16  # logits a side, at most


class PlusDiscriminator(nn.Module):
    """images [B, 3, H, W] -> logits [B, 1, h, w]; h = H / 2^stages, at most 16. Widths are channels x 1, 2, 4, ..."""

    def __init__(self, channels: int = 128, stages: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1)]
        width = channels
        for stage in range(stages):
            previous, width = width, channels * 2**stage
            norm = nn.GroupNorm(math.gcd(32, width), width)
            blocks += [nn.Conv2d(previous, width, 3, padding=1), BlurPool(), norm, nn.LeakyReLU(0.1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(images)
        return self.head(F.adaptive_max_pool2d(x, (min(_GRID, x.shape[2]), min(_GRID, x.shape[3]))))


class BlurPool(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: each channel blurred by (1, 3, 3, 1) / 8 in both directions, and every other
    pixel kept (arXiv 1904.11486)."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=1, groups=x.shape[1])
