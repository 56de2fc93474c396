"""The codebook engine: exact nearest-code search and the non-stationary loss, in tiles, always in float32.

No N x K matrix is ever kept. Distances are |z|^2 + |c|^2 - 2 z.c after the mean code is taken from both sides,
which keeps the cancellation error small for latents far from the origin.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_ELEMENTS = 2**22  # float32 elements of one distance tile: 16 MiB


def _without_autocast(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(z: Tensor, *arguments, **named):
        with torch.autocast(z.device.type, enabled=False):
            return function(z, *arguments, **named)

    return wrapped


@_without_autocast
@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code by Euclidean distance, ties to the lower index.

    z [N, d], codebook [K, d] (any float dtype) -> indices [N] int64. Raises `ValueError` on other shapes.
    """
    z, codebook = _float32(z, codebook)
    center = codebook.mean(0)
    z, codebook = z - center, codebook - center
    norms = codebook.square().sum(1)  # [K]
    indices = [torch.addmm(norms, tile, codebook.T, alpha=-2).argmin(1) for tile in z.split(_rows(codebook))]
    return torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64, device=z.device)


@_without_autocast
@torch.no_grad()
def nearest_neighbor_distance(codebook: Tensor) -> Tensor:
    """Distance from each code to the nearest other one: codebook [K, d] -> [K] float32. Needs K >= 2."""
    codes, _ = _float32(codebook, codebook)
    codes = codes - codes.mean(0)
    norms = codes.square().sum(1)
    distances = []
    for rows in torch.arange(len(codes), device=codes.device).split(_rows(codes)):
        tile = torch.addmm(norms, codes[rows], codes.T, alpha=-2)
        nearest = tile.scatter_(1, rows[:, None], torch.inf).argmin(1)
        distances.append((codes[rows] - codes[nearest]).norm(dim=1))  # of the pair itself: clones are 0.001 apart
    return torch.cat(distances)


@dataclass
class NonStationary:
    """The NS loss (a scalar with a gradient to the codebook alone) and what the softmax says about its sharpness."""

    loss: Tensor
    winner_mass: Tensor  # mean softmax weight of the winner, in (0, 1]
    effective_codes: Tensor  # exp of the mean entropy of the softmax: how many codes a latent pulls


@_without_autocast
def nonstationary_loss(z: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> NonStationary:
    """L_NS = 1/(N d) sum_i sum_{j != q_i} p_ij |z_i - c_j|^2 with p = sg[softmax_j(-|z_i - c_j|^2 / temperature)]
    over all codes, the winner's own mass left out and not redistributed (NSVQ, arXiv 2606.11363, eq. 8-10).

    z [N, d], codebook [K, d], indices [N] (the winners q). z gets no gradient; dL/dC = 2/(N d) (s C - A), with
    s = column sums of the weights [K] and A = weights^T z [K, d].
    """
    if len(z) == 0:
        raise ValueError("the NS loss is a mean over latents, and there are none")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    loss, winner_mass, entropy = _NonStationaryLoss.apply(z.detach(), codebook, indices, temperature)
    return NonStationary(loss, winner_mass, entropy.exp())


class _NonStationaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, codebook, indices, temperature):
        dtype = codebook.dtype
        z, codebook = _float32(z, codebook)
        center = codebook.mean(0)
        z, codebook = z - center, codebook - center
        norms = codebook.square().sum(1)
        weight_sums = torch.zeros_like(norms)  # s [K]
        weighted_latents = torch.zeros_like(codebook)  # A [K, d]
        loss, winner_mass, entropy = (z.new_zeros((), dtype=torch.float64) for _ in range(3))
        rows = _rows(codebook)
        for tile, winners in zip(z.split(rows), indices.split(rows), strict=True):
            distances = torch.addmm(norms, tile, codebook.T, alpha=-2)  # (n, K)
            distances += tile.square().sum(1, keepdim=True)
            distances.clamp_(min=0)
            logits = distances / -temperature
            log_normalizer = logits.logsumexp(1, keepdim=True)
            weights = (logits - log_normalizer).exp_()
            entropy += (log_normalizer.squeeze(1) - (weights * logits).sum(1)).sum()
            winner_mass += weights.gather(1, winners[:, None]).sum()
            weights.scatter_(1, winners[:, None], 0.0)
            loss += distances.mul_(weights).sum(1).sum(dtype=torch.float64)
            weight_sums += weights.sum(0)
            weighted_latents.addmm_(weights.T, tile)
        # The mean code that was taken away cancels in s C - A.
        gradient = weight_sums[:, None] * codebook - weighted_latents
        ctx.save_for_backward((gradient * (2 / z.numel())).to(dtype))
        winner_mass, entropy = (winner_mass / len(z)).float(), (entropy / len(z)).float()
        ctx.mark_non_differentiable(winner_mass, entropy)
        return (loss / z.numel()).float(), winner_mass, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return None, grad_loss * gradient, None, None


def _float32(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"expected z [N, d] and codebook [K, d], got {tuple(z.shape)} and {tuple(codebook.shape)}")
    return z.detach().float(), codebook.detach().float()


def _rows(codebook: Tensor) -> int:
    return max(1, _TILE_ELEMENTS // len(codebook))
