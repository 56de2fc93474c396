"""The passes of tokenizer/codebook.py in plain PyTorch: for the CPU, for any other device, and as the reference.

A score is |c|^2 - 2 z.c: one matrix product of keys [-2 c, |c|^2, 1] and queries [z, 1, 0], a tile at a time. The
search reduces blocks of codes to their least score before it looks for an index. The NS loss then visits either all
codes, or only those blocks in which the search has left a latent a code whose weight is not negligible."""

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_BLOCK = 64  # codes reduced to their best score by one vectorised operation, before the best of them is looked for
_CODES = 2048  # codes in a tile: with _LATENTS_PER_THREAD it stays in a core's second-level cache
_LATENTS_PER_THREAD = 128
_MAX_LATENTS = 2048  # in a tile of the search, whatever the number of threads
_GATHERED = 64  # blocks copied at a time for their float32 scores, for the same cache
_FILTER_FROM = (32, 1024, 4096)  # channels, latents and codes from which on the bfloat16 filter pays
_RECHECKS = 4  # blocks that it may leave open, beside the first, for an average latent
_NEGLIGIBLE = 60.0  # a weight below e^-60 of the nearest code's is nothing, and subnormal numbers slow everything
_LEAST_POWER = -_NEGLIGIBLE * math.log2(math.e)
_WEIGHTS = 2**24  # float32 weights kept at a time: 64 MiB
_MIN_LATENTS = 64  # whose weights are kept at a time: fewer make the matrix products slow
_PAIRS = 2**23  # of a block and a latent that are told apart at a time, a byte each
_LEAST_TEMPERATURE = 1e-6  # of a latent's |z|^2, to which float32 knows its distances
_SPARSE_FROM = 512  # latents from which on visiting some blocks alone can pay,
_SPARSE_SHARE = 1 / 8  # and the share of pairs up to which it does


def nearest_code(z: Tensor, codebook: Tensor, exclude_self: bool) -> Tensor:
    """z [N, d], codebook [K, d], float32 -> indices [N] int64. With `exclude_self`, z is the codebook, and a code is
    not its own neighbor."""
    return _Search(z, codebook, exclude_self).find(slice(0, len(z)))[0]


