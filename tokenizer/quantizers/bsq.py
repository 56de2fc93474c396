"""BSQ (arXiv 2406.07548): the signs of a latent on the unit sphere, as a point of the sphere.

v = z / |z|, code = sign(v) / sqrt(d), K = 2^d. Entropy loss as in LFQ with P(c_i > 0) = sigmoid(4 v_i / (sqrt(d) tau)),
but H(E[p]) is approximated by the sum of the channels' own entropies of E[p_i], as in the authors' code."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer import ranks
from nsvq.tokenizer.quantizers.lfq import BitQuantizer, BitsConfig, bernoulli_entropy, entropy


class BSQConfig(BitsConfig):
    name: Literal["bsq"] = Field(description="bsq: one bit a channel on the sphere, K = 2^model.latent_channels.")
    temperature: float = Field(1.0, gt=0, description="tau of the entropy loss.")


class BSQ(BitQuantizer):
    Config = BSQConfig

    def __init__(self, config: BSQConfig, dim: int):
        super().__init__(config, dim)
        self.corner = dim**-0.5

    def prepare(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logits = 4 * self.corner / self.config.temperature * z
        mean = ranks.mean(torch.sigmoid(logits).mean(0))  # (d,)
        return bernoulli_entropy(logits).sum(1).mean(), entropy(mean) + entropy(1 - mean)
