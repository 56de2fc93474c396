"""FVQ (arXiv 2509.10140): VQBridge, a small transformer over groups of codes, between a free table and the codes used.

compress  the table C [K, d] in T = K / p groups of p codes: [T, p d] -> linear -> [T, width]
process   pre-norm transformer blocks over the T groups, without positions
recover   layer norm -> linear, weight and bias from zero -> [K, d]; there is no residual from C
All codes are zero at the start: usage is near 0 for some tens of steps. The paper anneals the learning rate of
generator and discriminator (optim.lr_decay)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nsvq.tokenizer.quantizers.base import CodebookConfig, NearestConfig, NearestQuantizer


class FVQConfig(CodebookConfig, NearestConfig):
    name: Literal["fvq"] = Field(description="fvq: a free table through VQBridge.")
    group: int | None = Field(None, ge=1, description="Codes p in a group, which divides K; null: K/1024, at least 1.")
    width: int = Field(256, ge=1, description="Width of the bridge.")
    depth: int = Field(2, ge=1, description="Transformer blocks of the bridge.")
    heads: int = Field(4, ge=1, description="Attention heads; must divide the width.")

    @model_validator(mode="after")
    def _divides(self) -> "FVQConfig":
        if self.codebook_size % (group := self.codes_in_group()):
            raise ValueError(f"group = {group} must divide codebook_size = {self.codebook_size}")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width}")
        return self

    def codes_in_group(self) -> int:
        """p."""
        return self.group or max(1, self.codebook_size // 1024)


class FVQ(NearestQuantizer):
    """Codes are the bridge's output [K, d], computed once a step."""

    Config = FVQConfig

    def __init__(self, config: FVQConfig, dim: int):
        super().__init__(config, dim)
        k, p, width = config.codebook_size, config.codes_in_group(), config.width
        self.group = p
        self.weight = nn.Parameter(torch.empty(k, dim).uniform_(-1 / k, 1 / k))
        self.compress = nn.Linear(p * dim, width)
        self.blocks = nn.Sequential(*(_Block(width, config.heads) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.recover = nn.Linear(width, p * dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.recover.weight)

    def codebook(self) -> Tensor:
        groups = self.weight.view(-1, self.group * self.dim)  # (T, p d)
        return self.recover(self.norm(self.blocks(self.compress(groups)))).view(-1, self.dim)


class _Block(nn.Module):
    """H += MHSA(LN H); H += MLP(LN H), with norms that have no weights and an MLP twice as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        count, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(1, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (1, heads, T, .)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, width)
        x = x + self.output(attended)
        return x + self.mlp(self.norm(x))
