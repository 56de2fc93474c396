"""What every quantizer shares: its place between encoder and decoder, the decoder's gradient, the two VQ losses."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.tokenizer.codebook import NonStationary, nearest_code, search_with_nonstationary_loss


class QuantizerOptions(Config):
    """Options of a method, in a subclass with `name` as a `Literal`: the section `quantizer` of a config."""

    name: str

    def check_dim(self, dim: int) -> None:
        """Raises `ValueError` where the method cannot work on latents of `dim` channels."""


class CodebookConfig(QuantizerOptions):
    """Options of a method with K codes."""

    codebook_size: int = Field(65_536, ge=2, description="K, the number of codes.")


class NearestConfig(QuantizerOptions):
    """Options of a method whose code is the nearest one."""

    gradient: Literal["straight-through", "rotation"] = Field("straight-through", description="From decoder to latent.")


class Quantized(NamedTuple):
    """`z_q` [B, d, h, w] with its gradient, `indices` [B, h, w] (None where training has no codes), losses, statistics.

    Every method's losses hold "commitment", the mean squared quantization error; which of "codebook" and "commitment"
    it trains with is in `terms`. Its own terms are there in training only: they may look at all ranks, and evaluation
    may run on one alone."""

    z_q: Tensor
    indices: Tensor | None
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Quantizer(nn.Module):
    """Base class. A method defines `quantize`, and `codebook` or `codes`; the rest has defaults. Inside, latents are
    tokens [N, d] float32, N = B h w. `prepare` takes them to where they are compared with codes."""

    config: Any  # an instance of `Config`
    Config: ClassVar[type[QuantizerOptions]]
    terms: ClassVar[tuple[str, ...]] = ()  # of "codebook" and "commitment", those that the method trains with
    learns_codes: ClassVar[bool] = False  # in training, so that the NS loss means something
    free_table: ClassVar[bool] = False  # the codes are rows of `table`, which may be written
    can_consolidate: ClassVar[bool] = False  # k-means of latents as the encoder gives them may become the codes
    can_revive: ClassVar[bool] = False  # it minds `revive_after`
    nonstationary_weight: float = 0.0  # alpha, for a method that moves its codes other than by their gradient
    own_temperature: bool = False  # the NS loss's is in units of a latent's own distance to its code
    revive_after: float | None = None  # `Schedule.revive_after`, before each step
    dim: int
    codebook_size: int
    weight: Tensor  # where there is a table
    # Of the losses in `terms`, where nothing else is said.
    usual_weights: ClassVar[dict[str, float]] = {"commitment": 0.25, "codebook": 1.0}

    def __init__(self, config: QuantizerOptions, dim: int):
        super().__init__()
        self.config, self.dim = config, dim
        if isinstance(config, CodebookConfig):
            self.codebook_size = config.codebook_size

    @property
    def has_codes(self) -> bool:
        """Whether latents have indices by now."""
        return True

    def forward(self, z: Tensor, temperature: float | None = None) -> Quantized:
        """z [B, d, h, w] -> `Quantized`, in float32 whatever the autocast; with a `temperature` also the NS loss."""
        batch, d, height, width = z.shape
        if d != self.dim:
            raise ValueError(f"expected latents of {self.dim} channels, got {d}")
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, d)  # (N, d)
            z_q, indices, losses, stats = self.quantize(flat, temperature)
        z_q = z_q.view(batch, height, width, d).permute(0, 3, 1, 2)  # (B, d, h, w)
        return Quantized(z_q, None if indices is None else indices.view(batch, height, width), losses, stats)

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor | None, dict, dict]:
        """Tokens [N, d] -> (z_q [N, d] with its gradient, indices [N] or None, losses, statistics)."""
        raise NotImplementedError

    def prepare(self, z: Tensor) -> Tensor:
        """Tokens [N, d] as they are compared with codes."""
        return z

    @torch.no_grad()
    def squared_errors(self, z: Tensor, z_q: Tensor) -> Tensor:
        """What each token's code leaves of it where they are compared, [B, h, w]: z and z_q [B, d, h, w]."""
        flat = self.prepare(z.float().permute(0, 2, 3, 1).flatten(0, 2))
        return (flat.view(z_q.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) - z_q).square().sum(1)

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        """Latents [N, d] as the encoder gives them -> indices [N] int64."""
        return nearest_code(self.prepare(z), self.codebook())

    def codes(self, indices: Tensor) -> Tensor:
        """Indices [...] -> codes [..., d] float32, as the decoder sees them."""
        return self.codebook()[indices]

    def codebook(self) -> Tensor:
        """All codes [K, d] float32, as used for lookup, with their gradient where they have one."""
        device = next(iter([*self.parameters(), *self.buffers()])).device
        return self.codes(torch.arange(self.codebook_size, device=device))

    def table(self) -> Tensor | None:
        """The parameter or buffer [K, d] whose rows are the codes and may be written; None without `free_table`."""
        return self.weight if self.free_table else None

    def rows_written(self, rows: Tensor) -> None:
        """Rows [n] of `table` were replaced from outside: what belongs to them starts again."""

    def export_table(self) -> Tensor | None:
        """[K, d + e] such that the nearest row to (z, 0) is the code of the latent z, and its first d numbers are what
        the decoder sees; None where no table does that."""
        return self.codebook()

    def loss_weights(self) -> dict[str, float]:
        """Weights of the method's own loss terms, which train as long as the encoder does."""
        return {}

    # What a run calls

    def initial_latents(self) -> int:
        """How many encoder outputs `initialize` wants before the first step; 0 for none."""
        return 0

    def initialize(self, latents: Tensor) -> None:
        """Start from encoder outputs [count, d]."""

    def end_step(self, stepped: bool) -> None:
        """After an optimizer step: updates that are no gradients. Where the optimizers did not step, because the batch
        gave a loss that is not finite, what it left here is thrown away. A collective call."""

    def end_epoch(self) -> None:
        """After an epoch."""

    def final_latents(self) -> int:
        """How many encoder outputs, over all ranks, `fit` wants after the last step; 0 for none."""
        return 0

    def fit(self, latents: Tensor) -> None:
        """Find the codes of a method that trains without, from this rank's encoder outputs [n, d]. Collective."""


