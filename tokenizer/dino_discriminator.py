"""A discriminator on a frozen DINO ViT: trained heads look at its tokens at several depths.

From StyleGAN-T (arXiv 2301.09515), as VAR (arXiv 2404.02905) trains tokenizers with it. So that ranks and micro-batches
do not change the result, heads have GroupNorm, and one power iteration a step for their spectral norms. Besides, an
image and its reconstruction are augmented alike, and a larger image always gives a window (VAR: half of the time, and
else it is shrunk)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from nsvq.errors import UserError
from nsvq.tokenizer.diffaugment import diffaugment, uniform_numbers, window
from nsvq.tokenizer.teachers import IMAGENET_MEAN, IMAGENET_STD, Normalized, load_pretrained


class ViTFeatures(nn.Module):
    """images [B, 3, S, S] in [-1, 1], and positions in the run of B samples, or of the first of several equal parts of
    B -> a tensor [B, C, tokens] for each depth: patch tokens, with the class token added. Depth 0 is after the first
    layer, -1 before it. Frozen, but gradients pass.

    Images are augmented, and brought to the ViT's own size: a random window of larger ones, bilinear for smaller."""

    def __init__(self, vit: nn.Module, depths: Sequence[int], augment: float, cutout: float, seed: int):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.size, self.patch = vit.config.image_size, vit.config.patch_size
        self.augment, self.cutout, self.seed = augment, cutout, seed
        self.normalize = Normalized(IMAGENET_MEAN, IMAGENET_STD)  # what DINO and DINOv2 were trained with
        count = vit.config.num_hidden_layers
        layers = next(m for m in vit.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        for depth in depths:
            if depth < 0:
                layers[0].register_forward_pre_hook(self._keep)
            else:
                layers[depth].register_forward_hook(self._keep)
        self._kept: list[Tensor] = []

    def _keep(self, layer: nn.Module, inputs: tuple, output: Any = None) -> None:
        output = inputs if output is None else output
        self._kept.append(output[0] if isinstance(output, tuple) else output)

    def forward(self, images: Tensor, positions: Sequence[int]) -> list[Tensor]:
        numbers = uniform_numbers(self.seed, positions).to(images.device, non_blocking=True)
        numbers = numbers.repeat(len(images) // len(positions), 1)
        images = diffaugment(images, numbers, self.augment, self.cutout)
        if (spare := images.shape[2] - self.size) > 0:
            top, left = (numbers[:, -2:] * (spare + 1)).long().unbind(1)
            images = window(images, top, left, self.size)
        elif spare < 0:
            images = F.interpolate(images, self.size, mode="bilinear")
        self._kept = []
        self.vit(self.normalize(images))
        kept, self._kept = self._kept, []
        return [self._tokens(x) for x in kept]

    def _tokens(self, x: Tensor) -> Tensor:
        patches = (self.size // self.patch) ** 2
        return (x[:, -patches:] + x[:, :1]).transpose(1, 2)


class DinoHeads(nn.Module):
    """Features, a tensor [B, C, tokens] for each depth -> logits [B, depths, tokens]."""

    def __init__(self, channels: int, depths: int, kernel: int = 9):
        super().__init__()
        self.heads = nn.ModuleList([_Head(channels, kernel) for _ in range(depths)])
        self.eval()  # spectral norms iterate in `begin_step` alone, not in each forward pass

    def begin_step(self) -> None:
        """One power iteration of each spectral norm: once a step, on any number of ranks and micro-batches."""
        self.train()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv1d):
                    _ = module.weight  # computing it iterates
        self.eval()

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], 1)


class _Head(nn.Module):
    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.point, self.wide = _block(channels, 1), _block(channels, kernel)
        self.logit = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, tokens) -> (B, 1, tokens)
        x = self.point(x)
        return self.logit((x + self.wide(x)) * 0.5**0.5)


def _block(channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), nn.GroupNorm(math.gcd(32, channels), channels), nn.LeakyReLU(0.2))


def load_vit(name: str, weights: bool = True) -> nn.Module:
    """A ViT of `transformers` (ViTModel, Dinov2Model, ...) by Hub id or folder; without `weights` its architecture
    alone. Raises `UserError` where it cannot be had or is no such network."""
    advice = "give discriminator.vit a Hub id or a folder of a ViT of transformers"
    vit = load_pretrained(name, advice, weights)
    wanted = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
    numbers = all(isinstance(getattr(vit.config, key, None), int) for key in wanted)
    if not numbers or not any(key.endswith("cls_token") for key, _ in vit.named_parameters()):
        raise UserError(f"discriminator.vit = {name} is a {type(vit).__name__}; it must be a ViT with a class token")
    return vit
