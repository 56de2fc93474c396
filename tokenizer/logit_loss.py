"""The logit-perceptual loss: a frozen ImageNet classifier should say of the output what it says of the image."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.tokenizer.teachers import CLASSIFIERS, Teacher, load_classifier


class LogitsConfig(Config):
    """The logit-perceptual loss (MaskBit, arXiv 2409.16211; TiTok, arXiv 2406.07550)."""

    network: str = Field("resnet50", description="resnet50, convnext_small, or a Python file that registers another.")
    weights: Path | None = Field(None, description="torchvision's weights as a file; null downloads them.")
    weight: float = Field(0.1, gt=0, description="Weight of the loss; logits: null is without.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Autocast type of the classifier.")

    @model_validator(mode="after")
    def _known(self) -> "LogitsConfig":
        if self.network.endswith(".py"):
            if self.weights is not None:
                raise ValueError("a Python file brings its own weights; set weights: null")
        elif self.network not in CLASSIFIERS:
            raise ValueError(f"network = {self.network!r} must be {', '.join(CLASSIFIERS)} or a Python file (.py)")
        return self


class LogitLoss(nn.Module):
    """Mean over images and classes of (f(output) - f(image))^2, f the logits at 224 pixels, images [B, 3, H, W] in
    [-1, 1]. The gradient goes to the output alone. `network`: in place of the one that the config names. Raises what
    `load_classifier` raises."""

    def __init__(self, config: LogitsConfig, network: nn.Module | None = None):
        super().__init__()
        self.classifier = Teacher(network or load_classifier(config.network, config.weights), config.precision)

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.classifier(images)
        return F.mse_loss(self.classifier(output), wanted)
