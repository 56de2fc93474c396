"""What the network learns to predict, by the name that a config gives it: rectified flow, or a DDPM.

Each objective noises latents at a level in (0, 1), of which the network is told `timestep(level)`."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from pydantic import Field
from torch import Tensor

from nsvq.common.config import Config
from nsvq.diffusion.samplers import TIMESTEPS, ddpm_scheduler, flow_scheduler, timestep

_SHIFT_FREE_DIM = 4096


class ObjectiveOptions(Config):
    """Options of an objective, in a subclass with `name` as a `Literal`: the section `objective` of a config."""

    def check_steps(self, steps: int) -> None:
        """Raises `ValueError` where its scheduler cannot sample in so many steps."""


class FlowConfig(ObjectiveOptions):
    """Rectified flow: the network predicts v = noise - x_0 at x = (1 - sigma) x_0 + sigma noise."""

    name: Literal["flow"] = Field("flow", description="flow: rectified flow (docs/diffusion.md).")
    noise_levels: Literal["logit-normal", "uniform"] = Field("logit-normal", description="Sigma, before the shift.")
    logit_mean: float = Field(0.0, description="Mean of logit(sigma), for logit-normal levels.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of logit(sigma), for logit-normal levels.")
    shift: float | None = Field(None, gt=0, description="Shift s of sigma; null: sqrt(dim / 4096), at least 1.")


class DDPMConfig(ObjectiveOptions):
    """DDPM of 1000 steps: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""

    name: Literal["ddpm"] = Field("ddpm", description="ddpm: DDPM (docs/diffusion.md).")
    prediction: Literal["epsilon", "v"] = Field("epsilon", description="The noise, or v of Salimans and Ho.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="Betas from 1e-4 to 2e-2, or cosine alpha_bar.")

    def check_steps(self, steps: int) -> None:
        if TIMESTEPS % steps:
            raise ValueError(f"sampling.steps = {steps} must divide {TIMESTEPS}, the steps of the DDPM")


class Objective:
    """What the objectives share: the loss, given `noised` of each. A subclass is made of its `Config` and the shape
    (C, H, W) of the latents, and is registered at the end of this file."""

    description: str  # a line for the model card

    def levels(self, normal: Tensor) -> Tensor:
        """Noise levels in [0, 1] for training from standard normal draws, float32, any shape."""
        raise NotImplementedError

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """float32 latents and noise [B, C, H, W], level [B] -> noisy latents and what to predict from them."""
        raise NotImplementedError

    def scheduler(self) -> SchedulerMixin:
        """The stock scheduler that a pipeline is saved with."""
        raise NotImplementedError

    def losses(self, predict: Callable, latents: Tensor, noise: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        """Squared error for each sample, mean over its values. `predict(x, timestep, labels)`; latents and noise
        [B, C, H, W], level [B], labels [B] -> [B] float32."""
        x, target = self.noised(latents.float(), noise.float(), level.float())
        return (predict(x, timestep(level), labels).float() - target).square().flatten(1).mean(1)


class Flow(Objective):
    """Rectified flow (Liu et al., arXiv 2209.03003), with the noise levels of Esser et al., arXiv 2403.03206."""

    def __init__(self, config: FlowConfig, latent_shape: tuple[int, ...]):
        self.config = config
        self.shift = config.shift or dimension_shift(latent_shape)
        drawn = f"logit(sigma) normal with mean {config.logit_mean:g} and deviation {config.logit_std:g}"
        self.description = (
            "rectified flow, v = noise - x0 at x = (1 - sigma) x0 + sigma noise; "
            f"{drawn if config.noise_levels == 'logit-normal' else 'sigma uniform'}, then shifted by "
            f"s = {self.shift:.4g}, in sampling too"
        )

    def levels(self, normal: Tensor) -> Tensor:
        normal = normal.float()
        if self.config.noise_levels == "uniform":
            return shift_sigma(torch.special.ndtr(normal), self.shift)
        return shift_sigma(torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal), self.shift)

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        sigma = level[:, None, None, None]
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def scheduler(self) -> SchedulerMixin:
        """DPM-Solver++(2M) over flow sigmas, with the shift of training."""
        return flow_scheduler(self.shift)


class DDPM(Objective):
    """DDPM (Ho et al., arXiv 2006.11239) with its linear betas or the cosine schedule (Nichol and Dhariwal, arXiv
    2102.09672), predicting the noise or v (Salimans and Ho, arXiv 2202.00512), the same for latents of any shape."""

    def __init__(self, config: DDPMConfig, latent_shape: tuple[int, ...] = ()):
        self.prediction_type = {"epsilon": "epsilon", "v": "v_prediction"}[config.prediction]
        betas = {"linear": ("linear", 1e-4, 2e-2), "cosine": ("squaredcos_cap_v2", 1e-4, 2e-2)}[config.schedule]
        self.noise_schedule = dict(zip(("beta_schedule", "beta_start", "beta_end"), betas, strict=True))
        self.process = DDPMScheduler(TIMESTEPS, **self.noise_schedule)
        self.description = f"DDPM of {TIMESTEPS} steps, {config.prediction}-prediction, {config.schedule} schedule"

    def levels(self, normal: Tensor) -> Tensor:
        return torch.special.ndtr(normal.float())

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep(level).long()
        x = self.process.add_noise(latents, noise, t)
        return x, noise if self.prediction_type == "epsilon" else self.process.get_velocity(latents, noise, t)

    def scheduler(self) -> SchedulerMixin:
        """DDIM."""
        return ddpm_scheduler(self.prediction_type, self.noise_schedule)


def dimension_shift(latent_shape: tuple[int, ...]) -> float:
    """sqrt(dim / 4096) for dim = C H W > 4096, else 1: the same sigma destroys less of a larger latent, whose values
    help each other (Esser et al., arXiv 2403.03206, eq. 23; Zheng et al., arXiv 2510.11690)."""
    return math.sqrt(max(1.0, math.prod(latent_shape) / _SHIFT_FREE_DIM))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s sigma / (1 + (s - 1) sigma), which keeps 0 and 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_class: int) -> Tensor:
    """Labels [B] with a share `probability` replaced by the null class, and those that are -1 (none) too."""
    return torch.where((uniform < probability) | (labels < 0), null_class, labels)


OBJECTIVES: dict[type[ObjectiveOptions], type] = {FlowConfig: Flow, DDPMConfig: DDPM}
ObjectiveConfig = FlowConfig | DDPMConfig  # told apart by `name`


def make_objective(config: ObjectiveOptions, latent_shape: tuple[int, ...]) -> Objective:
    """The configured objective for latents of `latent_shape` (C, H, W)."""
    return OBJECTIVES[type(config)](config, latent_shape)
