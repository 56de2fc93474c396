"""The tokenizer as two modules, because they train at different times: an encoder, and a quantizer with its decoder.

images [B, 3, H, W] -> Encoder -> z [B, d, h, w] -> QuantizedDecoder -> images [B, 3, H, W]"""

from collections.abc import Callable
from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from pydantic import Field, model_validator
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.tokenizer.quantizers import Quantized, Quantizer


class ModelConfig(Config):
    """VQGAN's encoder and decoder, as diffusers builds them."""

    channels: int = Field(128, ge=1, description="Base width; every level has a multiple of it.")
    channel_multipliers: list[int] = Field([1, 2, 2, 4], min_length=1, description="Widths of levels, halved between.")
    layers_per_block: int = Field(2, ge=1, description="Residual blocks per level (the decoder has one more).")
    # VQGAN's 1x1 projections around the quantizer are part of the 3x3 convolutions beside them.
    latent_channels: int = Field(128, ge=1, description="d, the width of latents and (factorized) codes.")
    norm_groups: int = Field(32, ge=1, description="Groups of each GroupNorm; must divide every level's width.")
    mid_attention: bool = Field(False, description="Self-attention at the lowest resolution (VQGAN: yes, SimVQ: no).")
    attention_levels: list[int] = Field([], description="Levels with self-attention after each block; 0 is the first.")
    compile: bool = Field(False, description="torch.compile: a faster step after minutes of compiling at the start.")

    @model_validator(mode="after")
    def _levels_are_there(self) -> "ModelConfig":
        if unknown := sorted(set(self.attention_levels) - set(range(len(self.channel_multipliers)))):
            last = len(self.channel_multipliers) - 1
            raise ValueError(f"attention_levels = {unknown}: the levels of channel_multipliers are 0 to {last}")
        return self


def vqmodel_arguments(config: ModelConfig) -> dict[str, Any]:
    """The architecture in the words of diffusers' `VQModel`, which builds the same encoder and decoder."""
    attends = ["Attn" if level in config.attention_levels else "" for level in range(len(config.channel_multipliers))]
    return {
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in attends],
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in reversed(attends)],
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "latent_channels": config.latent_channels,
    }


def make_encoder(config: ModelConfig) -> nn.Module:
    """images [B, 3, H, W] -> z [B, d, H/f, W/f], f = 2^(levels - 1). There is no projection after it."""
    arguments = vqmodel_arguments(config)
    del arguments["up_block_types"]
    return _initialize(Encoder(3, arguments.pop("latent_channels"), double_z=False, **arguments))


def _initialize(network: nn.Module) -> nn.Module:
    """Convolutions keep the variance of their input, and residual branches start at zero. PyTorch's default start
    shrinks the signal at each of the trunk's convolutions; the colour of an image then has to be learned through a long
    plateau (16 dB in place of 21 dB after 200 steps of configs/quickstart/nsvq.yaml)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    return network


class QuantizedDecoder(nn.Module):
    """z [B, d, h, w] -> (images [B, 3, H, W], `Quantized`)."""

    def __init__(self, config: ModelConfig, quantizer: Quantizer):
        super().__init__()
        arguments = vqmodel_arguments(config)
        del arguments["down_block_types"]
        self.quantizer = quantizer
        self.decoder = _initialize(Decoder(arguments.pop("latent_channels"), 3, **arguments))

    def forward(
        self, z: Tensor, temperature: float | None = None, perturb: Callable[[Quantized], Tensor] | None = None
    ) -> tuple[Tensor, Quantized]:
        """`perturb`: what the decoder sees in place of the codes (tokenizer/perturbation.py)."""
        quantized = self.quantizer(z, temperature)
        return self.decoder(perturb(quantized) if perturb else quantized.z_q), quantized
