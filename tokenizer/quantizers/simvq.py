"""SimVQ (arXiv 2411.02038): a frozen Gaussian base and one trained linear map, which moves every code at each step."""

import torch
from torch import Tensor, nn

from tokenizer.quantizers.base import CodebookQuantizer


class SimVQ(CodebookQuantizer):
    """Codes are W c + b with c ~ N(0, 1/d) frozen, [K, d]."""

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.register_buffer("base", torch.randn(codebook_size, dim) * dim**-0.5)
        self.linear = nn.Linear(dim, dim)

    def codebook(self) -> Tensor:
        return self.linear(self.base)