def softmax_sums(
    z: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float, own: bool
) -> tuple[Tensor, ...]:
    """-> winners [N], their probability [N], the softmax's mean entropy in nats (float64), sum_ij w_ij |z_i - c_j|^2
    (float64), s = sum_i w_ij [K], A = w^T z [K, d], with w the softmax without the winner. With `own`, the temperature
    is in units of a latent's squared distance to its nearest code."""
    search = _Search(z, codebook)
    keys = search.keys  # (K', d + 2)
    latents = torch.cat([z, z.new_ones(len(z), 1), z.square().sum(1, keepdim=True)], 1).T.contiguous()  # [z, 1, |z|^2]
    # With a temperature for each, a latent has next to no codes of negligible weight.
    apiece = own or temperature < _LEAST_TEMPERATURE * float(latents[-1].max())
    sums = z.new_zeros(len(latents), len(keys))  # of these with the weights: [A, s, sum_i w_ij |z_i|^2], transposed
    winners = torch.empty(len(z), dtype=torch.int64, device=z.device)
    winner_mass, log_total, entropy = z.new_empty(len(z)), z.new_empty(len(z)), z.new_empty(len(z))
    in_tile = min(_latents_in_tile(z.device), max(_MIN_LATENTS, _WEIGHTS // len(keys)))
    buffer = z.new_empty(len(keys) * min(in_tile, len(z)))
    for rows in _slices(0, len(z), max(_MIN_LATENTS, _PAIRS * _BLOCK // len(keys))):
        nearest, score, near = search.find(rows, None if apiece else _NEGLIGIBLE * temperature)
        winners[rows] = nearest if indices is None else indices[rows]
        tau = temperatures(temperature, score if own else None, latents[-1, rows])[:, None] if apiece else temperature
        # Exponents of 2, relative to the nearest code's: exp2 is many times as fast as exp on some CPUs.
        queries = torch.cat([search.queries[rows, :-1], -score[:, None]], 1).mul_(-math.log2(math.e) / tau)
        pairs = 0 if near is None else int(near.sum())
        sparse = near is not None and z.device.type == "cpu" and len(score) >= _SPARSE_FROM
        sparse = sparse and pairs <= _SPARSE_SHARE * near.numel() and bool(score.isfinite().all())
        in_slice = max(_MIN_LATENTS, len(score) * _WEIGHTS // (pairs * _BLOCK)) if sparse else in_tile
        for some in _slices(0, len(score), in_slice):
            here = slice(rows.start + some.start, rows.start + some.stop)
            arguments = (sums, keys, queries[some], latents[:, here], winners[here])
            if apiece:
                of_winner, total, powers = _add_all(*arguments, buffer, powers=True)
                entropy[here] = total.log() - math.log(2) * powers / total
            else:
                of_winner, total = _add_near(*arguments, near[:, some]) if sparse else _add_all(*arguments, buffer)
                log_total[here] = total.log() - score[some] / temperature
            winner_mass[here] = of_winner / total
    sums = sums[:, : len(codebook)]
    weighted_latents, s, squares = sums[:-2].T.contiguous(), sums[-2].clone(), sums[-1]
    norms, products = codebook.square().sum(1), (weighted_latents * codebook).sum(1)
    loss = (s * norms - 2 * products + squares).sum(dtype=torch.float64)
    if apiece:
        mean_entropy = entropy.mean(dtype=torch.float64)
    else:
        mean_entropy = entropy_of(z, codebook[winners], winner_mass, log_total, temperature, loss / temperature)
    return winners, winner_mass, mean_entropy, loss, s, weighted_latents


def temperatures(temperature: float, score: Tensor | None, squares: Tensor) -> Tensor:
    """tau of each latent [N]: constant, or in units of its squared distance to the nearest code, by that code's `score`
    |c|^2 - 2 z.c and |z|^2 [N]. A distance is not known to be less than its rounding."""
    if score is None:
        return (_LEAST_TEMPERATURE * squares).clamp(min=temperature)
    return temperature * torch.maximum(squares + score, 1e-5 * squares).clamp(min=1e-20)


def entropy_of(z, winner_codes, winner_mass, log_total, tau, scaled_loss) -> Tensor:
    """Mean over latents of the softmax's entropy. -log p_ij is log sum_k exp(-|z_i - c_k|^2 / tau_i) + |z_i - c_j|^2 /
    tau_i, with log sum_j exp((2 z_i.c_j - |c_j|^2) / tau_i) in `log_total`, and in `scaled_loss` the sum of
    p_ij |z_i - c_j|^2 / tau_i but for the winners, in float64."""
    of_winners = (winner_mass * (z - winner_codes).square().sum(1) / tau).sum(dtype=torch.float64)
    return (log_total.double() - z.square().sum(1) / tau).mean() + (scaled_loss + of_winners) / len(z)


def _add_all(sums, keys, queries, latents, winners, buffer, powers: bool = False) -> tuple[Tensor, ...]:
    """Add the sums of n latents with their softmax, without the winner, over all codes. Keys (K', d + 2) and queries
    (n, d + 2) make the exponents, latents (d + 2, n) the sums (d + 2, K'). -> the winners' weights [n] and all weights'
    sums [n], both relative to the nearest code's; with `powers` also the weights' sums times their exponents [n]."""
    weights = buffer[: len(keys) * len(queries)].view(len(keys), len(queries))
    total, times = queries.new_zeros(len(queries)), queries.new_zeros(len(queries))
    for codes, part in zip(keys.split(_CODES), weights.split(_CODES), strict=True):
        torch.mm(codes, queries.T, out=part)
        exponents = part.clone() if powers else None
        total += _powers(part).sum(0)
        if exponents is not None:
            times += exponents.clamp_(min=_LEAST_POWER).mul_(part).sum(0)
    of_winner = weights.gather(0, winners[None]).squeeze(0)
    weights.scatter_(0, winners[None], 0.0)
    sums.addmm_(latents / total, weights.T)
    return (of_winner, total, times) if powers else (of_winner, total)


def _add_near(sums, keys, queries, latents, winners, near) -> tuple[Tensor, Tensor]:
    """`_add_all` over the blocks of codes that are near a latent: (K' / B, n) bool."""
    block, row = near.nonzero(as_tuple=True)  # block by block
    of_blocks = near.sum(1).tolist()
    weights = queries.new_empty(len(row), _BLOCK)
    for rows, codes, part in zip(row.split(of_blocks), keys.split(_BLOCK), weights.split(of_blocks), strict=True):
        torch.mm(queries[rows], codes.T, out=part)
    _powers(weights)
    total = queries.new_zeros(len(queries)).index_add_(0, row, weights.sum(1))

    # A winner that the caller chose may be far away, and its weight nothing.
    wanted = winners // _BLOCK * len(queries) + torch.arange(len(queries))
    pairs = block * len(queries) + row
    at = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    found = pairs[at] == wanted
    at, within = at[found], winners[found] % _BLOCK
    of_winner = torch.zeros_like(total)
    of_winner[found] = weights[at, within]
    weights[at, within] = 0.0

    normalized = (latents / total).T.contiguous()  # (n, d + 2)
    for rows, part, out in zip(row.split(of_blocks), weights.split(of_blocks), sums.split(_BLOCK, dim=1), strict=True):
        out.addmm_(normalized[rows].T, part)
    return of_winner, total


def _powers(exponents: Tensor) -> Tensor:
    """2 to these, in place, but never a subnormal number."""
    return exponents.clamp_(min=_LEAST_POWER).exp2_()


class _Search:
    """Nearest codes by float32 distances, a tile of latents at a time."""

    def __init__(self, z: Tensor, codebook: Tensor, exclude_self: bool = False):
        self.keys, self.exclude_self = _keys(codebook), exclude_self
        self.queries = torch.cat([z, z.new_ones(len(z), 1), z.new_zeros(len(z), 1)], 1)
        self.bounds = _lower_bounds(z, codebook) if _filter_pays(z, codebook) else None

    def find(self, rows: slice, reach: float | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> indices and scores [n] of the nearest codes, and with a `reach` (K' / B, n) whether a block may hold a
        code whose squared distance is at most that much larger."""
        device = self.queries.device
        count = rows.stop - rows.start
        indices = torch.empty(count, dtype=torch.int64, device=device)
        scores = self.queries.new_empty(count)
        near = None if reach is None else torch.empty(len(self.keys) // _BLOCK, count, dtype=torch.bool, device=device)
        size = _latents_in_tile(device) * (2 if self.bounds else 1)  # bfloat16 takes half the room
        for tile in _slices(rows.start, rows.stop, size):
            out = slice(tile.start - rows.start, tile.stop - rows.start)
            own = torch.arange(tile.start, tile.stop, device=device) if self.exclude_self else None
            found = (
                _filtered_search(self.keys, self.queries[tile], own, self.bounds, tile, reach) if self.bounds else None
            )
            if found is None:
                self.bounds = None  # codes too close for bfloat16 to tell apart: the next latents would fare no better
                found = _plain_search(self.keys, self.queries[tile], own, reach)
            indices[out], scores[out] = found[:2]
            if near is not None:
                near[:, out] = found[2]
        return indices, scores, near


def _latents_in_tile(device: torch.device) -> int:
    if device.type != "cpu":
        return _MAX_LATENTS
    return min(_LATENTS_PER_THREAD * torch.get_num_threads(), _MAX_LATENTS)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _keys(codebook: Tensor) -> Tensor:
    """[-2 c, |c|^2, 1], with K rounded up to whole blocks by keys that never win: (K', d + 2)."""
    count, dim = codebook.shape
    keys = codebook.new_empty(count + -count % _BLOCK, dim + 2)
    torch.mul(codebook, -2, out=keys[:count, :dim])
    keys[:count, dim] = codebook.square().sum(1)
    keys[count:, :dim], keys[count:, dim] = 0, torch.inf
    keys[:, dim + 1] = 1
    return keys


def _plain_search(keys, queries, own, reach) -> tuple[Tensor, Tensor, Tensor | None]:
    least = _least_of_blocks(keys, queries, own)
    block = least.min(0).indices  # (n,), the first of equals
    score, found = _least_within(keys, block, queries, own)
    return found, score, None if reach is None else least <= score + reach


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
    """Least float32 score of each query in one block, and its index, the first of equals. Sums of products, since a
    matrix product may round a code's score by the place it has in it, and twins must tie."""
    blocks = keys.view(-1, _BLOCK, keys.shape[1])  # (K' / B, B, d + 2)
    copies, scores = keys.new_empty(_GATHERED, *blocks.shape[1:]), keys.new_empty(len(queries), _BLOCK)
    parts = (each.split(_GATHERED) for each in (block, queries, scores))
    for some, of_some, out in zip(*parts, strict=True):
        products = torch.index_select(blocks, 0, some, out=copies[: len(some)]).mul_(of_some[:, None])
        torch.sum(products, 2, out=out)
    if own is not None:
        within = torch.arange(_BLOCK, device=keys.device)
        scores[block[:, None] * _BLOCK + within == own[:, None]] = torch.inf
    score, at = scores.min(1)
    return score, block * _BLOCK + at


# The filter: where the CPU multiplies bfloat16 numbers faster, lower bounds of all distances cost half of a float32
# product, or a quarter on a matrix unit, and leave few blocks whose distances must be looked at in float32.


@cache
def _has_fast_bfloat16() -> bool:
    supported = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16"))
    return torch.backends.mkldnn.is_available() and any(check() for check in supported)


def _filter_pays(z: Tensor, codebook: Tensor) -> bool:
    dim, latents, codes = _FILTER_FROM
    large = z.shape[1] >= dim and len(z) >= latents and len(codebook) >= codes
    return large and z.device.type == "cpu" and torch.backends.mkldnn.enabled and _has_fast_bfloat16()


def _lower_bounds(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys (K', d + 6) and queries (N, d + 6) in bfloat16 whose products are below all |z_i - c_j|^2, and |z|^2 [N].

    With z' and c' rounded to bfloat16, z.c <= z'.c' + |z - z'||c| + |z'||c - c'|. The margin taken from |z|^2 + |c|^2
    (>= 2 |z||c|) is more than float32 rounding here and in the distances, and the rounding of the squares, can add up
    to. None where a number is not finite, or where squares could overflow, or underflow beyond the second margin."""
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


def _filtered_search(keys, queries, own, bounds, tile, reach) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`_plain_search` by float32 distances in the blocks that the bounds leave open, or None if these are too many."""
    bound_keys, bound_queries, squares = bounds
    least = _least_of_blocks(bound_keys, bound_queries[tile], own)

    def within(score: Tensor) -> Tensor:
        """Blocks whose bound does not exceed a score: both rounded, so that order remains."""
        return least <= (squares[tile] + score).clamp(min=1e-30).bfloat16().view(torch.int16)

    block = least.min(0).indices
    score, found = _least_within(keys, block, queries, own)
    still_open = within(score)
    still_open[block, torch.arange(len(queries))] = False
    block, row = still_open.nonzero(as_tuple=True)
    if len(row) > _RECHECKS * len(queries):
        return None
    scores, indices = _least_within(keys, block, queries[row], None if own is None else own[row])
    best = score.scatter_reduce(0, row, scores, "amin")
    found = torch.where(score == best, found, len(keys))
    found = found.scatter_reduce(0, row, torch.where(scores == best[row], indices, len(keys)), "amin")
    return found, best, None if reach is None else within(best + reach)
