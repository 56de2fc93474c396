"""diffusers' `VQModel` with a quantizer of this project, for methods whose code is not the nearest row of a table.

It saves and loads as the stock class does, and a stock `DiffusionPipeline` runs it; both need this project installed,
and the folder's config.json names this module's class."""

import torch
from diffusers import ModelMixin, VQModel
from pydantic import TypeAdapter
from torch import Tensor, nn

from nsvq.tokenizer.quantizers import QuantizerConfig, make_quantizer

# A DiffusionPipeline finds out how to load a foreign component by looking for its base class in the component's module.
__all__ = ["ModelMixin", "QuantizerVQModel"]


class QuantizerVQModel(VQModel):
    """`quantizer`: the method and its options, as the section of a training config; the rest is `VQModel`'s."""

    def __init__(self, quantizer: dict, num_vq_embeddings: int = 256, **stock):
        super().__init__(num_vq_embeddings=1, **stock)  # a table that the last line drops
        self.register_to_config(quantizer=quantizer, num_vq_embeddings=num_vq_embeddings)
        self.quantize = _Shifted(quantizer, self.config.latent_channels)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Which keys of config.json the constructor takes."""
        return VQModel._get_init_keys(VQModel) | {"quantizer"}


class _Shifted(nn.Module):
    """A quantizer for latents that the model has shifted by -`mean` [d]; what it gives is not shifted."""

    def __init__(self, options: dict, dim: int):
        super().__init__()
        self.quantizer = make_quantizer(TypeAdapter(QuantizerConfig).validate_python(options), dim)
        self.register_buffer("mean", torch.zeros(dim))

    def prepare(self, z: Tensor) -> Tensor:
        """Shifted latents [N, d] as they are compared with codes."""
        return self.quantizer.prepare(z.float() + self.mean)

    def lookup(self, z: Tensor) -> Tensor:
        """Shifted latents [N, d] -> indices [N]."""
        return self.quantizer.lookup(z.float() + self.mean)

    def codes(self, indices: Tensor) -> Tensor:
        """Indices [...] -> what the decoder sees [..., d]."""
        return self.quantizer.codes(indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Indices [B h w] and (B, h, w, d) -> what the decoder sees [B, d, h, w], as the stock module."""
        return self.codes(indices).view(shape).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """z [B, d, h, w] -> (z_q [B, d, h, w], commitment loss, (None, None, indices [B h w])), as the stock module."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        indices = self.lookup(flat)
        codes = self.codes(indices)
        z_q = codes.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2).to(z)
        return z_q, (self.prepare(flat) - codes).square().mean(), (None, None, indices)
