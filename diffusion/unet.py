"""The U-Net of latent diffusion: diffusers' `UNet2DModel` behind the call of this project's models."""

from diffusers import UNet2DModel
from torch import Tensor

HEAD_CHANNELS = 64


class UNet(UNet2DModel):
    """Labels are 0..num_classes-1, and `null_class` = num_classes for "no class"; without classes it ignores labels."""

    @property
    def null_class(self) -> int:
        return (self.config.num_class_embeds or 1) - 1

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """latents [B, C, H, W], timestep [B] in 0..1000, class_labels [B] int64 -> prediction [B, C, H, W]."""
        labels = None if self.config.num_class_embeds is None else class_labels
        return super().forward(latents, timestep, labels).sample


def make_unet(
    latent_shape: tuple[int, ...], num_classes: int, width: int, multipliers: tuple[int, ...], layers: int
) -> UNet:
    """A U-Net for latents of `latent_shape` (C, H, W), with attention at all levels. `num_classes` 0 is unconditional.
    Raises `ValueError` where the latents cannot be halved often enough."""
    channels, side, _ = latent_shape
    levels = len(multipliers)
    if side % 2 ** (levels - 1):
        raise ValueError(f"latents of side {side} cannot be halved {levels - 1} times")
    return UNet(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("AttnDownBlock2D",) * levels,
        up_block_types=("AttnUpBlock2D",) * levels,
        block_out_channels=tuple(width * multiplier for multiplier in multipliers),
        layers_per_block=layers,
        attention_head_dim=HEAD_CHANNELS if width % HEAD_CHANNELS == 0 else width,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )
