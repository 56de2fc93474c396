"""NS-VQ (arXiv 2602.18896), NSVQ's precursor, as its code for CelebA defines it: losing codes are pulled with clamped
weights that grow with K, at a temperature that falls from epoch to epoch.

w_nj = min(1, lambda K p_nj) for the losers j, p = softmax(-D / tau), tau = tau0 rho^epoch (at least 1e-8)
L = mean |sg[z] - c_q|^2 + 1/(N d) sum_n sum_{j != q_n} sg[w_nj] D_nj, D_nj = |sg[z_n] - c_j|^2 summed over d
The second term takes the place of the NS loss: nsvq.pull.weight is its weight, nsvq.pull.temperature is tau0."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer.codebook import NonStationary, nearest_code
from nsvq.tokenizer.quantizers.base import rows_in_tile
from nsvq.tokenizer.quantizers.vq import VQ, VQConfig


class PrecursorConfig(VQConfig):
    name: Literal["ns-vq"] = Field(description="ns-vq: NSVQ's precursor.")  # type: ignore[assignment]
    pull: float = Field(0.01, gt=0, description="lambda, the pull on losing codes, which also grows with K.")
    cooling: float = Field(0.5, gt=0, le=1, description="rho, the factor on the temperature at each epoch's end.")


class NSVQPrecursor(VQ):
    """`epochs` [] is a buffer: the clock of the temperature."""

    Config = PrecursorConfig  # type: ignore[assignment]

    def __init__(self, config: PrecursorConfig, dim: int):
        super().__init__(config, dim)
        self.register_buffer("epochs", torch.tensor(0))
        self._finished: int | None = None  # `epochs`, on the host

    def end_epoch(self) -> None:
        self.epochs += 1
        self._finished = None

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._finished = None

    def search(self, z: Tensor, codebook: Tensor, temperature: float | None) -> tuple[Tensor, NonStationary | None]:
        indices = nearest_code(z, codebook)
        if temperature is None:
            return indices, None
        if self._finished is None:
            self._finished = self.epochs.item()  # once an epoch, since the host waits for the GPU
        temperature = max(1e-8, temperature * self.config.cooling**self._finished)
        gain = self.config.pull * len(codebook)
        loss, mass, effective = _ClampedPull.apply(z.detach(), codebook, indices, temperature, gain)
        return indices, NonStationary(loss, mass, effective)


class _ClampedPull(torch.autograd.Function):
    """The second term above, in tiles; dL/dC = 2/(N d) (s C - A), s the column sums of w and A = w^T z."""

    @staticmethod
    def forward(ctx, z, codebook, indices, temperature, gain):
        center = codebook.mean(0)
        z, codes = z - center, codebook - center
        norms = codes.square().sum(1)
        weight_sums, weighted = torch.zeros_like(norms), torch.zeros_like(codes)  # s [K], A [K, d]
        loss, mass, entropy = (z.new_zeros((), dtype=torch.float64) for _ in range(3))
        rows = rows_in_tile(codes)
        for tile, winners in zip(z.split(rows), indices.split(rows), strict=True):
            distances = torch.addmm(norms, tile, codes.T, alpha=-2) + tile.square().sum(1, keepdim=True)  # (n, K)
            distances.clamp_(min=0)
            log_p = torch.log_softmax(distances / -temperature, 1)
            p = log_p.exp()
            entropy -= (p * log_p).sum()
            mass += p.gather(1, winners[:, None]).sum()
            weights = p.mul_(gain).clamp_(max=1).scatter_(1, winners[:, None], 0.0)
            loss += (weights * distances).sum(1).sum(dtype=torch.float64)
            weight_sums += weights.sum(0)
            weighted.addmm_(weights.T, tile)
        ctx.save_for_backward((weight_sums[:, None] * codes - weighted) * (2 / z.numel()))
        outputs = (loss / z.numel()).float(), (mass / len(z)).float(), (entropy / len(z)).exp().float()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return None, grad_loss * ctx.saved_tensors[0], None, None, None
