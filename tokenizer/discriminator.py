"""Discriminators by the name that a config gives them (docs/discriminators.md), and the default one, PatchGAN.

None has BatchNorm: it would make one image's logits depend on the others of its micro-batch, so that ranks and gradient
accumulation would change the result."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.errors import UserError
from nsvq.tokenizer.dino_discriminator import DinoHeads, ViTFeatures, load_vit
from nsvq.tokenizer.plus_discriminator import PlusDiscriminator


class PatchConfig(Config):
    name: Literal["patchgan"] = Field("patchgan", description="patchgan: overlapping patches (pix2pix, VQGAN).")
    channels: int = Field(64, ge=1, description="Base width.")
    layers: int = Field(3, ge=1, description="Layers, each of which but the last halves the size.")

    @property
    def least_size(self) -> int:
        """Pixels a side that images must have: the last two convolutions need 3 x 3 places."""
        return 3 * 2**self.layers


class PlusConfig(Config):
    name: Literal["plus"] = Field(description="plus: VQGAN+'s, with blurs that halve the size.")
    channels: int = Field(128, ge=1, description="Base width.")
    stages: int = Field(3, ge=1, description="Stages, each of which halves the size.")

    @property
    def least_size(self) -> int:
        return 2 * 2**self.stages


class DinoConfig(Config):
    name: Literal["dino"] = Field(description="dino: heads on a frozen ViT (StyleGAN-T, VAR).")
    vit: str = Field("facebook/dino-vits16", min_length=1, description="A ViT of transformers: Hub id or folder.")
    depths: list[int] = Field(
        [-1, 2, 5, 8, 11], min_length=1, description="Its layers that have a head; 0 is the first, -1 what enters it."
    )
    kernel: int = Field(9, ge=1, description="Width of the heads' convolution along the tokens; odd.")
    augment: float = Field(1.0, ge=0, le=1, description="Probability of each of DiffAugment's three changes.")
    cutout: float = Field(0.2, ge=0, le=1, description="Side of the square that it cuts out, as a share.")
    least_size: ClassVar[int] = 1  # which is enlarged

    @model_validator(mode="after")
    def _possible(self) -> "DinoConfig":
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd")
        if min(self.depths) < -1 or len(set(self.depths)) < len(self.depths):
            raise ValueError(f"depths = {self.depths} must be layers of the ViT, each once")
        return self


# The options of one or of another, told apart by `name`.
if TYPE_CHECKING:
    DiscriminatorConfig = PatchConfig
else:
    DiscriminatorConfig = PatchConfig | PlusConfig | DinoConfig


def make_discriminator(
    config: PatchConfig | PlusConfig | DinoConfig, seed: int, weights: bool = True
) -> tuple[nn.Module, nn.Module]:
    """(features, discriminator). `features`(images [B, 3, H, W], their samples' positions) is frozen, and no part of
    checkpoints; `discriminator`(features) trains, and gives logits [B, ...]. `seed`: of what is random in features.
    Raises `UserError` where the ViT cannot be had; without `weights` its architecture is enough."""
    if isinstance(config, PlusConfig):
        return Pixels(), PlusDiscriminator(config.channels, config.stages)
    if isinstance(config, PatchConfig):
        return Pixels(), PatchDiscriminator(config.channels, config.layers)
    vit = load_vit(config.vit, weights)
    if max(config.depths) >= (layers := vit.config.num_hidden_layers):
        raise UserError(f"discriminator.depths = {config.depths}: {config.vit} has layers 0 to {layers - 1}")
    heads = DinoHeads(vit.config.hidden_size, len(config.depths), config.kernel)
    return ViTFeatures(vit, config.depths, config.augment, config.cutout, seed), heads


class Pixels(nn.Module):
    """Images as they are."""

    def forward(self, images: Tensor, positions: Sequence[int]) -> Tensor:
        return images


class PatchDiscriminator(nn.Module):
    """images [B, 3, H, W] -> logits [B, 1, h', w'], one for each overlapping patch (70 pixels wide at 3 layers). From
    pix2pix (arXiv 1611.07004) as VQGAN uses it, with GroupNorm."""

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        blocks = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            previous, width = width, channels * min(2**i, 8)
            conv = nn.Conv2d(previous, width, 4, 2 if i < layers else 1, 1, bias=False)
            blocks += [conv, nn.GroupNorm(math.gcd(32, width), width), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
