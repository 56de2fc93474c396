"""IBQ, index backpropagation quantization (arXiv 2412.02692): the code of the largest inner product, with a gradient
through the softmax over all codes, so that every code trains at every step.

s = softmax(z C^T);  o = onehot(argmax) + s - sg[s];  z_q = o C;  z_h = C[argmax]
L = |z_q - z|^2 + a |sg[z] - z_h|^2 + b |z - sg[z_h]|^2 + c (E[H(p)] - H(E[p])),  p = softmax(z C^T / tau)
The paper: a = 0.25, b = 1 (loss.codebook_weight, loss.commitment_weight), c = 0.05. The definition needs the N x K
scores several times; here they live in tiles, and are computed again for the gradients.

The largest inner product is the nearest code in one more dimension, with M the longest code:
|(z, 0) - (c, sqrt(M^2 - |c|^2))|^2 = |z|^2 + M^2 - 2 z.c. This makes the export a stock nearest-neighbour table."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nsvq.tokenizer import ranks
from nsvq.tokenizer.quantizers.base import CodebookConfig, Quantizer, rows_in_tile, vq_losses


class IBQConfig(CodebookConfig):
    name: Literal["ibq"] = Field(description="ibq: largest inner product, gradient to all codes.")
    joint_weight: float = Field(1.0, ge=0, description="Weight of |z_q - z|^2, through the softmax.")
    entropy_weight: float = Field(0.05, gt=0, description="Weight of the entropy loss.")
    temperature: float = Field(0.01, gt=0, description="tau of the entropy loss.")


class IBQ(Quantizer):
    """`weight` [K, d] starts from N(0, 1)."""

    Config = IBQConfig
    free_table = True
    terms = ("codebook", "commitment")
    usual_weights: ClassVar[dict[str, float]] = {"commitment": 1.0, "codebook": 0.25}

    def __init__(self, config: IBQConfig, dim: int):
        super().__init__(config, dim)
        self.weight = nn.Parameter(torch.randn(config.codebook_size, dim))

    def loss_weights(self) -> dict[str, float]:
        return {"joint": self.config.joint_weight, "entropy": self.config.entropy_weight}

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, dict, dict]:
        indices = self.lookup(z)
        z_q = _SoftLookup.apply(z, self.weight, indices)
        losses, stats = vq_losses(z, self.weight[indices]), {}
        if self.training:
            losses["joint"] = (z_q - z).square().mean()
            losses["entropy"], of_tokens, of_mean = _Entropy.apply(z, self.weight, self.config.temperature)
            stats = {"token_entropy": of_tokens, "mean_entropy": of_mean}
        return z_q, indices, losses, stats

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        return torch.cat([(tile @ self.weight.T).argmax(1) for tile in _tiles(z, self.weight)])

    def codebook(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def export_table(self) -> Tensor:
        norms = self.weight.double().square().sum(1)
        return torch.cat([self.weight, (norms.max() - norms).sqrt().float()[:, None]], 1)


def _tiles(z: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    return z.split(rows_in_tile(codes))


class _SoftLookup(torch.autograd.Function):
    """z_q = o C: the value is C[indices], the gradient flows through s and through the hard choice's code."""

    @staticmethod
    def forward(ctx, z, codes, indices):
        ctx.save_for_backward(z, codes, indices)
        return codes[indices]

    @staticmethod
    def backward(ctx, grad):
        z, codes, indices = ctx.saved_tensors
        grad_z, grad_codes = [], torch.zeros_like(codes).index_add_(0, indices, grad)
        for tile, upstream in zip(_tiles(z, codes), _tiles(grad, codes), strict=True):
            s = torch.softmax(tile @ codes.T, 1)  # (n, K)
            from_choice = upstream @ codes.T
            of_scores = s * (from_choice - (s * from_choice).sum(1, keepdim=True))
            grad_z.append(of_scores @ codes)
            grad_codes.addmm_(of_scores.T, tile)
        return torch.cat(grad_z), grad_codes, None


class _Entropy(torch.autograd.Function):
    """E[H(p)] - H(E[p]), and the two; E[p] over the tokens of all ranks. d/dp_nk is (log E[p_k] - log p_nk) / N."""

    @staticmethod
    def forward(ctx, z, codes, temperature):
        mean, of_tokens = z.new_zeros(len(codes)), z.new_zeros((), dtype=torch.float64)
        for tile in _tiles(z, codes):
            log_p = torch.log_softmax(tile @ codes.T / temperature, 1)  # (n, K)
            p = log_p.exp()
            of_tokens -= (p * log_p).sum(1).sum(dtype=torch.float64)
            mean += p.sum(0)
        mean = ranks.mean(mean / len(z))
        of_tokens, of_mean = (of_tokens / len(z)).float(), -torch.special.xlogy(mean, mean).sum()
        log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        grad_z, grad_codes = [], torch.zeros_like(codes)
        for tile in _tiles(z, codes):
            log_p = torch.log_softmax(tile @ codes.T / temperature, 1)
            p, of_p = log_p.exp(), log_mean - log_p
            of_scores = p * (of_p - (p * of_p).sum(1, keepdim=True)) / (len(z) * temperature)
            grad_z.append(of_scores @ codes)
            grad_codes.addmm_(of_scores.T, tile)
        ctx.save_for_backward(torch.cat(grad_z), grad_codes)
        ctx.mark_non_differentiable(of_tokens, of_mean)
        return of_tokens - of_mean, of_tokens, of_mean

    @staticmethod
    def backward(ctx, grad, *_):
        grad_z, grad_codes = ctx.saved_tensors
        return grad * grad_z, grad * grad_codes, None
