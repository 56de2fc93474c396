"""The codebook engine: exact nearest-code search and the non-stationary loss, streamed, always in float32.

No N x K matrix is ever kept. Distances are |c|^2 - 2 z.c (|z|^2 decides nothing) after the mean code is taken from
both sides, which keeps the cancellation error small for latents far from the origin. On a GPU the passes are Triton
kernels (tokenizer/codebook_triton.py); the tiles here are for the CPU, for any other device, and the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_BLOCK = 64  # codes reduced to their best score by one vectorised maximum, before the best of them is looked for
_CODES = 2048  # codes in a tile of the search: with _LATENTS_PER_THREAD it stays in a core's second-level cache
_LATENTS_PER_THREAD = 128
_MAX_LATENTS = 2048  # in a tile of the search, whatever the number of threads
_LOGITS = 2**24  # float32 elements of a tile of the NS loss, which needs whole rows: 64 MiB
_MIN_ROWS = 64  # latents in such a tile at least: fewer make the matrix products slow


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code by Euclidean distance, ties to the lower index.

    z [N, d], codebook [K, d] (any float dtype) -> indices [N] int64. Raises `ValueError` on other shapes.
    """
    _check(z, codebook)
    return torch.ops.nsvq.nearest_code(z.detach(), codebook.detach(), False)


def nearest_neighbor_distance(codebook: Tensor) -> Tensor:
    """Distance from each code to the nearest other one: codebook [K, d] -> [K] float32. Needs K >= 2."""
    _check(codebook, codebook)
    if len(codebook) < 2:
        raise ValueError("a single code has no neighbor")
    codes = codebook.detach().float()
    nearest = torch.ops.nsvq.nearest_code(codes, codes, True)
    return (codes - codes[nearest]).norm(dim=1)  # of the pair itself: clones are 0.001 apart


@dataclass
class NonStationary:
    """The NS loss (a scalar with a gradient to the codebook alone) and what the softmax says about its sharpness."""

    loss: Tensor
    winner_mass: Tensor  # mean softmax weight of the winner, in (0, 1]
    effective_codes: Tensor  # exp of the mean entropy of the softmax: how many codes a latent pulls
    weight_sums: Tensor | None = None  # s [K], and
    gradient: Tensor | None = None  # dL/dC [K, d], for a method that moves its codes itself


