"""FSQ (arXiv 2309.15505): each channel is bounded and rounded to one of L_i levels; the grid of all of them is the
codebook. Nothing is learned but the encoder, and no loss is added.

b = tanh(z + s) h - o,  h = (L - 1)(1 + 1e-3)/2,  o = 1/2 for even L, else 0,  s = atanh(o / h)
code = round(b) / (L // 2)
The papers use 8 6 5, 8 5 5 5, 7 5 5 5 5, 8 8 8 6 5, 8 8 8 5 5 5 for K near 2^8, 2^10, 2^12, 2^14, 2^16."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer.quantizers.base import Quantizer, QuantizerOptions, straight_through


class GridConfig(QuantizerOptions):
    """Options of a method whose codes are a grid."""

    levels: list[int] = Field([8, 8, 8, 6, 5], min_length=1, description="Levels of each channel; K is their product.")

    def check_dim(self, dim: int) -> None:
        if dim != (count := len(self.levels)):
            raise ValueError(f"model.latent_channels = {dim} must be the number of quantizer.levels, {count}")
        if min(self.levels) < 2 or math.prod(self.levels) > 2**20:
            raise ValueError("quantizer.levels must each be 2 or more, and their product at most 2^20")


class GridQuantizer(Quantizer):
    """Indices are sum_i l_i prod_{j<i} L_j of the levels l_i in 0..L_i - 1."""

    def __init__(self, config: GridConfig, dim: int):
        super().__init__(config, dim)
        self.codebook_size = math.prod(config.levels)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)
        basis = [math.prod(config.levels[:i]) for i in range(dim)]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def index(self, levels: Tensor) -> Tensor:
        """Levels [..., d] as whole numbers -> indices [...]. Those beyond an end, as the margin of 1e-3 leaves of a
        thousand levels, count as the end, and nan as 0."""
        levels = torch.minimum(levels.nan_to_num(0.0).clamp(min=0), self.levels - 1)
        return (levels.long() * self.basis).sum(-1)

    def level(self, indices: Tensor) -> Tensor:
        """Indices [...] -> levels [..., d]."""
        return indices[..., None] // self.basis % self.levels

    def export_table(self) -> None:
        return None  # latents are bounded before they are rounded


class FSQConfig(GridConfig):
    name: Literal["fsq"] = Field(description="fsq: bounded channels, rounded.")


class FSQ(GridQuantizer):
    """Codes lie in [-1, 1] [K, d]; nothing in it has a state."""

    Config = FSQConfig

    def prepare(self, z: Tensor) -> Tensor:
        """Latents -> b / (L // 2), about in [-1, 1]."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / (self.levels // 2)

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, dict, dict]:
        indices, z = self.lookup(z), self.prepare(z)
        codes = self.codes(indices)
        return straight_through(z, codes), indices, {"commitment": (z - codes).square().mean()}, {}

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        half = self.levels // 2
        return self.index((self.prepare(z) * half).round() + half)

    def codes(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        return (self.level(indices) - half).float() / half
