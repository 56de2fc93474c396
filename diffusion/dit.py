"""DiT: a transformer over latent patches, conditioned on time and class by adaLN-zero (Peebles, Xie, arXiv 2212.09748).

Time and class are embedded once, and one layer makes the modulation of all blocks from them. The variant "dit" has the
architecture of diffusers' `DiTTransformer2DModel`. "modern" has RMSNorm, normalised queries and keys (Esser et al.,
arXiv 2403.03206), 2-D rotary positions (Su et al., arXiv 2104.09864) and SwiGLU (Shazeer, arXiv 2002.05202), as
LightningDiT does (Yao et al., arXiv 2501.01423). This file needs torch and diffusers alone: pipelines/export.py
ships it with "modern"."""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

TIME_CHANNELS = 256  # sinusoids of the timestep, as in the stock class
ROTARY_BASE = 10_000.0
EPS = 1e-6


class Attention(nn.Module):
    """Self-attention; `modern`: queries and keys have unit RMS times a learned scale, and are rotated by position."""

    def __init__(self, width: int, heads: int, modern: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=EPS) if modern else None for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x (B, N, D), rotation (2, N, D/H/2) -> (B, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D/H)
        if rotation is not None:
            q, k, v = qkv
            q, k = rotate(self.norm_q(q), rotation), rotate(self.norm_k(k), rotation)
            qkv = torch.stack([q.to(v.dtype), k.to(v.dtype), v])
        return self.out(self.attend(qkv).transpose(1, 2).flatten(2))

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v of q, k and v (3, B, H, N, D) -> (B, H, N, D)."""
        return F.scaled_dot_product_attention(*qkv)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of x (B, H, N, D) turned by the angles of `rotation` (2, N, D/2): cosines and sines."""
    a, b = x.chunk(2, dim=3)
    cos, sin = rotation
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=3)


def rotary_angles(side: int, pairs: int) -> Tensor:
    """Cosines and sines (2, side^2, pairs) of places on a square grid: half the pairs turn with the row, half with the
    column, at frequencies that fall geometrically from 1 to 1 / ROTARY_BASE."""
    frequencies = ROTARY_BASE ** -(torch.arange(pairs // 2).double() / (pairs // 2))
    angles = torch.arange(side).double()[:, None] * frequencies  # (side, pairs / 2)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], dim=2).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()]).float()


class MLP(nn.Module):
    """GELU between two layers of ratio 4; `modern`: SwiGLU of as many parameters."""

    def __init__(self, width: int, modern: bool):
        super().__init__()
        hidden = 8 * width // 3 // 8 * 8 if modern else 4 * width  # multiples of 8 fit matrix units
        self.modern = modern
        self.fc_in = nn.Linear(width, 2 * hidden if modern else hidden)
        self.fc_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc_in(x)
        if self.modern:
            gate, value = x.chunk(2, dim=-1)
            return self.fc_out(F.silu(gate) * value)
        return self.fc_out(F.gelu(x))


class Block(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the condition; the identity where gates are zero."""

    def __init__(self, width: int, heads: int, modern: bool):
        super().__init__()
        self.norm1, self.norm2 = make_norm(width, modern), make_norm(width, modern)
        self.attention = Attention(width, heads, modern)
        self.mlp = MLP(width, modern)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rotation: Tensor | None) -> Tensor:
        """x (B, N, D); shift, scale and gate (2, B, 1, D), of attention and of MLP -> (B, N, D)."""
        x = x + gate[0] * self.attention(torch.addcmul(shift[0], self.norm1(x).to(scale.dtype), scale[0]), rotation)
        return x + gate[1] * self.mlp(torch.addcmul(shift[1], self.norm2(x).to(scale.dtype), scale[1]))


def make_norm(width: int, modern: bool) -> nn.Module:
    """Shift and scale come from the condition alone."""
    return (nn.RMSNorm if modern else nn.LayerNorm)(width, eps=EPS, elementwise_affine=False)


class DiT(ModelMixin, ConfigMixin):
    """Prediction (velocity, noise, ...) from noisy latents. Labels are 0..num_classes-1, and `null_class` = num_classes
    for "no class". `sample_size` is the side of the latents, `in_channels` their channels; `out_channels` are as many
    unless given."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

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
        variant: Literal["dit", "modern"] = "dit",
        out_channels: int | None = None,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"latents of side {sample_size} do not divide into patches of side {patch_size}")
        modern = variant == "modern"
        if modern and width // heads % 4:
            raise ValueError(f"the {width // heads} channels of a head must be a multiple of 4, to be turned in pairs")
        self.null_class = num_classes
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_sinusoids = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.modulation = nn.Linear(width, (6 * depth + 2) * width)  # gates, shifts, scales
        self.blocks = nn.ModuleList([Block(width, heads, modern) for _ in range(depth)])
        self.norm_out = make_norm(width, modern)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))
        rotation = rotary_angles(sample_size // patch_size, width // heads // 2) if modern else None
        self.register_buffer("rotation", rotation, persistent=False)
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
        for layer in (self.modulation, self.proj_out):
            nn.init.zeros_(layer.weight)

    def condition(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """What time [B] and class [B] say to all layers: (B, 6 depth + 2, D), in the weights' type. It does not depend
        on the latents, and `forward` takes it, so that sampling can compute it once."""
        with torch.autocast(timestep.device.type, enabled=False):
            time = self.time_embed(self.time_sinusoids(timestep).to(self.class_embed.weight.dtype))  # (B, D)
            condition = F.silu(time + self.class_embed(class_labels))
            return self.modulation(condition).unflatten(1, (-1, self.config.width))

    def forward(
        self, latents: Tensor, timestep: Tensor, class_labels: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """latents [B, C, H, W], timestep [B] in 0..1000, class_labels [B] int64 -> prediction [B, C, H, W].
        `condition`: of the same times and classes, where it is known. Under autocast, embeddings, residual stream and
        output layer stay float32."""
        if condition is None:
            condition = self.condition(timestep, class_labels)
        layers = 2 * len(self.blocks)
        rows = condition.transpose(0, 1).unsqueeze(2)  # (6 depth + 2, B, 1, D)
        gate, shift, scale = rows.split([layers, layers + 1, layers + 1])
        last_shift, last_scale = shift[-1], 1 + scale[-1]
        device = latents.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else latents.dtype
        gate, shift, scale = (part.to(dtype).split(2) for part in (gate, shift, 1 + scale))
        with torch.autocast(device, enabled=False):
            x = self.patch_embed(latents).contiguous()  # (B, N, D)
        for i, block in enumerate(self.blocks):
            arguments = (x, shift[i], scale[i], gate[i], self.rotation)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
        with torch.autocast(device, enabled=False):
            x = self.proj_out(self.norm_out(x) * last_scale + last_shift)  # (B, N, p p C)
        return self.unpatchify(x)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W)."""
        p, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)


class PipelineDiT(DiT):
    """The same with the call of diffusers' pipelines and their labels: 1000 means "no class", as does a label that no
    class has, and class i >= 1000 has the label i + 1."""

    def forward(self, *inputs: Tensor, return_dict: bool = True, **named: Tensor) -> Transformer2DModelOutput | tuple:
        """See `DiT.forward`."""
        sample = super().forward(*inputs, **named)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def condition(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        own = torch.where(class_labels == 1000, self.null_class, class_labels - (class_labels > 1000).long())
        return super().condition(timestep, own.clamp(max=self.null_class))