class NearestQuantizer(Quantizer):
    """A quantizer whose code is the nearest one of a codebook [K, d], which a method gives by `codebook`."""

    terms: ClassVar[tuple[str, ...]] = ("codebook", "commitment")
    learns_codes = True

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, dict, dict]:
        """Losses are means over all N d elements (NSVQ, arXiv 2606.11363, eq. 52): "codebook" |sg[z] - c|^2,
        "commitment" |z - sg[c]|^2; with a temperature "nonstationary" (eq. 8-11)."""
        z, codebook = self.prepare(z), self.codebook()
        indices, ns = self.search(z, codebook, temperature)
        codes = codebook[indices]  # (N, d)
        losses, stats = vq_losses(z, codes), {}
        if ns is not None:
            losses["nonstationary"] = ns.loss
            stats = {"winner_mass": ns.winner_mass, "effective_codes": ns.effective_codes}
        self.searched(z.detach(), indices, ns)
        with_gradient = rotated if self.config.gradient == "rotation" else straight_through
        return with_gradient(z, codes), indices, losses, stats

    def searched(self, z: Tensor, indices: Tensor, ns: NonStationary | None) -> None:
        """After a search for prepared tokens z [N, d] with winners [N], in training and in evaluation."""

    def search(self, z: Tensor, codebook: Tensor, temperature: float | None) -> tuple[Tensor, NonStationary | None]:
        """Prepared tokens [N, d] -> nearest codes [N], and with a temperature the NS loss."""
        if temperature is None:
            return nearest_code(z, codebook), None
        return search_with_nonstationary_loss(z, codebook, temperature, self.own_temperature)


def straight_through(z: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of z."""
    return z + (value - z).detach()


def rotated(z: Tensor, value: Tensor) -> Tensor:
    """`value` [N, d], with the gradient of s R z (the rotation trick, arXiv 2410.06424): R is the rotation in the plane
    of z and `value` that brings one's direction to the other's, s = |value| / |z|, and both count as constants.

    R = 1 - 2 r r^T + 2 v u^T with the unit vectors u of z, v of `value`, r of u + v. Where z or `value` is 0 and there
    is no direction, the gradient passes straight through."""
    with torch.no_grad():
        length, goal = z.norm(dim=1, keepdim=True), value.norm(dim=1, keepdim=True)
        u, v = F.normalize(z, dim=1), F.normalize(value, dim=1)
        r = F.normalize(u + v, dim=1)
        directed = torch.minimum(length, goal) > 1e-6
    along_r, along_u = (z * r).sum(1, keepdim=True), (z * u).sum(1, keepdim=True)
    turned = goal / length.clamp(min=1e-6) * (z - 2 * along_r * r + 2 * along_u * v)
    return straight_through(torch.where(directed, turned, z), value)


def rows_in_tile(codes: Tensor) -> int:
    """How many latents to compare with codes [K, d] at a time: 16 MiB of float32 on a CPU, for its cache, and 128 MiB
    on a GPU, for which each tile is some launches."""
    return max(1, 2 ** (22 if codes.device.type == "cpu" else 25) // len(codes))


def vq_losses(z: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """The two losses of VQ-VAE (arXiv 1711.00937, eq. 3), each with a gradient to one side."""
    return {"codebook": (z.detach() - codes).square().mean(), "commitment": (z - codes.detach()).square().mean()}
