"""FSP, finite scalar perturbation (arXiv 2602.17133, section 3.3): each channel goes through a CDF-like g to [0, 1],
and training adds uniform noise as wide as a bin, or rounds to the bin's centre.

z = g(a);  code: c = (floor(L z) + 1/2) / L;  noise: u ~ U(-eta/2L, eta/2L), kept where z + u stays in [0, 1]
The decoder sees (c - 1/2) sqrt(12), of variance 1 - 1/L^2. Regulariser: mean and variance of a match those of which g
is (nearly) the CDF, so that the bins fill evenly. The draws are per element, as in the authors' code."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer.quantizers.base import straight_through
from nsvq.tokenizer.quantizers.fsq import GridConfig, GridQuantizer
from nsvq.tokenizer.quantizers.vp import moment_losses
from nsvq.tokenizer.ranks import Draws


def _tanh(a: Tensor) -> Tensor:
    return (torch.tanh(a) + 1) / 2


def _normal(a: Tensor) -> Tensor:
    return (1 + torch.erf(a / math.sqrt(2))) / 2


def _laplace(a: Tensor) -> Tensor:
    return (1 + a.sign() * (1 - torch.exp(-a.abs()))) / 2


ACTIVATIONS = {  # g, and the variance of the distribution that it belongs to
    "tanh": (_tanh, math.pi**2 / 12),
    "normal": (_normal, 1.0),
    "sigmoid": (torch.sigmoid, math.pi**2 / 3),
    "laplace": (_laplace, 2.0),
}
_EDGE = math.sqrt(3)  # of the range that the decoder sees


class FSPConfig(GridConfig):
    name: Literal["fsp"] = Field(description="fsp: bounded channels, perturbed in training and rounded after.")
    activation: Literal["tanh", "normal", "sigmoid", "laplace"] = Field("normal", description="g; the paper's is tanh.")
    quantize_rate: float = Field(0.5, ge=0, le=1, description="Share of elements that training rounds.")
    noise: float = Field(1.0, gt=0, description="eta, the width of the noise in bins.")
    mean_weight: float = Field(0.1, ge=0, description="Weight of the squared mean of a.")
    variance_weight: float = Field(0.07, ge=0, description="Weight of the squared error of a's variance.")


class FSP(GridQuantizer):
    """Codes [K, d] are the centres of bins; the state is that of the random draws."""

    Config = FSPConfig

    def __init__(self, config: FSPConfig, dim: int):
        super().__init__(config, dim)
        self.activation, self.variance = ACTIVATIONS[config.activation]
        self.draws = Draws()

    def loss_weights(self) -> dict[str, float]:
        return {"latent_mean": self.config.mean_weight, "latent_variance": self.config.variance_weight}

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, dict, dict]:
        indices, prepared = self.lookup(z), self.prepare(z)
        codes = self.codes(indices)
        losses = {"commitment": (prepared - codes).square().mean()}
        value, stats = codes, dict[str, Tensor]()
        if self.training:
            losses |= moment_losses(z, self.variance)
            value, stats = self._perturb(prepared.detach(), codes)
        return straight_through(prepared, value), indices, losses, stats

    def _perturb(self, prepared: Tensor, codes: Tensor) -> tuple[Tensor, dict]:
        generator = self.draws.generator()
        width = self.config.noise * 2 * _EDGE / self.levels
        moved = prepared + (self.draws.uniform(generator, prepared, self.dim) - 0.5) * width
        accepted = moved.abs() <= _EDGE
        rounds = self.draws.uniform(generator, prepared, self.dim) < self.config.quantize_rate
        value = torch.where(rounds, codes, torch.where(accepted, moved, prepared))
        return value, {"acceptance": accepted.float().mean()}

    def prepare(self, z: Tensor) -> Tensor:
        """Pre-activations -> (g(a) - 1/2) sqrt(12), in [-sqrt(3), sqrt(3)]."""
        return (self.activation(z) - 0.5) * (2 * _EDGE)

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        return self.index((self.activation(z) * self.levels).floor())

    def codes(self, indices: Tensor) -> Tensor:
        return ((self.level(indices) + 0.5) / self.levels - 0.5) * (2 * _EDGE)
