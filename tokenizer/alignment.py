"""Alignment of latents with a frozen vision model: the encoder learns to say what an image shows, which makes its
latents easier to generate. It looks at z, the encoder's output before quantization: there VA-VAE aligns, there the
gradient is exact, which behind the quantizer is straight-through, and codes follow z by their own losses.

cosine  GigaTok's loss (arXiv 2504.08736), on z: -mean cos(MLP(z_i), f_i)
vf      VA-VAE (arXiv 2501.01423, eq. 4-7): mean relu(1 - 0.5 - cos(W z_i, f_i))
        + mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - 0.25), weighed by `AdaptiveWeight` at the encoder's last layer
        (their code has W z in the second term, too)
The frozen features f are resized to the grid of the latents."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.tokenizer.teachers import Registered, Teacher, feature_width, load_vision_model

COSINE_MARGIN, DISTANCE_MARGIN = 0.5, 0.25  # VA-VAE's m1 and m2
RATIO_EPSILON, RATIO_CAP = 1e-4, 1e8  # and its limits of the adaptive weight
_WEIGHTS = {"cosine": 0.5, "vf": 0.1}
_ADVICE = "give another --loss.alignment.network, or the image_size that it takes, or set loss.alignment: null"


class AlignmentConfig(Config):
    """Cosine between projected latents and a vision model's patch features."""

    form: Literal["cosine", "vf"] = Field("cosine", description="GigaTok's cosine, or VA-VAE's two terms with margins.")
    network: str = Field(
        "facebook/dinov2-base",
        description="A vision model of transformers (id or folder), or a Python file that registers a network.",
    )
    layer: str | None = Field(None, description="Of a Python file's network: the part that gives patch features.")
    image_size: int = Field(224, ge=64, description="Side to which a transformers model's images are resized.")
    weight: float | None = Field(None, gt=0, description="Weight; null: 0.5 of cosine, 0.1 of vf.")
    width: int = Field(2048, ge=1, description="Width of the two hidden layers of cosine's MLP; vf has a linear map.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Autocast type of the vision model.")

    @property
    def resolved_weight(self) -> float:
        return self.weight or _WEIGHTS[self.form]

    @model_validator(mode="after")
    def _fits(self) -> "AlignmentConfig":
        if self.network.endswith(".py") != (self.layer is not None):
            raise ValueError("layer is needed for a Python file (.py), and has no meaning for a model of transformers")
        return self


class Alignment(nn.Module):
    """The loss of latents z [B, d, h, w] and images [B, 3, H, W] in [-1, 1]. Of it, `head` alone trains, and stays
    behind when the tokenizer is exported. `network`: in place of the one that the config names. Raises `UserError` and
    `UsageError` for a network that cannot be had or gives no patch features."""

    def __init__(self, config: AlignmentConfig, latent_channels: int, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        if network is None and config.layer is not None:
            network = Registered(config.network, layer=config.layer)
        network = network or load_vision_model(config.network, _ADVICE, config.image_size)
        self.teacher = Teacher(network, config.precision)
        self.head = make_head(config, latent_channels, feature_width(self.teacher, _ADVICE))

    def forward(self, z: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.teacher(images)
            features = F.interpolate(features, z.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        projected = self.head(z).float()  # (B, D, h, w)
        with torch.autocast(z.device.type, enabled=False):
            if self.config.form == "cosine":
                return -F.cosine_similarity(projected, features).mean()
            return vf_loss(z.float(), projected, features)


def make_head(config: AlignmentConfig, latent_channels: int, width: int) -> nn.Module:
    """z [B, d, h, w] -> [B, width, h, w], place by place: for cosine the MLP that REPA (arXiv 2410.06940) has, for vf
    VA-VAE's linear map W."""
    if config.form == "vf":
        return nn.Conv2d(latent_channels, width, 1, bias=False)
    hidden = config.width
    layers = [nn.Conv2d(latent_channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, hidden, 1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, width, 1))


def vf_loss(z: Tensor, projected: Tensor, features: Tensor) -> Tensor:
    """VA-VAE's sum of two terms (arXiv 2501.01423, eq. 4 and 5): z [B, d, h, w], W z and features [B, D, h, w]. The
    second compares all pairs of an image's places, (h w)^2 numbers an image."""
    cosine = F.relu(1 - COSINE_MARGIN - F.cosine_similarity(projected, features)).mean()
    angles = [F.normalize(x.flatten(2), dim=1) for x in (z, features)]  # (B, d or D, h w)
    between_z, between_f = (x.transpose(1, 2) @ x for x in angles)  # (B, h w, h w)
    return cosine + F.relu((between_z - between_f).abs() - DISTANCE_MARGIN).mean()
