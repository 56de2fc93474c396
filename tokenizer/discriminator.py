"""PatchGAN discriminator (pix2pix, arXiv 1611.07004), as VQGAN uses it, with GroupNorm in place of BatchNorm.

BatchNorm would make one image's logits depend on the others of its micro-batch, so that ranks and gradient
accumulation would change the result."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """images [B, 3, H, W] -> logits [B, 1, h', w'], one for each overlapping patch (70 pixels wide at 3 layers)."""

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        blocks = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            previous, width = width, channels * min(2**i, 8)
            conv = nn.Conv2d(previous, width, 4, 2 if i < layers else 1, 1, bias=False)
            blocks += [conv, nn.GroupNorm(min(32, width), width), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, 1, 1))
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
