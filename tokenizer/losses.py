"""Reconstruction, perceptual and adversarial losses of stage one."""

import contextlib
import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import lpips
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.errors import UserError
from nsvq.tokenizer.adaptive_weight import AdaptiveWeight
from nsvq.tokenizer.alignment import RATIO_CAP, RATIO_EPSILON, Alignment, AlignmentConfig
from nsvq.tokenizer.logit_loss import LogitLoss, LogitsConfig
from nsvq.tokenizer.nsvq_config import PullConfig
from nsvq.tokenizer.quantizers import Quantizer
from nsvq.tokenizer.schedule import Phase


class LossConfig(Config):
    """L = L1 + perceptual + adversarial + codebook + beta commitment, to which come the NS loss (`nsvq.pull`; NSVQ, eq.
    11-12) and the quantizer's own terms."""

    pixel: Literal["l1", "mse"] = Field("l1", description="Reconstruction loss over pixels.")
    perceptual: Literal["vgg", "squeeze", "none"] = Field("vgg", description="Backbone of LPIPS.")
    perceptual_weights: Path | None = Field(None, description="torchvision's weights as a file; null downloads them.")
    perceptual_precision: Literal["fp32", "bf16"] = Field("fp32", description="Autocast type of LPIPS.")
    perceptual_weight: float = Field(1.0, ge=0, description="Weight of LPIPS.")
    logits: LogitsConfig | None = Field(None, description="The logit-perceptual loss, beside LPIPS.")
    alignment: AlignmentConfig | None = Field(None, description="Latents aligned with a frozen vision model.")
    adversarial_weight: float = Field(0.1, ge=0, description="Weight of the generator's GAN loss; 0 trains no GAN.")
    adversarial_cap: float | None = Field(
        None, gt=0, description="Largest adaptive factor on it (VQGAN: 10000); null: the weight is constant."
    )
    lecam_weight: float = Field(0.0, ge=0, description="Weight of LeCAM's regularisation of the discriminator.")
    codebook_weight: float = Field(1.0, ge=0, description="Weight of the codebook loss (VQGAN's code: beta).")
    commitment_weight: float = Field(0.25, ge=0, description="beta, the weight of the commitment loss.")


RECONSTRUCTION = ("l1", "mse", "perceptual", "logits")  # whose gradient adaptive weights are measured by


def phase_weights(
    config: LossConfig, pull: PullConfig | None, phase: Phase, adversarial_factor: float | None, quantizer: Quantizer
) -> dict[str, float]:
    """Weight of each loss term that a phase trains with; a term that is not named is not computed (eq. 11-16).
    "adversarial" is there where the discriminator trains, also while its weight on the generator is still 0; with a
    factor of None there is no GAN. Of what the quantizer trains with, the codebook loss alone goes on when the encoder
    is frozen."""
    if phase == "discriminator":
        return {"adversarial": 0.0}
    weights: dict[str, float] = {config.pixel: 1.0}
    if config.perceptual != "none":
        weights["perceptual"] = config.perceptual_weight
    if config.logits is not None:
        weights["logits"] = config.logits.weight
    if "codebook" in quantizer.terms:
        weights["codebook"] = config.codebook_weight
    if phase == "stage1":
        if "commitment" in quantizer.terms:
            weights["commitment"] = config.commitment_weight
        if pull is not None:
            weights["nonstationary"] = pull.weight
        weights |= quantizer.loss_weights()
        if config.alignment is not None:
            weights["alignment"] = config.alignment.resolved_weight
    if phase != "warmup" and config.adversarial_weight > 0 and adversarial_factor is not None:
        weights["adversarial"] = adversarial_factor * config.adversarial_weight
    return weights