def nonstationary_loss(z: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> NonStationary:
    """L_NS = 1/(N d) sum_i sum_{j != q_i} p_ij |z_i - c_j|^2 with p = sg[softmax_j(-|z_i - c_j|^2 / temperature)]
    over all codes, the winner's own mass left out and not redistributed (NSVQ, arXiv 2606.11363, eq. 8-10).

    z [N, d], codebook [K, d], indices [N] (the winners q). z gets no gradient; dL/dC = 2/(N d) (s C - A), with
    s = column sums of the weights [K] and A = weights^T z [K, d]. Raises `ValueError` on other shapes, without
    latents, and for a temperature that is not positive.
    """
    return _nonstationary(z, codebook, indices, temperature)[1]


def search_with_nonstationary_loss(z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, NonStationary]:
    """`nearest_code` and `nonstationary_loss` in one pass over the distances: what training uses."""
    return _nonstationary(z, codebook, None, temperature)


def _nonstationary(z, codebook, indices, temperature) -> tuple[Tensor, NonStationary]:
    _check(z, codebook)
    if len(z) == 0:
        raise ValueError("the NS loss is a mean over latents, and there are none")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    indices, loss, winner_mass, entropy, s, gradient = torch.ops.nsvq.nonstationary(
        z.detach(), codebook, indices, temperature
    )
    return indices, NonStationary(loss, winner_mass.detach(), entropy.detach().exp(), s.detach(), gradient.detach())


def _check(z: Tensor, codebook: Tensor) -> None:
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"expected z [N, d] and codebook [K, d], got {tuple(z.shape)} and {tuple(codebook.shape)}")


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor a user's choice of TF32 or bfloat16 for float32 products reaches what runs inside."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    per_backend = hasattr(backend, "fp32_precision")  # since torch 2.9, where the old setting may no longer be read
    previous = backend.fp32_precision if per_backend else torch.get_float32_matmul_precision()

    def use(precision: str) -> None:
        if per_backend:
            backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    use("ieee" if per_backend else "highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        use(previous)


def _kernels(z: Tensor) -> ModuleType | None:
    """The Triton kernels where they run: on a GPU, for latents that fit a tile, with Triton there (as on Linux)."""
    if not z.is_cuda:
        return None
    try:
        from tokenizer import codebook_triton
    except ImportError:
        return None
    return codebook_triton if z.shape[1] <= codebook_triton.MAX_DIM else None


# Custom operators, so that torch.compile keeps one graph.


@torch.library.custom_op("nsvq::nearest_code", mutates_args=())
def _nearest_code(z: Tensor, codebook: Tensor, exclude_self: bool) -> Tensor:
    """With `exclude_self`, z is the codebook, and a code is not its own neighbor."""
    with _full_float32(z.device):
        z, codebook = _centered(z, codebook)
        kernels = _kernels(z)
        return kernels.nearest_code(z, codebook, exclude_self) if kernels else _tiled_search(z, codebook, exclude_self)


@_nearest_code.register_fake
def _(z, codebook, exclude_self):
    return z.new_empty(len(z), dtype=torch.int64)


@torch.library.custom_op("nsvq::nonstationary", mutates_args=())
def _nonstationary_operator(
    z: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> indices [N], loss, mean winner mass, mean entropy (nats), s [K], dL/dC [K, d] in the codebook's dtype."""
    dtype = codebook.dtype
    with _full_float32(z.device):
        z, codebook = _centered(z, codebook)
        kernels = _kernels(z)
        softmax_sums = kernels.softmax_sums if kernels else _tiled_softmax_sums
        found, winner_mass, log_total, loss, s, weighted_latents = softmax_sums(z, codebook, indices, temperature)
        # The mean code that was taken away cancels in s C - A.
        gradient = torch.addcmul(weighted_latents.neg(), s[:, None], codebook).mul_(2 / z.numel()).to(dtype)
        # Entropy: the mean of -log p_ij = log sum_k exp(-|z_i - c_k|^2 / temperature) + |z_i - c_j|^2 / temperature.
        whole_loss = loss + (winner_mass * (z - codebook[found]).square().sum(1)).sum(dtype=torch.float64)
        entropy = (log_total.double() - z.square().sum(1) / temperature).mean() + whole_loss / (temperature * len(z))
    found = found.clone() if indices is not None else found  # an operator may not return its input
    return found, (loss / z.numel()).float(), winner_mass.mean(), entropy.float(), s.contiguous(), gradient


@_nonstationary_operator.register_fake
def _(z, codebook, indices, temperature):
    scalar = z.new_empty((), dtype=torch.float32)
    found = z.new_empty(len(z), dtype=torch.int64)
    s = z.new_empty(len(codebook), dtype=torch.float32)
    return found, scalar, scalar.clone(), scalar.clone(), s, torch.empty_like(codebook)


def _keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx, grad_indices, grad_loss, *_):
    (gradient,) = ctx.saved_tensors
    return None, None if grad_loss is None else grad_loss * gradient, None, None


_nonstationary_operator.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _centered(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    codebook = codebook.float()
    center = codebook.mean(0)
    return z.float() - center, codebook - center


# The passes in plain PyTorch. A score is 2 z.c - |c|^2: one matrix product of [z, 1] and the keys [2 c, -|c|^2].


def _keys(codebook: Tensor, scale: float) -> Tensor:
    """[2 c, -|c|^2] times `scale`, with K rounded up to whole blocks by keys that never win: (K', d + 1)."""
    count, dim = codebook.shape
    keys = codebook.new_empty(count + -count % _BLOCK, dim + 1)
    torch.mul(codebook, 2 * scale, out=keys[:count, :dim])
    keys[:count, dim] = codebook.square().sum(1).mul_(-scale)
    keys[count:, :dim], keys[count:, dim] = 0, -torch.inf
    return keys


def _with_ones(z: Tensor) -> Tensor:
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def _tiled_search(z: Tensor, codebook: Tensor, exclude_self: bool) -> Tensor:
    keys, queries = _keys(codebook, 1.0), _with_ones(z)
    blocks = keys.view(-1, _BLOCK, keys.shape[1])  # (K' / B, B, d + 1)
    within = torch.arange(_BLOCK, device=z.device)
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = min(_LATENTS_PER_THREAD * torch.get_num_threads(), _MAX_LATENTS)
    for start in range(0, len(z), rows):
        tile = queries[start : start + rows]  # (n, d + 1)
        tile_indices = torch.arange(start, start + len(tile), device=z.device)
        best = tile.new_empty(len(blocks), len(tile))
        scores = tile.new_empty(min(_CODES, len(keys)), len(tile))
        for first in range(0, len(keys), _CODES):
            part = keys[first : first + _CODES]
            torch.mm(part, tile.T, out=scores[: len(part)])
            if exclude_self:
                own = (tile_indices >= first) & (tile_indices < first + len(part))
                scores[tile_indices[own] - first, own.nonzero().squeeze(1)] = -torch.inf
            of_blocks = scores[: len(part)].view(-1, _BLOCK, len(tile))
            torch.amax(of_blocks, 1, out=best[first // _BLOCK :][: len(of_blocks)])
        block = best.max(0).indices  # (n,), the first of equals
        scores = torch.bmm(blocks[block], tile[:, :, None]).squeeze(2)  # (n, B)
        if exclude_self:
            scores[block[:, None] * _BLOCK + within == tile_indices[:, None]] = -torch.inf
        indices[start : start + rows] = block * _BLOCK + scores.argmax(1)
    return indices


def _tiled_softmax_sums(
    z: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> winners [N], their probability [N], log sum_j exp((2 z_i.c_j - |c_j|^2) / temperature) [N],
    sum_ij w_ij |z_i - c_j|^2 (float64), s = sum_i w_ij [K], A = w^T z [K, d], with w the softmax without the winner."""
    keys, queries = _keys(codebook, 1 / temperature), _with_ones(z)
    latents = torch.cat([queries, z.square().sum(1, keepdim=True)], 1)  # [z, 1, |z|^2]
    sums = z.new_zeros(len(keys), latents.shape[1])  # their sums with the weights: [A, s, sum_i w_ij |z_i|^2]
    winners = torch.empty(len(z), dtype=torch.int64, device=z.device)
    winner_mass, log_total = z.new_empty(len(z)), z.new_empty(len(z))
    rows = max(_MIN_ROWS, _LOGITS // len(keys))
    buffer = z.new_empty(min(rows, len(z)), len(keys))
    for start in range(0, len(z), rows):
        tile = slice(start, min(start + rows, len(z)))
        logits = torch.mm(queries[tile], keys.T, out=buffer[: tile.stop - start])  # (n, K')
        blocks = logits.view(len(logits), -1, _BLOCK)
        best, block = blocks.amax(2).max(1)
        nearest = block * _BLOCK + blocks[torch.arange(len(logits), device=z.device), block].argmax(1)
        winners[tile] = nearest if indices is None else indices[tile]
        # Below e^-60 a weight is nothing beside the winner's, and subnormal numbers slow the products tenfold.
        weights = torch.softmax(torch.maximum(logits, best[:, None] - 60, out=logits), 1, out=logits)
        log_total[tile] = best - weights.gather(1, nearest[:, None]).squeeze(1).log()
        winner_mass[tile] = weights.gather(1, winners[tile, None]).squeeze(1)
        weights.scatter_(1, winners[tile, None], 0.0)
        sums.addmm_(weights.T, latents[tile])
    sums = sums[: len(codebook)]
    weighted_latents, s, squares = sums[:, :-2], sums[:, -2], sums[:, -1]
    norms, products = codebook.square().sum(1), (weighted_latents * codebook).sum(1)
    loss = (s * norms - 2 * products + squares).sum(dtype=torch.float64)
    return winners, winner_mass, log_total, loss, s, weighted_latents
