"""SimVQ (arXiv 2411.02038): a frozen Gaussian base and one trained linear map, which moves every code at each step."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nsvq.tokenizer.quantizers.base import CodebookConfig, NearestConfig, NearestQuantizer


class SimVQConfig(CodebookConfig, NearestConfig):
    name: Literal["simvq"] = Field(description="simvq: a linear map of frozen Gaussian codes.")


class SimVQ(NearestQuantizer):
    """Codes are W c + b with c ~ N(0, 1/d) frozen, [K, d]."""

    Config = SimVQConfig

    def __init__(self, config: SimVQConfig, dim: int):
        super().__init__(config, dim)
        self.register_buffer("base", torch.randn(config.codebook_size, dim) * dim**-0.5)
        self.linear = nn.Linear(dim, dim)

    def codebook(self) -> Tensor:
        return self.linear(self.base)
