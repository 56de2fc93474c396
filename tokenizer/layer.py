"""Vector quantization as a layer of any model, in any training loop (docs/layer.md).

quantize = VectorQuantizer(dim=256, codebook_size=8192)
quantized, indices, loss = quantize(x)  # x [..., 256]; add the loss to your own

NSVQ's upkeep (arXiv 2606.11363) runs inside: nothing is called between steps."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsvq.common.config import merged, validate
from nsvq.errors import UsageError
from nsvq.tokenizer import ranks
from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.quantizers import QUANTIZERS, Quantizer
from nsvq.tokenizer.quantizers.base import NearestQuantizer, rotated, straight_through
from nsvq.tokenizer.standalone import StandaloneQuantizer

# Of the method "nsvq": our recipe (configs/imagenet128/nsvq.yaml), at a temperature that fits latents of any scale.
_NSVQ = {"pull": {"temperature": 0.3, "relative_to": "mean"}, "revive": 5.0, "replace": {}, "freeze": None}
_OFF = dict.fromkeys(NSVQConfig.model_fields)
_PARTS = {"nsvq": _NSVQ, "ns-vq": _OFF | {"pull": {"weight": 1.0, "temperature": 1.0}}}  # of the others: none


class VectorQuantized(NamedTuple):
    """`quantized`, of the input's shape and dtype; `indices`; `loss`, a float32 scalar to add to one's own. Where a
    position is masked, `quantized` is 0 and the index -1."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class _Layer(nn.Module):
    """From inputs of any rank to tokens, and back."""

    def __init__(self, dim: int, codebook_dim: int | None, channel_first: bool):
        super().__init__()
        self.dim, self.channel_first = dim, channel_first
        if codebook_dim is not None and codebook_dim < 1:
            raise UsageError(f"codebook_dim = {codebook_dim} must be at least 1")
        self.codebook_dim = codebook_dim or dim
        projects = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if projects else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if projects else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VectorQuantized:
        """x [..., dim], or [B, dim, ...] with `channel_first`; mask bool [...], true at positions that count: the
        others change nothing. Raises `ValueError` on other shapes."""
        if x.dim() < 2 or x.shape[1 if self.channel_first else -1] != self.dim:
            wanted = f"[B, {self.dim}, ...]" if self.channel_first else f"[..., {self.dim}]"
            raise ValueError(f"expected an input {wanted}, got {list(x.shape)}")
        last = x.movedim(1, -1) if self.channel_first else x
        if mask is not None and (mask.shape != last.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(f"expected a bool mask {list(last.shape[:-1])}, got {mask.dtype} {list(mask.shape)}")
        if mask is not None:
            last = last.masked_fill(~mask[..., None], 0.0)  # what stands there reaches no weight, even as nan times 0
        flat = self.project_in(last.reshape(-1, self.dim))  # (N, d)
        valid = None if mask is None else mask.reshape(-1)
        # Evaluation without a mask is one graph for torch.compile; the rest is one break.
        found = self._outside_graph(flat, valid) if self.training or mask is not None else self.tokens(flat)
        z_q, indices, loss = found
        quantized = self.project_out(z_q.to(flat.dtype)).to(x.dtype).view(last.shape)
        if mask is not None:
            quantized = quantized.masked_fill(~mask[..., None], 0.0)
        indices = indices.view(*last.shape[:-1], *indices.shape[1:])
        return VectorQuantized(quantized.movedim(-1, 1) if self.channel_first else quantized, indices, loss)

    @torch.compiler.disable
    def _outside_graph(self, flat: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if valid is None:
            return self.tokens(flat)
        z_q, indices, loss = self.tokens(flat[valid])
        every = indices.new_full((len(flat), *indices.shape[1:]), -1)
        every[valid] = indices
        return z_q.new_zeros(flat.shape).masked_scatter(valid[:, None], z_q), every, loss

    def tokens(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does, on tokens [N, codebook_dim] -> (z_q [N, codebook_dim], indices [N] or [N, n], loss)."""
        raise NotImplementedError

    def get_codes(self, indices: Tensor) -> Tensor:
        """Indices, as `forward` gives them, -> codes [..., codebook_dim] float32; 0 for the index -1."""
        raise NotImplementedError

    def decode(self, indices: Tensor) -> Tensor:
        """Indices, as `forward` gives them, -> what evaluation gives as `quantized` for them."""
        codes = self.get_codes(indices)
        weight = getattr(self.project_out, "weight", codes)
        quantized = self.project_out(codes.to(weight.dtype))
        none = indices == -1
        none = none.all(-1) if none.dim() == codes.dim() else none  # of several codes a token
        quantized = quantized.masked_fill(none[..., None], 0.0)
        return quantized.movedim(-1, 1) if self.channel_first else quantized


class VectorQuantizer(_Layer):
    """One code a token.

    `codebook_size`: K, None where the method's options say it. `method`: "nsvq" (moving averages with the NS loss,
    revival and replacement), or a quantizer of docs/tokenizers.md, with its `options` (`levels` of "fsq").
    `codebook_dim`: width of the codes, between two linear layers. `nsvq`: changes to what keeps codes alive, as the
    section of a config; a method other than "nsvq" and "ns-vq" has nothing of it unless it is asked for.
    `commitment_weight` and `codebook_weight` of the two losses (VQ-VAE, arXiv 1711.00937, eq. 3), where the method has
    them; None is 0.25 and 1, of "ibq" 1 and 0.25. `replace_every`: codes without use are replaced whenever the mean
    code won so many tokens. `accumulation`: forwards in an optimizer step. Raises `UsageError` for what does not fit
    together."""

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        method: str = "nsvq",
        *,
        codebook_dim: int | None = None,
        channel_first: bool = False,
        nsvq: dict[str, Any] | None = None,
        commitment_weight: float | None = None,
        codebook_weight: float | None = None,
        replace_every: float = 100,
        accumulation: int = 1,
        **options: Any,
    ):
        super().__init__(dim, codebook_dim, channel_first)
        kind = _kind(method)
        if takes_size := "codebook_size" in kind.Config.model_fields:
            options["codebook_size"] = codebook_size
        if replace_every <= 0 or accumulation < 1 or accumulation != int(accumulation):
            raise UsageError("replace_every must be positive, and accumulation a whole number, at least 1")
        name = "ema" if method == "nsvq" else method
        usual = {"decay": None} if method == "nsvq" else {}
        config = validate(kind.Config, {"name": name} | usual | options, source=f"the quantizer {method}")
        parts = validate(NSVQConfig, merged(_PARTS.get(method, _OFF), nsvq or {}), source="nsvq")
        if parts.freeze:
            raise UsageError("nsvq.freeze is the trainer's: to freeze, stop training what is before this layer")
        given = {"commitment": commitment_weight, "codebook": codebook_weight}
        weights = kind.usual_weights | {name: weight for name, weight in given.items() if weight is not None}
        if min(weights.values()) < 0:
            raise UsageError("commitment_weight and codebook_weight must be 0 or more")
        try:
            config.check_dim(self.codebook_dim)
            parts.check_method(method, kind)
        except ValueError as error:
            raise UsageError(str(error).replace("model.latent_channels", "codebook_dim")) from None
        self.quantizer = StandaloneQuantizer(config, self.codebook_dim, parts, weights, replace_every, accumulation)
        self.codebook_size = self.quantizer.quantizer.codebook_size
        if not takes_size and codebook_size not in (None, self.codebook_size):
            raise UsageError(f"{method} has {self.codebook_size} codes by its other options; leave codebook_size out")

    @property
    def codebook(self) -> Tensor:
        """The codes [K, codebook_dim] float32."""
        return self.quantizer.quantizer.codebook()

    def set_codes(self, codes: Tensor) -> None:
        """Start from `codes` [K, codebook_dim], in place of tokens of the first batch. Raises `UsageError` where a
        method makes its codes of other weights, and `ValueError` for another shape."""
        self.quantizer.set_codes(codes)

    def tokens(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantizer(z)

    def get_codes(self, indices: Tensor) -> Tensor:
        return self.quantizer.codes(indices)


class ResidualVectorQuantizer(_Layer):
    """`num_quantizers` codes a token: each quantizes what those before it left (SoundStream, arXiv 2107.03312).

    Indices are [..., num_quantizers], and the loss is the sum. With `quantizer_dropout` a forward in training uses the
    first 1 to `num_quantizers`, drawn for the whole batch; indices of the others are -1. Other `arguments` are those of
    `VectorQuantizer`. Raises `UsageError` as that does, and for a method that quantizes no residuals."""

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        num_quantizers: int = 8,
        method: str = "nsvq",
        *,
        codebook_dim: int | None = None,
        channel_first: bool = False,
        quantizer_dropout: bool = False,
        **arguments: Any,
    ):
        super().__init__(dim, codebook_dim, channel_first)
        if num_quantizers < 1:
            raise UsageError(f"num_quantizers = {num_quantizers} must be at least 1")
        kind = _kind(method)
        if not issubclass(kind, NearestQuantizer) or kind.prepare is not Quantizer.prepare:
            raise UsageError(f"{method} quantizes no residuals; take one that finds the nearest code: nsvq, simvq, ...")
        self.levels = nn.ModuleList(
            VectorQuantizer(self.codebook_dim, codebook_size, method, **arguments) for _ in range(num_quantizers)
        )
        self.draws = ranks.Draws() if quantizer_dropout else None
        turns = self.levels[0].quantizer.quantizer.config.gradient == "rotation"
        self.with_gradient = rotated if turns else straight_through

    def tokens(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, used = z.float(), len(self.levels)
        if self.draws and self.training:
            used = int(torch.randint(1, used + 1, (), generator=self.draws.generator()))
        total, indices, losses = torch.zeros_like(z), [], []
        for level in self.levels[:used]:
            code, index, loss = level.tokens(z - total)
            total = total + code.detach()
            indices.append(index)
            losses.append(loss)
        for level in self.levels[used:]:
            level.tokens(z[:0])  # counts the forward, so that all levels step together
        indices += [torch.full_like(index, -1)] * (len(self.levels) - used)
        return self.with_gradient(z, total), torch.stack(indices, 1), torch.stack(losses).sum()

    def get_codes(self, indices: Tensor) -> Tensor:
        return torch.stack([level.get_codes(indices[..., i]) for i, level in enumerate(self.levels)]).sum(0)


def _kind(method: str) -> type[Quantizer]:
    if method == "vp":
        raise UsageError("vp finds its codes after training, which only the trainer can do (tokenizer/train.py)")
    name = "ema" if method == "nsvq" else method
    if name not in QUANTIZERS:
        raise UsageError(f"method = {method!r} should be one of nsvq, {', '.join(sorted({*QUANTIZERS} - {'vp'}))}")
    return QUANTIZERS[name]