class ImageLosses:
    """The loss terms of an output [B, 3, H, W] in [-1, 1] against its image, and of latents z, as `config` has them;
    means over the batch."""

    def __init__(
        self, config: LossConfig, lpips: nn.Module | None, logits: LogitLoss | None, alignment: Alignment | None
    ):
        self.pixel, self.lpips, self.logits, self.alignment = config.pixel, lpips, logits, alignment

    def __call__(self, z: Tensor, output: Tensor, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Those of the terms that are `wanted`, and l1 in any case, by name."""
        terms = {"l1": (output - images).abs().mean()}
        if self.pixel == "mse":
            terms["mse"] = (output - images).square().mean()
        if "perceptual" in wanted:
            terms["perceptual"] = self.lpips(output, images).mean()
        if "logits" in wanted:
            terms["logits"] = self.logits(output, images)
        if "alignment" in wanted:
            terms["alignment"] = self.alignment(z, images)
        return terms


def load_losses(config: LossConfig, latent_channels: int, device: torch.device) -> ImageLosses:
    """With the frozen networks that `config` names, of which some may be downloaded. Raises `UserError` and
    `UsageError` where one cannot be had."""
    metric = logits = alignment = None
    if config.perceptual != "none":
        metric = load_lpips(config.perceptual, config.perceptual_weights, config.perceptual_precision).to(device)
    if config.logits is not None:
        logits = LogitLoss(config.logits).to(device)
    if config.alignment is not None:
        alignment = Alignment(config.alignment, latent_channels).to(device)
    return ImageLosses(config, metric, logits, alignment)


def adaptive_weights(config: LossConfig, encoder: nn.Module, decoder: nn.Module) -> dict[str, AdaptiveWeight]:
    """By the terms that they weigh: the GAN's at the decoder's last layer, where `adversarial_cap` asks for it, and the
    alignment's at the encoder's, in its form vf."""
    found = {}
    if config.adversarial_cap is not None:
        found["adversarial"] = AdaptiveWeight(decoder.conv_out.weight, config.adversarial_cap)
    if config.alignment is not None and config.alignment.form == "vf":
        found["alignment"] = AdaptiveWeight(encoder.conv_out.weight, RATIO_CAP, RATIO_EPSILON)
    return found


def load_lpips(net: str, weights: Path | None, precision: Literal["fp32", "bf16"] = "fp32") -> nn.Module:
    """LPIPS (arXiv 1801.03924) as a frozen module: two images in [-1, 1] [B, 3, H, W] -> distances [B]. `net` is vgg,
    squeeze or alex. The backbone comes from `weights`, else from torchvision's download. bf16: its convolutions, at
    twice the rate on a GPU. Raises `UserError` where neither works."""
    try:
        metric = _lpips(net, pnet_rand=weights is not None)
    except (URLError, OSError) as error:
        advice = "give a file of torchvision's weights (--loss.perceptual_weights FILE)"
        other = "or choose --loss.perceptual squeeze or none"
        raise UserError(f"the {net} weights of LPIPS cannot be downloaded ({error}); {advice}, {other}") from None
    if weights is not None:
        _load_backbone(metric.net, weights)
    return _Distance(metric, precision == "bf16").eval().requires_grad_(False)


def random_lpips(net: str, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """The same with random weights, which take as much time and memory: for plans and benchmarks."""
    return _Distance(_lpips(net, pnet_rand=True, pretrained=False), precision == "bf16").eval().requires_grad_(False)


def _lpips(net: str, **how: bool) -> lpips.LPIPS:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the package asks torchvision in an old form
        return lpips.LPIPS(net=net, verbose=False, **how)


class _Distance(nn.Module):
    def __init__(self, metric: nn.Module, bf16: bool):
        super().__init__()
        self.metric, self.bf16 = metric, bf16

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, torch.bfloat16, enabled=self.bf16):
            return self.metric(a.float(), b.float()).flatten().float()


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        # lpips cuts torchvision's `features` into slices, and keeps the index of each layer: slice2.3 is features.3.
        wanted = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
        backbone.load_state_dict({name: state[source] for name, source in wanted.items()})
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        what = "does not hold the backbone's weights in torchvision's names"
        raise UserError(f"{path} {what}: {type(error).__name__} {error}") from None


def generator_adversarial(fake_logits: Tensor) -> Tensor:
    """Non-saturating: softplus(-mean of an image's patch logits), averaged over images (SimVQ's form)."""
    return F.softplus(-fake_logits.flatten(1).mean(1)).mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
