"""The networks of stage two, by config.

Each is called as model(latents [B, C, H, W], timestep [B], class_labels [B]) -> prediction [B, C, H, W], and has
`null_class`, the label that means "no class"."""

from typing import Literal

from pydantic import Field, model_validator

from nsvq.common.config import Config
from nsvq.diffusion.cpu_attention import use_cpu_attention
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.unet import UNet, make_unet

SIZES = {  # depth, width, heads
    "tiny": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


class _NetworkConfig(Config):
    """What all networks share."""

    conditional: bool = Field(True, description="Whether it learns the classes; otherwise all labels are ignored.")
    class_dropout: float = Field(0.1, ge=0, le=1, description="Share of labels replaced by the null class.")
    gradient_checkpointing: bool = Field(False, description="Trade a third more compute for less memory.")
    compile: bool = Field(False, description="torch.compile: a faster step after minutes of compiling at the start.")

    def label_dropout(self) -> float:
        """Share of labels that training replaces by the null class."""
        return self.class_dropout if self.conditional else 1.0


class DiTConfig(_NetworkConfig):
    variant: Literal["dit", "modern"] = Field("dit", description="dit: as in stock diffusers; modern: as LightningDiT.")
    size: Literal["tiny", "S", "B", "L", "XL"] = Field("B", description="Depth, width and heads together.")
    depth: int | None = Field(None, ge=1, description="Blocks; null is the size's.")
    width: int | None = Field(None, ge=8, description="Width of the tokens; null is the size's.")
    heads: int | None = Field(None, ge=1, description="Attention heads; null is the size's.")
    patch_size: int = Field(1, ge=1, description="Side of a token, in latent pixels.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "DiTConfig":
        _, width, heads = self.dimensions()
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of heads ({heads}) and of 4")
        if self.variant == "modern" and width // heads % 4:
            raise ValueError(f"modern: the channels of a head, {width} / {heads}, must be a multiple of 4")
        return self

    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads)."""
        depth, width, heads = SIZES[self.size]
        return self.depth or depth, self.width or width, self.heads or heads


class UNetConfig(_NetworkConfig):
    """The U-Net of latent diffusion, at NSVQ's sizes (arXiv 2606.11363, appendix D.5)."""

    variant: Literal["unet"] = Field("unet", description="unet: diffusers' UNet2DModel.")
    width: int = Field(256, ge=32, multiple_of=32, description="Channels of the first level.")
    multipliers: tuple[int, ...] = Field((1, 2, 4), min_length=1, description="Channels of each level, in widths.")
    layers: int = Field(2, ge=1, description="Residual blocks of a level.")


ModelConfig = DiTConfig | UNetConfig


def make_model(config: DiTConfig | UNetConfig, latent_shape: tuple[int, ...], num_classes: int) -> DiT | UNet:
    """The configured network for latents of `latent_shape` (C, H, W). Raises `ValueError` where the latents are not
    square or do not divide as the network needs, or where a token has more values than the network is wide: a narrower
    one cannot carry them (Zheng et al., arXiv 2510.11690)."""
    channels, height, side = latent_shape
    classes = num_classes if config.conditional else 0
    if height != side:
        raise ValueError(f"latents must be square, got {height} x {side}")
    patch, width = (1, config.width) if config.variant == "unet" else (config.patch_size, config.dimensions()[1])
    if width < (values := patch**2 * channels):
        token = f"{values} values of a token, {patch} x {patch} latents of {channels} channels"
        raise ValueError(f"width {width} is less than the {token}: take a larger model.size, or a smaller patch_size")
    if config.variant == "unet":
        model = make_unet(latent_shape, classes, width, config.multipliers, config.layers)
    else:
        depth, width, heads = config.dimensions()
        model = DiT(side, channels, classes, config.patch_size, depth, width, heads, config.variant)
        use_cpu_attention(model)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model
