"""VQGAN-LC (arXiv 2406.11837): a frozen codebook of a vision encoder's clustered features, and a trained projector.

tokenizer/make_codebook.py makes the features. Codes are P b + bias for a row b of them; P has no other input, so that a
step moves every code at once."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nsvq.errors import UserError
from nsvq.tokenizer.quantizers.base import NearestConfig, NearestQuantizer


class LCConfig(NearestConfig):
    name: Literal["lc"] = Field(description="lc: a trained projection of clustered features of a vision encoder.")
    features: Path = Field(description="File of features [K, D] from tokenizer/make_codebook.py; K codes.")


class LC(NearestQuantizer):
    """`features` [K, D] is a buffer; the projector D -> d starts at N(0, 1/d), as in the authors' code. Features are
    centered and brought to a mean square length of 1, so that codes of any encoder start as those of SimVQ do, at
    N(0, 1/d): with features as large as MobileNetV2's, all latents fall to one code and stay there."""

    Config = LCConfig

    def __init__(self, config: LCConfig, dim: int):
        super().__init__(config, dim)
        features = load_features(config.features)
        features = features - features.mean(0)
        self.register_buffer("features", features / features.square().sum(1).mean().sqrt())
        self.codebook_size = len(self.features)
        self.projector = nn.Linear(self.features.shape[1], dim)
        nn.init.normal_(self.projector.weight, std=dim**-0.5)

    def codebook(self) -> Tensor:
        return self.projector(self.features)


def load_features(path: Path) -> Tensor:
    """Features [K, D] float32 of a safetensors file. Raises `UserError` where it holds none."""
    try:
        features = load_file(path)["features"].float()
    except (OSError, SafetensorError, KeyError) as error:
        advice = "make one with tokenizer/make_codebook.py, and give it as --quantizer.features"
        raise UserError(f"{path} is no file of features ({type(error).__name__} {error}): {advice}") from None
    if features.dim() != 2 or len(features) < 2 or not features.isfinite().all():
        raise UserError(f"{path}: features must be finite and [K, D] with K >= 2, not {tuple(features.shape)}")
    if not (features != features[0]).any():
        raise UserError(f"{path}: all {len(features)} features are the same, of which no codebook can be made")
    return features
