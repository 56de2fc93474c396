"""The network of Open-MAGVIT2 (arXiv 2409.04410) and SimVQ (arXiv 2411.02038) as a diffusers `VQModel`.

A stock `VQModel` cannot hold it. The encoder halves an image with a zero on every side, where stock pads right and
below only; the decoder doubles it by depth to space, where stock repeats pixels before its convolution; Open-MAGVIT2's
scales and shifts each level by the codes' own deviation and mean. The rest is stock: blocks, table, files.
"""

from diffusers import ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch import Tensor, nn

# A DiffusionPipeline finds out how to load a foreign component by looking for its base class in the component's module.
__all__ = ["MagvitVQModel", "ModelMixin"]


class MagvitVQModel(VQModel):
    """`adaptive_norm`: Open-MAGVIT2's decoder (true) or SimVQ's; the rest is `VQModel`'s.

    `layers_per_block` counts the residual blocks of every level of encoder and decoder, and of both middles.
    """

    @register_to_config
    def __init__(
        self,
        adaptive_norm: bool,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = False,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        widths = list(block_out_channels)
        middle = {
            "num_layers": layers_per_block - 1,  # blocks after the first
            "attention_head_dim": widths[-1],
            "add_attention": False,
            "resnet_act_fn": act_fn,
            "resnet_groups": norm_num_groups,
        }
        for block, width in zip(self.encoder.down_blocks[:-1], widths[:-1], strict=True):
            block.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, padding=1, name="op")])
        self.encoder.mid_block = UNetMidBlock2D(widths[-1], None, **middle)
        self.decoder = _Decoder(
            latent_channels, out_channels, up_block_types, block_out_channels, layers_per_block, norm_num_groups, act_fn
        )
        self.decoder.mid_block = UNetMidBlock2D(widths[-1], None, **middle)
        for block, width in zip(self.decoder.up_blocks, reversed(widths), strict=True):
            del block.resnets[-1]  # stock has one more than in the encoder
            if block.upsamplers is not None:
                shuffle = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
                block.upsamplers = nn.ModuleList([shuffle])
        incoming = [widths[-1], *reversed(widths[1:])]  # of each level
        norms = nn.ModuleList(_CodeNorm(latent_channels, width, norm_num_groups) for width in incoming)
        self.decoder.norms = norms if adaptive_norm else None


class _Decoder(Decoder):
    """Codes [B, d, h, w] -> images; the codes also set scale and shift of each level where there are `norms`."""

    def forward(self, sample: Tensor, latent_embeds: None = None) -> Tensor:
        h = self.mid_block(self.conv_in(sample))
        for level, block in enumerate(self.up_blocks):
            h = block(h if self.norms is None else self.norms[level](h, sample))
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


class _CodeNorm(nn.Module):
    """GroupNorm whose scale and shift are linear in the deviation and the mean of an image's codes over its tokens.

    h [B, C, H, W], codes [B, d, h, w] -> [B, C, H, W]; the deviation is the unbiased one, so an image needs two tokens.
    """

    def __init__(self, dim: int, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6, affine=False)
        self.gamma, self.beta = nn.Linear(dim, width), nn.Linear(dim, width)

    def forward(self, h: Tensor, codes: Tensor) -> Tensor:
        tokens = codes.flatten(2)
        scale = self.gamma((tokens.var(-1) + self.norm.eps).sqrt())
        return scale[:, :, None, None] * self.norm(h) + self.beta(tokens.mean(-1))[:, :, None, None]
