"""LFQ (MAGVIT-v2, arXiv 2310.05737; Open-MAGVIT2, arXiv 2409.04410): a code is the signs of the latent's channels.

K = 2^d codes in {-1, 1}^d. Entropy loss E[H(p)] - H(E[p]) of p = softmax over all codes of 2 z.c / tau. That softmax is
a product over channels, P(c_i = 1) = sigmoid(4 z_i / tau): H(p) is a sum over channels, and E[p] [K] is one matrix
product of the tokens' distributions over the first and over the second half of the channels. Both are exact, without
N x K numbers."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer import ranks
from nsvq.tokenizer.quantizers.base import Quantizer, QuantizerOptions, straight_through

MAX_BITS = 20


class BitsConfig(QuantizerOptions):
    """Options of a method with one bit a channel."""

    entropy_weight: float = Field(0.1, ge=0, description="Weight of the entropy loss.")

    def check_dim(self, dim: int) -> None:
        if dim > MAX_BITS:
            raise ValueError(f"{self.name} has 2^model.latent_channels codes: at most 2^{MAX_BITS}, not 2^{dim}")


class BitQuantizer(Quantizer):
    """Codes are the corners [K, d] of a cube with coordinates +-`corner`; bit i of the index is channel i's sign."""

    corner: float = 1.0

    def __init__(self, config: BitsConfig, dim: int):
        super().__init__(config, dim)
        self.codebook_size = 2**dim
        self.register_buffer("bits", 2 ** torch.arange(dim), persistent=False)

    def loss_weights(self) -> dict[str, float]:
        return {"entropy": self.config.entropy_weight}

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, dict, dict]:
        z = self.prepare(z)
        indices = self.lookup(z)
        codes = self.codes(indices)
        losses, stats = {"commitment": (z - codes).square().mean()}, {}
        if self.training:
            of_tokens, of_mean = self.entropies(z)
            losses["entropy"] = of_tokens - of_mean
            stats = {"token_entropy": of_tokens, "mean_entropy": of_mean}
        return straight_through(z, codes), indices, losses, stats

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(E[H(p)], H(E[p])) of prepared tokens [N, d], in nats; E[p] over the tokens of all ranks."""
        raise NotImplementedError

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.bits).sum(1)

    def codes(self, indices: Tensor) -> Tensor:
        return torch.where(indices[..., None] & self.bits != 0, self.corner, -self.corner)


class LFQConfig(BitsConfig):
    name: Literal["lfq"] = Field(description="lfq: one bit a channel, K = 2^model.latent_channels.")
    temperature: float = Field(0.01, gt=0, description="tau of the entropy loss.")


class LFQ(BitQuantizer):
    Config = LFQConfig
    terms = ("commitment",)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logits = 4 / self.config.temperature * z
        p = torch.sigmoid(logits)
        half = self.dim // 2
        first, second = _distribution(p[:, :half]), _distribution(p[:, half:])
        mean = ranks.mean(second.T @ first / len(z))  # (2^(d - half), 2^half)
        return bernoulli_entropy(logits).sum(1).mean(), entropy(mean)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """H(sigmoid(x)) in nats, element by element; finite for every x, with its gradient."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def entropy(p: Tensor) -> Tensor:
    """-sum p log p in nats; where p is 0 its gradient is large but finite."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()


def _distribution(p: Tensor) -> Tensor:
    """Probabilities of independent bits [N, b] -> of their 2^b patterns [N, 2^b], bit i worth 2^i."""
    patterns = p.new_ones(len(p), 1)
    for bit in p.T:
        patterns = torch.cat([patterns * (1 - bit[:, None]), patterns * bit[:, None]], 1)
    return patterns
