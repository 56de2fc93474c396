"""The codebook engine: exact nearest-code search and the non-stationary loss, streamed, always in float32.

No N x K matrix is ever kept. Distances are |c|^2 - 2 z.c (|z|^2 decides nothing) after the mean code is taken from
both sides, which keeps the cancellation error small for latents far from the origin. The passes themselves are Triton
kernels on a GPU (tokenizer/codebook_triton.py), and plain PyTorch elsewhere (tokenizer/codebook_tiles.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsvq.common.metrics import warn
from nsvq.tokenizer import codebook_tiles


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code by Euclidean distance, ties to the lower index. z [N, d], codebook [K, d]
    (any float dtype) -> indices [N] int64. Raises `ValueError` on other shapes."""
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


def wins(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code is in `indices` [N]: [K] int64. For `torch.bincount` the host would wait for the GPU, and
    torch.compile end its graph."""
    return indices.new_zeros(codebook_size).scatter_add_(0, indices, torch.ones_like(indices))


@dataclass
class NonStationary:
    """The NS loss (a scalar with a gradient to the codebook alone) and what the softmax says about its sharpness."""

    loss: Tensor
    winner_mass: Tensor  # mean softmax weight of the winner, in (0, 1]
    effective_codes: Tensor  # exp of the mean entropy of the softmax: how many codes a latent pulls
    weight_sums: Tensor | None = None  # s [K], and
    gradient: Tensor | None = None  # dL/dC [K, d], for a method that moves its codes itself


def nonstationary_loss(
    z: Tensor, codebook: Tensor, indices: Tensor, temperature: float, own: bool = False
) -> NonStationary:
    """L_NS = 1/(N d) sum_i sum_{j != q_i} p_ij |z_i - c_j|^2 with p = sg[softmax_j(-|z_i - c_j|^2 / temperature)]
    over all codes, the winner's own mass left out and not redistributed (NSVQ, arXiv 2606.11363, eq. 8-10).

    z [N, d], codebook [K, d], indices [N] (the winners q). z gets no gradient; dL/dC = 2/(N d) (s C - A), with
    s = column sums of the weights [K] and A = weights^T z [K, d]. With `own`, the temperature is in units of each
    latent's squared distance to its nearest code. Raises `ValueError` on other shapes, without latents, and for a
    temperature that is not positive."""
    return _nonstationary(z, codebook, indices, temperature, own)[1]


def search_with_nonstationary_loss(
    z: Tensor, codebook: Tensor, temperature: float, own: bool = False
) -> tuple[Tensor, NonStationary]:
    """`nearest_code` and `nonstationary_loss` in one pass over the distances: what training uses."""
    return _nonstationary(z, codebook, None, temperature, own)


def _nonstationary(z, codebook, indices, temperature, own) -> tuple[Tensor, NonStationary]:
    _check(z, codebook)
    if len(z) == 0:
        raise ValueError("the NS loss is a mean over latents, and there are none")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    arguments = (z.detach(), codebook, indices, temperature, own)
    indices, loss, winner_mass, entropy, s, gradient = torch.ops.nsvq.nonstationary(*arguments)
    return indices, NonStationary(loss, winner_mass.detach(), entropy.detach().exp(), s.detach(), gradient.detach())


def _check(z: Tensor, codebook: Tensor) -> None:
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"expected z [N, d] and codebook [K, d], got {tuple(z.shape)} and {tuple(codebook.shape)}")


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor a user's choice of TF32 or bfloat16 for float32 products reaches what runs inside."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    previous, backend.fp32_precision = backend.fp32_precision, "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = previous


def _passes(z: Tensor) -> ModuleType:
    """The Triton kernels where they run, on a GPU, for latents that fit a tile, with Triton there (as on Linux)."""
    kernels = _kernels() if z.is_cuda else None
    return kernels if kernels and z.shape[1] <= kernels.MAX_DIM else codebook_tiles


def prepare(device: torch.device) -> None:
    """Find out now whether the kernels run on `device`, and say it where they do not, not after data is prepared."""
    if device.type == "cuda":
        _kernels()


@cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where a small one runs: Triton compiles C at its first launch, for which slim images lack the
    compiler or Python's headers. What it raises there has many types."""
    try:
        from nsvq.tokenizer import codebook_triton

        code = torch.zeros(1, 16, device="cuda")
        codebook_triton.nearest_code(code, code, False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"Triton does not run here ({str(error).strip().splitlines()[0] if str(error).strip() else repr(error)})"
        cost = "the codebook is searched in plain PyTorch, about 0.5 s more for a step of 128 images and 65,536 codes"
        warn(f"{why}: {cost}; installing gcc and python3-dev helps")
        return None
    return codebook_triton


# Custom operators, so that torch.compile keeps one graph, with their FLOPs, which torch's counter asks for.


@torch.library.custom_op("nsvq::nearest_code", mutates_args=())
def _nearest_code(z: Tensor, codebook: Tensor, exclude_self: bool) -> Tensor:
    """With `exclude_self`, z is the codebook, and a code is not its own neighbor."""
    with _full_float32(z.device):
        z, codebook = _centered(z, codebook)
        return _passes(z).nearest_code(z, codebook, exclude_self)


@_nearest_code.register_fake
def _(z, codebook, exclude_self):
    return z.new_empty(len(z), dtype=torch.int64)


@torch.library.custom_op("nsvq::nonstationary", mutates_args=())
def _nonstationary_operator(
    z: Tensor, codebook: Tensor, indices: Tensor | None, temperature: float, own: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> indices [N], loss, mean winner mass, mean entropy (nats), s [K], dL/dC [K, d] in the codebook's dtype."""
    dtype = codebook.dtype
    with _full_float32(z.device):
        z, codebook = _centered(z, codebook)
        sums = _passes(z).softmax_sums(z, codebook, indices, temperature, own)
        found, winner_mass, entropy, loss, s, weighted_latents = sums
        # The mean code that was taken away cancels in s C - A.
        gradient = torch.addcmul(weighted_latents.neg(), s[:, None], codebook).mul_(2 / z.numel()).to(dtype)
    found = found.clone() if indices is not None else found  # an operator may not return its input
    return found, (loss / z.numel()).float(), winner_mass.mean(), entropy.float(), s, gradient


@_nonstationary_operator.register_fake
def _(z, codebook, indices, temperature, own):
    scalar = z.new_empty((), dtype=torch.float32)
    found = z.new_empty(len(z), dtype=torch.int64)
    s = z.new_empty(len(codebook), dtype=torch.float32)
    return found, scalar, scalar.clone(), scalar.clone(), s, torch.empty_like(codebook)


@register_flop_formula(torch.ops.nsvq.nearest_code)
def _(z_shape, codebook_shape, *_, out_shape=None, **__) -> int:
    """One product of latents and codes. The two more in which TF32 tensor cores make it accurate are not work."""
    return 2 * z_shape[0] * codebook_shape[0] * codebook_shape[1]


@register_flop_formula(torch.ops.nsvq.nonstationary)
def _(z_shape, codebook_shape, *_, out_shape=None, **__) -> int:
    """Three products: the search, its scores again, and the weights' product with the latents."""
    return 3 * 2 * z_shape[0] * codebook_shape[0] * codebook_shape[1]


def _keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)


def _scale_gradient(ctx, grad_indices, grad_loss, *_):
    (gradient,) = ctx.saved_tensors
    return None, None if grad_loss is None else grad_loss * gradient, None, None, None


_nonstationary_operator.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _centered(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    codebook = codebook.float()
    center = codebook.mean(0)
    # An infinite latent is as far from every code as from the padding of a tile; one that is nan takes the first code.
    return (z.float() - center).nan_to_num_(*3 * [torch.nan]), codebook - center
