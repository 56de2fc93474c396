"""Plain vector quantization with a trainable table (VQ-VAE, arXiv 1711.00937). NSVQ uses this same table."""

import torch
from torch import Tensor, nn

from tokenizer.quantizers.base import CodebookQuantizer


class VQ(CodebookQuantizer):
    """K codes of width d as free parameters, started uniform in +-1/K; `initialize` starts them from latents."""

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def codebook(self) -> Tensor:
        return self.weight

    def table(self) -> nn.Parameter:
        return self.weight

    @torch.no_grad()
    def initialize(self, codes: Tensor) -> None:
        """Start from `codes` [K, d], e.g. encoder outputs."""
        self.weight.copy_(codes)
