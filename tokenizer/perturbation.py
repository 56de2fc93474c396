"""Latent perturbation (RobustTok, arXiv 2503.08354): some tokens of some images get another code from near their own,
as a generator's mistakes do. In training, the decoder learns to forgive them; in evaluation, pFID says whether it does.

Of a share beta of images, a share alpha of tokens get one of the delta codes that are nearest to their own code, which
counts as one of them. What is drawn for an image depends on its seed alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nsvq.common.config import Config
from nsvq.errors import UsageError
from nsvq.tokenizer.quantizers import Quantized, Quantizer

_TILE_ELEMENTS = 2**24  # distances at a time: 64 MiB
_TRAINING = 7  # sets the draws apart from those that data and networks make of the same seed and position


class PerturbationConfig(Config):
    """How many tokens get another code, and how far from their own."""

    alpha: float = Field(0.5, gt=0, le=1, description="Share of tokens of a perturbed image.")
    beta: float = Field(1.0, gt=0, le=1, description="Share of images.")
    delta: int = Field(100, ge=2, description="Nearest codes of which one is drawn.")


class TrainingPerturbationConfig(PerturbationConfig):
    """Latent perturbation in training; the defaults are RobustTok's."""

    alpha: float = Field(1.0, gt=0, le=1, description="Share of tokens of a perturbed image, at the start.")
    beta: float = Field(0.1, gt=0, le=1, description="Share of images.")
    anneal_from: float = Field(40, ge=0, description="Epoch from which on alpha falls.")
    anneal_to: float = Field(120, ge=0, description="Epoch from which on it is 0.")

    @model_validator(mode="after")
    def _falls(self) -> "TrainingPerturbationConfig":
        if self.anneal_to < self.anneal_from:
            raise ValueError(f"anneal_to = {self.anneal_to:g} must not be before anneal_from = {self.anneal_from:g}")
        return self

    def alpha_at(self, epoch: float) -> float:
        """alpha after `epoch` epochs: a line between the two."""
        if epoch >= self.anneal_to:
            return 0.0
        if epoch <= self.anneal_from:
            return self.alpha
        return self.alpha * (self.anneal_to - epoch) / (self.anneal_to - self.anneal_from)


@torch.no_grad()
def nearest_codes(codes: Tensor, codebook: Tensor, count: int) -> Tensor:
    """The `count` nearest rows of codebook [K, d] to each of codes [n, d], nearest first: [n, count] int64."""
    center = codebook.float().mean(0)
    codes, codebook = codes.float() - center, codebook.float() - center
    rows = codes.split(max(1, _TILE_ELEMENTS // len(codebook)))
    return torch.cat([torch.cdist(some, codebook).topk(count, largest=False).indices for some in rows])


def perturb(
    indices: Tensor,
    neighbours: Callable[[Tensor], Tensor],
    seeds: Sequence[Sequence[int]],
    alpha: float,
    beta: float,
    delta: int,
) -> Tensor:
    """indices [B, h, w] with some replaced, by the seed of each image. `neighbours`: codes [n] -> their nearest codes
    [n, delta]."""
    shape = tuple(indices.shape[1:])
    ranks = np.full(tuple(indices.shape), -1)  # which of the nearest codes; -1: the token stays
    for image, seed in zip(ranks, seeds, strict=True):
        rng = np.random.default_rng(seed)
        if rng.random() < beta:
            image[:] = np.where(rng.random(shape) < alpha, rng.integers(delta, size=shape), -1)
    places = np.flatnonzero(ranks >= 0)  # known on the host, which so waits for no GPU
    if not len(places):
        return indices
    drawn, at = (torch.from_numpy(x).to(indices.device, non_blocking=True) for x in (ranks.flat[places], places))
    flat = indices.flatten()
    near = neighbours(flat[at]).gather(1, drawn[:, None]).squeeze(1)
    return flat.index_copy(0, at, near).view_as(indices)


class Perturbation:
    """Between quantizer and decoder in training. Raises `UsageError` where the quantizer has too few codes.

    An image's draws come from the run's seed and its position in the run: ranks, micro-batches and a resume change
    nothing of them."""

    def __init__(self, config: TrainingPerturbationConfig, quantizer: Quantizer, seed: int):
        if config.delta > quantizer.codebook_size:
            what = f"must be at most the number of codes, {quantizer.codebook_size}"
            raise UsageError(f"perturbation.delta = {config.delta} {what}")
        self.config, self.quantizer, self.seed = config, quantizer, seed
        self.alpha = config.alpha  # of this step

    def at(self, positions: Sequence[int]) -> Callable[[Quantized], Tensor]:
        """For a micro-batch of images at these positions: `Quantized` -> what the decoder sees [B, d, h, w], with the
        gradient that it had."""

        config = self.config

        @torch.no_grad()
        def moves(indices: Tensor) -> Tensor:
            with torch.autocast(indices.device.type, enabled=False):
                codebook = self.quantizer.codebook()
            near = lambda codes: nearest_codes(codebook[codes], codebook, config.delta)  # noqa: E731
            seeds = [(self.seed, _TRAINING, position) for position in positions]
            changed = perturb(indices, near, seeds, self.alpha, config.beta, config.delta)
            return (codebook[changed] - codebook[indices]).permute(0, 3, 1, 2)

        return lambda quantized: quantized.z_q + moves(quantized.indices) if self.alpha else quantized.z_q
