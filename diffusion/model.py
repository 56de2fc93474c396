"""DiT: a transformer over latent patches, conditioned on time and class by adaLN-zero (Peebles, Xie, arXiv 2212.09748).

Time and class are embedded once for all blocks. pipelines/export.py turns it into diffusers' `DiTTransformer2DModel`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.config import Config

SIZES = {  # depth, width, heads
    "tiny": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
TIME_CHANNELS = 256  # sinusoids of the timestep, as in the stock class


class ModelConfig(Config):
    """The DiT."""

    size: Literal["tiny", "S", "B", "L", "XL"] = Field("B", description="Depth, width and heads together.")
    depth: int | None = Field(None, ge=1, description="Blocks; null is the size's.")
    width: int | None = Field(None, ge=8, description="Width of the tokens; null is the size's.")
    heads: int | None = Field(None, ge=1, description="Attention heads; null is the size's.")
    patch_size: int = Field(1, ge=1, description="Side of a token, in latent pixels.")
    class_dropout: float = Field(0.1, ge=0, le=1, description="Share of labels replaced by the null class.")
    gradient_checkpointing: bool = Field(False, description="Trade a third more compute for less memory.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        _, width, heads = self.dimensions()
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of heads ({heads}) and of 4")
        return self

    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads)."""
        depth, width, heads = SIZES[self.size]
        return self.depth or depth, self.width or width, self.heads or heads


class Block(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the condition; the identity at initialisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) -> (B, N, D)."""
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)  # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.mlp_in(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")  # (B, N, 4D)
        return x + gate2 * self.mlp_out(hidden)

    def attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D/H)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))  # (B, H, N, D/H)
        return self.attention_out(out.transpose(1, 2).flatten(2))  # (B, N, D)


class DiT(ModelMixin, ConfigMixin):
    """Velocity of noisy latents. Labels are 0..num_classes-1, and `null_class` = num_classes for "no class".

    `sample_size` is the side of the latents, `in_channels` their channels.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: int = 1,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"latents of side {sample_size} do not divide into patches of side {patch_size}")
        self.null_class = num_classes
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_sinusoids = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.initialize()

    def initialize(self) -> None:
        """Weights as in DiT: blocks start as the identity, and the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A patch is projected like a linear layer over its pixels.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        for embedding in (self.time_embed.linear_1, self.time_embed.linear_2, self.class_embed):
            nn.init.normal_(embedding.weight, std=0.02)
        # Zero gates make each block the identity, and every depth equally easy to train.
        for layer in (*(block.modulation for block in self.blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """latents [B, C, H, W], timestep [B] in 0..1000, class_labels [B] int64 -> velocity [B, C, H, W].

        Under autocast, embeddings, residual stream and output layer stay float32.
        """
        with torch.autocast(latents.device.type, enabled=False):
            x = self.patch_embed(latents)  # (B, N, D)
            time = self.time_embed(self.time_sinusoids(timestep).to(x.dtype))  # (B, D)
            condition = F.silu(time + self.class_embed(class_labels))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        with torch.autocast(latents.device.type, enabled=False):
            x = x.to(latents.dtype)
            shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D)
            x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # (B, N, p p C)
        return self.unpatchify(x)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W)."""
        p, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)


def make_model(config: ModelConfig, latent_shape: tuple[int, int, int], num_classes: int) -> DiT:
    """The configured DiT for latents of `latent_shape` (C, H, W).

    Raises `ValueError` where the latents are not square, do not divide into patches, or have more channels than the
    model is wide: a narrower model cannot carry them (Zheng et al., arXiv 2510.11690).
    """
    channels, height, side = latent_shape
    depth, width, heads = config.dimensions()
    if height != side:
        raise ValueError(f"latents must be square, got {height} x {side}")
    if width < channels:
        raise ValueError(f"width {width} is less than the latents' {channels} channels: take a larger model.size")
    model = DiT(side, channels, num_classes, config.patch_size, depth, width, heads)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model
