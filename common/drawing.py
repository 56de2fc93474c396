"""Samples of a generator in training, with averaged weights: a picture, and a Frechet distance."""

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from nsvq.common.config import Config
from nsvq.common.fsdp import full
from nsvq.common.trainer import Trainer

Distance = Callable[[Callable[[range], Tensor], int], dict[str, float]]


class DrawingConfig(Config):
    """Samples during training, of averaged weights and fixed seeds: a picture, and a Frechet distance."""

    images: int = Field(16, ge=1, description="Images in the picture, of classes spread over all.")
    guidance_scale: float = Field(2.0, ge=0, description="Classifier-free guidance; 1 is none.")
    fd_every: int | None = Field(None, ge=1, description="Steps between two Frechet distances to the test split.")
    fd_samples: int = Field(5_000, ge=2, description="Samples in each; sample i has seed i and class i mod C.")
    fd_features: str = Field("inception-v3-compat", description="Their features, as --features of eval/generation.py.")
    fd_features_weights: Path | None = Field(None, description="Weights of these features; null downloads them.")
    fd_guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance of these samples; 1 is none.")


class Drawing:
    """Draws from `network`: the model that trains, or a copy of it, where FSDP splits that one.

    sample(labels, seeds, guidance_scale) returns images [B, 3, H, W], about in [-1, 1], with the weights in `network`.
    distance(draw, n), where there is one, measures n samples that draw(range of numbers) makes; a collective call.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        classes: int,
        sample: Callable[[list[int], range, float], Tensor],
        distance: Distance | None,
    ):
        self.trainer, self.classes, self.sample, self.measures = trainer, max(1, classes), sample, distance
        self.config: DrawingConfig = trainer.config.sampling
        self.split = trainer.accelerator.is_fsdp2
        self.network = copy.deepcopy(model).requires_grad_(False).to(trainer.device) if self.split else model

    def averaged(self, in_place: Callable[[], contextlib.AbstractContextManager]) -> contextlib.AbstractContextManager:
        """In it `network` has the averages; `in_place` brings them into the model that trains. A collective call."""
        if not self.split:
            return in_place()
        for parameter, average in zip(self.network.parameters(), self.trainer.ema.shadow_params, strict=True):
            parameter.copy_(full(average))
        return contextlib.nullcontext()

    def picture(self) -> None:
        count = self.config.images
        labels = [i * self.classes // count for i in range(count)]
        images = self.sample(labels, range(count), self.config.guidance_scale)
        self.trainer.run.save_picture(images, per_row=math.isqrt(count - 1) + 1)

    def distance(self, last: bool) -> dict[str, float]:
        """{metric name: Frechet distance}, where one is due. A collective call."""
        trainer, every = self.trainer, self.config.fd_every
        if self.measures is None or every is None or (trainer.run.step % every and not last):
            return {}
        with trainer.averaged_weights():
            found = self.measures(self._of_all_classes, self.config.fd_samples)
        if trainer.guard.interrupted_anywhere():
            trainer.run.warn("a signal came: no distance here, it would take the time of the checkpoint")
            return {}
        return found

    def _of_all_classes(self, numbers: range) -> Tensor:
        """Samples of all classes in turn: number i has seed i. Black ones once the run is to stop, which are not
        measured."""
        if self.trainer.guard.interrupted():
            size = self.trainer.config.data.image_size
            return torch.zeros(len(numbers), 3, size, size, device=self.trainer.device)
        return self.sample([i % self.classes for i in numbers], numbers, self.config.fd_guidance_scale)
