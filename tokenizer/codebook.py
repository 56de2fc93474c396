"""The codebook engine: exact nearest-code search and the non-stationary loss, streamed, always in float32.

No N x K matrix is ever kept. Distances are |c|^2 - 2 z.c (|z|^2 decides nothing) after the mean code is taken from
both sides, which keeps the cancellation error small for latents far from the origin. On a GPU the passes are Triton
kernels (tokenizer/codebook_triton.py); the tiles here are for the CPU, for any other device, and the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_BLOCK = 64  # codes reduced to their best score by one vectorised operation, before the best of them is looked for
_CODES = 2048  # codes in a tile of the search: with _LATENTS_PER_THREAD it stays in a core's second-level cache
_LATENTS_PER_THREAD = 128
_MAX_LATENTS = 2048  # in a tile of the search, whatever the number of threads
_GATHERED = 64  # blocks copied at a time for their float32 scores, for the same cache
_FILTER_FROM = (32, 1024, 4096)  # channels, latents and codes from which on the bfloat16 filter pays
_RECHECKS = 4  # blocks that it may leave open, beside the first, for an average latent
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


# The passes in plain PyTorch. A score is 2 z.c - |c|^2: one matrix product of [z, 1] and the keys [2 c, -|c|^2]. The
# search looks for the least of its opposite.


def _keys(codebook: Tensor, scale: float) -> Tensor:
    """[2 c, -|c|^2] times `scale`, with K rounded up to whole blocks by keys that never win: (K', d + 1)."""
    count, dim = codebook.shape
    keys = codebook.new_empty(count + -count % _BLOCK, dim + 1)
    torch.mul(codebook, 2 * scale, out=keys[:count, :dim])
    keys[:count, dim] = codebook.square().sum(1).mul_(-scale)
    keys[count:, :dim], keys[count:, dim] = 0, -scale * torch.inf
    return keys


def _with_ones(z: Tensor) -> Tensor:
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def _tiled_search(z: Tensor, codebook: Tensor, exclude_self: bool) -> Tensor:
    bounds = _lower_bounds(z, codebook) if _filter_pays(z, codebook) else None
    keys, queries = _keys(codebook, -1.0), _with_ones(z)
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = _LATENTS_PER_THREAD * torch.get_num_threads() * (2 if bounds else 1)  # bfloat16 takes half the room
    rows = min(rows, _MAX_LATENTS)
    for start in range(0, len(z), rows):
        tile = slice(start, min(start + rows, len(z)))
        own = torch.arange(start, tile.stop, device=z.device) if exclude_self else None
        found = _filtered_search(keys, queries[tile], own, bounds, tile) if bounds else None
        if found is None:
            bounds = None  # codes too close for bfloat16 to tell apart: the next latents would fare no better
            block = _least_of_blocks(keys, queries[tile], own).min(0).indices  # (n,), the first of equals
            found = _least_within(keys, block, queries[tile], own)[1]
        indices[tile] = found
    return indices


def _least_of_blocks(keys: Tensor, queries: Tensor, own: Tensor | None) -> Tensor:
    """Least score in each block of keys but for a query's own: (K' / B, n). bfloat16 scores are returned and compared
    as int16, many times as fast: positive ones keep their order, and negative ones stay below them."""
    dtype = torch.int16 if queries.dtype == torch.bfloat16 else queries.dtype
    least = queries.new_empty(len(keys) // _BLOCK, len(queries), dtype=dtype)
    scores = queries.new_empty(min(_CODES, len(keys)), len(queries))
    for first in range(0, len(keys), _CODES):
        part = scores[: len(keys) - first]
        torch.mm(keys[first : first + _CODES], queries.T, out=part)
        if own is not None:
            inside = (own >= first) & (own < first + len(part))
            part[own[inside] - first, inside.nonzero().squeeze(1)] = torch.inf
        of_blocks = part.view(dtype).view(-1, _BLOCK, len(queries))
        torch.amin(of_blocks, 1, out=least[first // _BLOCK :][: len(of_blocks)])
    return least


def _least_within(keys: Tensor, block: Tensor, queries: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least float32 score of each query in one block, and its index, the first of equals. Always products of one shape:
    another may round differently, and twins must tie."""
    blocks = keys.view(-1, _BLOCK, keys.shape[1])  # (K' / B, B, d + 1)
    copies, vectors = keys.new_zeros(_GATHERED, *blocks.shape[1:]), keys.new_zeros(_GATHERED, keys.shape[1], 1)
    scores = keys.new_empty(len(queries), _BLOCK)
    for some, of_some, out in zip(
        block.split(_GATHERED), queries.split(_GATHERED), scores.split(_GATHERED), strict=True
    ):
        torch.index_select(blocks, 0, some, out=copies[: len(some)])
        vectors[: len(some), :, 0] = of_some
        out.copy_(torch.bmm(copies, vectors)[: len(some), :, 0])
    if own is not None:
        within = torch.arange(_BLOCK, device=keys.device)
        scores[block[:, None] * _BLOCK + within == own[:, None]] = torch.inf
    score, at = scores.min(1)
    return score, block * _BLOCK + at


# The filter: where the CPU has a matrix unit for bfloat16, lower bounds of all distances cost a quarter of a float32
# product, and leave few blocks whose distances must be looked at in float32.


@cache
def _has_bfloat16_tiles() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    return torch.backends.mkldnn.is_available() and supported()


def _filter_pays(z: Tensor, codebook: Tensor) -> bool:
    dim, latents, codes = _FILTER_FROM
    large = z.shape[1] >= dim and len(z) >= latents and len(codebook) >= codes
    return large and z.device.type == "cpu" and torch.backends.mkldnn.enabled and _has_bfloat16_tiles()


def _lower_bounds(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys (K', d + 6) and queries (N, d + 6) in bfloat16 whose products are below all |z_i - c_j|^2, and |z|^2 [N].

    With z' and c' rounded to bfloat16, z.c <= z'.c' + |z - z'||c| + |z'||c - c'|. The margin taken from |z|^2 + |c|^2
    (>= 2 |z||c|) is more than float32 rounding here and in the distances, and the rounding of the squares, can add up
    to. None where a number is not finite, or where squares could overflow, or underflow beyond the second margin.
    """
    dim, margin = z.shape[1], (z.shape[1] + 64) * 2**-20
    norms, code_norms = z.norm(dim=1), codebook.norm(dim=1)
    largest = float(torch.cat([norms, code_norms]).max())
    if not 2**-20 < largest < 2**60:
        return None
    squares = norms.square() * (1 - margin) - largest**2 * 2**-30
    queries = _bound_columns(z, norms, squares, 1, len(z))
    rows = len(codebook) + -len(codebook) % _BLOCK
    keys = _bound_columns(codebook, code_norms, code_norms.square() * (1 - margin), -2, rows)
    keys[:, dim:] = keys[:, dim:][:, [2, 3, 0, 1, 5, 4]]  # squares meet ones, and |c| meets |z - z'|
    keys[len(codebook) :, dim + 2] = torch.inf
    return keys, queries, norms.square()


def _bound_columns(x: Tensor, norms: Tensor, squares: Tensor, factor: int, rows: int) -> Tensor:
    """[factor x', the squares as a sum of two, 1, 1, factor |x|, factor |x - x'|], with rows of ones after the last."""
    count, dim = x.shape
    columns = x.new_ones(rows, dim + 6, dtype=torch.bfloat16)
    columns[:count, dim] = squares
    columns[:count, dim + 1] = squares - columns[:count, dim]
    columns[:count, dim + 4] = 1.02 * factor * norms  # not below |x'| < 1.005 |x|, though rounded by up to 0.4%
    for part, rounded in zip(x.split(_CODES), columns[:count].split(_CODES), strict=True):
        rounded[:, :dim] = part
        rounded[:, dim + 5] = 1.02 * factor * (part - rounded[:, :dim]).norm(dim=1)
        rounded[:, :dim] *= factor
    return columns


def _filtered_search(
    keys: Tensor, queries: Tensor, own: Tensor | None, bounds: tuple[Tensor, Tensor, Tensor], tile: slice
) -> Tensor | None:
    """Nearest codes by float32 distances in the blocks that the bounds leave open, or None if these are too many."""
    bound_keys, bound_queries, squares = bounds
    least = _least_of_blocks(bound_keys, bound_queries[tile], own)
    block = least.min(0).indices
    score, found = _least_within(keys, block, queries, own)
    reach = (squares[tile] + score).clamp(min=1e-30).bfloat16()  # rounded as the bounds were, so that order remains
    still_open = least <= reach.view(torch.int16)
    still_open[block, torch.arange(len(queries))] = False
    block, row = still_open.nonzero(as_tuple=True)
    if len(row) > _RECHECKS * len(queries):
        return None
    scores, indices = _least_within(keys, block, queries[row], None if own is None else own[row])
    best = score.scatter_reduce(0, row, scores, "amin")
    found = torch.where(score == best, found, len(keys))
    return found.scatter_reduce(0, row, torch.where(scores == best[row], indices, len(keys)), "amin")


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
