"""TransVQ (arXiv 2602.18896, NSVQ's precursor): a frozen Gaussian base moved by one linear-attention block over codes.

X = C0 W_in + P;  X += LinAttn(LN X);  X += FFN(LN X);  C = LN(X) W_out
LinAttn(X) = W_o [phi(Q) (phi(K)^T V) / (phi(Q) . sum phi(K) + 1e-6)],  phi(u) = elu(u) + 1, one head, no biases
The cost is linear in K. Every lookup uses the whole C: a code depends on all others."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nsvq.tokenizer.quantizers.base import CodebookConfig, NearestConfig, NearestQuantizer


class TransVQConfig(CodebookConfig, NearestConfig):
    name: Literal["transvq"] = Field(description="transvq: frozen Gaussian codes through a linear-attention block.")
    width: int = Field(256, ge=1, description="Width of the block; its feed-forward layer is twice as wide.")


class TransVQ(NearestQuantizer):
    """C0 ~ N(0, 1/d) [K, d] is a buffer; the learned table of positions P is [K, width]."""

    Config = TransVQConfig

    def __init__(self, config: TransVQConfig, dim: int):
        super().__init__(config, dim)
        k, width = config.codebook_size, config.width
        self.register_buffer("base", torch.randn(k, dim) * dim**-0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(k, width))
        self.project_in, self.project_out = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_attention, self.norm_feedforward, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.feedforward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def codebook(self) -> Tensor:
        x = self.project_in(self.base) + self.positions  # (K, width)
        x = x + self._attention(self.norm_attention(x))
        x = x + self.feedforward(self.norm_feedforward(x))
        return self.project_out(self.norm_out(x))

    def _attention(self, x: Tensor) -> Tensor:
        query, key = F.elu(self.query(x)) + 1, F.elu(self.key(x)) + 1
        memory = key.T @ self.value(x)  # (width, width)
        return self.output(query @ memory / (query @ key.sum(0) + 1e-6)[:, None])
