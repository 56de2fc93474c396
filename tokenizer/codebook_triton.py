"""The passes of tokenizer/codebook.py as Triton kernels: search with softmax normaliser, and the softmax's sums.

Both recompute the scores tile by tile, as FlashAttention does, so that nothing of size N x K is written. Every sum has
one owner and a fixed order (no atomics): the same input gives the same bits. Products are float32-accurate: three-term
TF32 on NVIDIA's tensor cores, IEEE elsewhere. With TRITON_INTERPRET=1 the kernels run on the CPU."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsvq.tokenizer.codebook_tiles import entropy_of, temperatures

MAX_DIM = 256  # of a [codes, dim] sum in registers; wider latents take the plain path
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_PROGRAMS = 1024  # a grid with fewer programs than this is split further along the reduced axis: several waves of a GPU
_CHUNK = 32  # columns multiplied at a time


class Tile(NamedTuple):
    """What a program holds at a time. Sums depend on it in their last bits, so it is fixed for a GPU, not tuned in each
    run: `benchmarks/tiles.py` times others."""

    latents: int
    codes: int
    warps: int
    stages: int


SEARCH = Tile(64, 64, 8, 3)


def sums_tile(dim: int, device: torch.device) -> Tile:
    """Of the second pass: what the registers hold beside its [codes, dim] sum."""
    hopper = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9
    return Tile(64, 64, 8, 2) if hopper and dim <= 128 else Tile(16, 32, 4, 2)


@triton.jit
def _tile(pointer, rows, count, dim, columns):
    """Rows of a [count, dim] matrix, zero outside it."""
    mask = (rows < count)[:, None] & (columns < dim)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * dim + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _products(
    a,
    b,
    a_rows,
    b_rows,
    a_count,
    b_count,
    dim,
    precision: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """a b^T for A rows of one matrix and B rows of another -> [A, B], CHUNK columns at a time to spare registers."""
    products = tl.zeros([A, B], tl.float32)
    for first in range(0, dim, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        left, right = _tile(a, a_rows, a_count, dim, columns), _tile(b, b_rows, b_count, dim, columns)
        products = tl.dot(left, tl.trans(right), products, input_precision=precision)
    return products


@triton.jit
def _search_kernel(
    z,
    codebook,
    norms,
    best_out,
    index_out,
    total_out,
    latent_count,
    code_count,
    dim,
    scales,
    codes_per_split,
    exclude_self: tl.constexpr,
    normalize: tl.constexpr,
    precision: tl.constexpr,
    LATENTS: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Best score, its code and sum exp(score - best) of LATENTS latents in one part of the codebook -> [splits, N].
    With `normalize`, scores are times the latents' `scales` [N]."""
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    if normalize:
        scale = tl.load(scales + latents, mask=latents < latent_count, other=1.0)
    first = tl.program_id(1) * codes_per_split
    best = tl.full([LATENTS], float("-inf"), tl.float32)
    index = tl.full([LATENTS], 0, tl.int32) + first
    total = tl.zeros([LATENTS], tl.float32)
    for start in range(first, tl.minimum(first + codes_per_split, code_count), CODES):
        codes = start + tl.arange(0, CODES)
        norm = tl.load(norms + codes, mask=codes < code_count, other=float("inf"))
        products = _products(
            z, codebook, latents, codes, latent_count, code_count, dim, precision, LATENTS, CODES, CHUNK
        )
        scores = 2 * products - norm[None, :]  # (LATENTS, CODES)
        if normalize:
            scores = scores * scale[:, None]
        if exclude_self:
            scores = tl.where(latents[:, None] == codes[None, :], float("-inf"), scores)
        tile_best, tile_index = tl.max(scores, 1, return_indices=True)  # the first of equals
        index = tl.where(tile_best > best, start + tile_index, index)
        if normalize:
            shift = tl.maximum(best, tile_best)
            total = total * tl.exp(best - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        best = tl.maximum(best, tile_best)
    place = tl.program_id(1).to(tl.int64) * latent_count + latents
    tl.store(best_out + place, best, mask=latents < latent_count)
    tl.store(index_out + place, index, mask=latents < latent_count)
    if normalize:
        tl.store(total_out + place, total, mask=latents < latent_count)


@triton.jit
def _softmax_sums_kernel(
    z,
    codebook,
    squares,
    norms,
    normalizer,
    winners,
    loss_out,
    scaled_out,
    weight_out,
    latent_out,
    latent_count,
    code_count,
    dim,
    scales,
    latents_per_split,
    precision: tl.constexpr,
    LATENTS: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
):
    """For CODES codes, over one part of the latents, with w the softmax without the winner: sum_i w_ij |z_i - c_j|^2,
    the same times `scales` [N], and s -> [splits, K], A -> [splits, K, d]."""
    codes = tl.program_id(0) * CODES + tl.arange(0, CODES)
    columns = tl.arange(0, DIM)
    first = tl.program_id(1) * latents_per_split
    norm = tl.load(norms + codes, mask=codes < code_count, other=0.0)
    loss = tl.zeros([CODES], tl.float32)
    scaled = tl.zeros([CODES], tl.float32)
    weight_sum = tl.zeros([CODES], tl.float32)
    latent_sum = tl.zeros([CODES, DIM], tl.float32)
    for start in range(first, tl.minimum(first + latents_per_split, latent_count), LATENTS):
        latents = start + tl.arange(0, LATENTS)
        inside = latents < latent_count
        square = tl.load(squares + latents, mask=inside, other=0.0)
        log_total = tl.load(normalizer + latents, mask=inside, other=float("inf"))
        winner = tl.load(winners + latents, mask=inside, other=-1)
        scale = tl.load(scales + latents, mask=inside, other=1.0)
        products = _products(
            codebook, z, codes, latents, code_count, latent_count, dim, precision, CODES, LATENTS, CHUNK
        )
        scores = 2 * products - norm[:, None]  # (CODES, LATENTS)
        weights = tl.exp(scores * scale[None, :] - log_total[None, :])
        weights = tl.where((codes[:, None] == winner[None, :]) | (codes >= code_count)[:, None], 0.0, weights)
        parts = weights * tl.maximum(square[None, :] - scores, 0.0)
        loss += tl.sum(parts, 1)
        scaled += tl.sum(parts * scale[None, :], 1)
        weight_sum += tl.sum(weights, 1)
        tile = _tile(z, latents, latent_count, dim, columns)  # (LATENTS, DIM)
        latent_sum = tl.dot(weights, tile, latent_sum, input_precision=precision)
    place = tl.program_id(1).to(tl.int64) * code_count + codes
    tl.store(loss_out + place, loss, mask=codes < code_count)
    tl.store(scaled_out + place, scaled, mask=codes < code_count)
    tl.store(weight_out + place, weight_sum, mask=codes < code_count)
    mask = (codes < code_count)[:, None] & (columns < dim)[None, :]
    tl.store(latent_out + place[:, None] * dim + columns[None, :], latent_sum, mask=mask)


def nearest_code(z: Tensor, codebook: Tensor, exclude_self: bool, tile: Tile = SEARCH) -> Tensor:
    """z [N, d], codebook [K, d], float32 on the GPU -> indices [N] int64."""
    return _search(z, codebook, None, exclude_self, tile)[0]


def softmax_sums(
    z: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float, own: bool, tile: Tile | None = None
) -> tuple[Tensor, ...]:
    """As in tokenizer/codebook_tiles.py, for tensors on the GPU. `tile`: of the second pass."""
    z, codebook = z.contiguous(), codebook.contiguous()
    (latent_count, dim), code_count = z.shape, len(codebook)
    squares = z.square().sum(1)
    score = None
    if own:
        nearest = codebook[nearest_code(z, codebook, False)]
        score = ((nearest - 2 * z) * nearest).sum(1)
    tau = temperatures(temperature, score, squares)
    scales = 1 / tau
    found, log_total = _search(z, codebook, scales, False, SEARCH)
    winners = found if indices is None else indices
    winner_codes = codebook[winners]
    winner_mass = (((2 * z - winner_codes) * winner_codes).sum(1) * scales - log_total).exp().clamp(max=1)

    latents, codes, warps, stages = tile or sums_tile(dim, z.device)
    code_tiles = triton.cdiv(code_count, codes)
    padded = _padded(dim)
    splits, per_split = _split(latent_count, latents, _PROGRAMS // code_tiles)
    loss, scaled, weight_sum = (z.new_empty(splits, code_count) for _ in range(3))
    latent_sum = z.new_empty(splits, code_count, dim)
    inputs = (z, codebook, squares, codebook.square().sum(1), log_total, winners.int())
    sizes = (latent_count, code_count, dim, scales, per_split)
    constants = (_PRECISION, latents, codes, min(_CHUNK, padded), padded)
    with torch.cuda.device_of(z):  # Triton launches on the current device, whichever the tensors are on
        _softmax_sums_kernel[(code_tiles, splits)](
            *inputs, loss, scaled, weight_sum, latent_sum, *sizes, *constants, num_warps=warps, num_stages=stages
        )
    mean_entropy = entropy_of(z, winner_codes, winner_mass, log_total, tau, scaled.sum(dtype=torch.float64))
    return winners, winner_mass, mean_entropy, loss.sum(dtype=torch.float64), weight_sum.sum(0), latent_sum.sum(0)


def _search(z, codebook, scales, exclude_self, tile) -> tuple[Tensor, Tensor | None]:
    """-> indices [N] int64, and with the latents' `scales` [N] log sum_j exp(scale_i score_ij) [N]."""
    normalize = scales is not None
    z, codebook = z.contiguous(), codebook.contiguous()
    (latent_count, dim), code_count = z.shape, len(codebook)
    latents, codes, warps, stages = tile
    latent_tiles = triton.cdiv(latent_count, latents)
    if latent_count == 0:
        return torch.empty(0, dtype=torch.int64, device=z.device), None
    splits, per_split = _split(code_count, codes, _PROGRAMS // latent_tiles)
    best = z.new_empty(splits, latent_count)
    index, total = torch.empty_like(best, dtype=torch.int32), torch.empty_like(best) if normalize else best
    inputs = (z, codebook, codebook.square().sum(1))
    sizes = (latent_count, code_count, dim, scales if normalize else best, per_split)
    constants = (exclude_self, normalize, _PRECISION, latents, codes, min(_CHUNK, _padded(dim)))
    with torch.cuda.device_of(z):
        _search_kernel[(latent_tiles, splits)](
            *inputs, best, index, total, *sizes, *constants, num_warps=warps, num_stages=stages
        )
    overall, split = best.max(0)  # the first of equals: the lower index
    indices = index.gather(0, split[None]).squeeze(0).long()
    return indices, overall + (total * (best - overall).exp()).sum(0).log() if normalize else None


def _split(count: int, tile: int, wanted: int) -> tuple[int, int]:
    """How many parts, and how many elements in each, when `count` is cut into about `wanted` parts of whole tiles."""
    tiles = triton.cdiv(count, tile)
    per_split = triton.cdiv(tiles, max(1, min(wanted, tiles)))
    return triton.cdiv(tiles, per_split), per_split * tile


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
