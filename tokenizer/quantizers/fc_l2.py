"""Factorized codes with l2 normalisation (ViT-VQGAN, arXiv 2110.04627; LlamaGen, arXiv 2406.06525).

Latents and codes lie on the unit sphere, where the nearest code is that of the largest cosine. Since codes have
length 1, the nearest one to a latent is the same before and after its normalisation: stock lookup is exact."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer.quantizers.vq import VQ, VQConfig


class NormalizedConfig(VQConfig):
    name: Literal["fc_l2"] = Field(description="fc_l2: factorized codes on the unit sphere.")  # type: ignore[assignment]


class NormalizedVQ(VQ):
    """Codes w / |w| [K, d]; latents are normalised, and both losses are measured on the sphere."""

    Config = NormalizedConfig  # type: ignore[assignment]
    can_consolidate = False  # codes are directions

    def prepare(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def codebook(self) -> Tensor:
        return F.normalize(self.weight, dim=1)

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        super().initialize(F.normalize(latents, dim=1))
