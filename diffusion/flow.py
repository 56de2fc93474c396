"""Rectified flow: x_sigma = (1 - sigma) x_0 + sigma noise, and a network that predicts v = noise - x_0
(Liu et al., arXiv 2209.03003), with logit-normal noise levels (Esser et al., arXiv 2403.03206)."""

import inspect
import math
from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler
from pydantic import Field
from torch import Tensor

from common.config import Config

TIMESTEPS = 1000  # the network's unit of time: t = 1000 sigma
_SHIFT_FREE_DIM = 4096


class FlowConfig(Config):
    """Noise levels in training: sigmoid of a normal variable, then shifted."""

    logit_mean: float = Field(0.0, description="Mean of logit(sigma), before the shift.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of logit(sigma).")
    shift: float | None = Field(
        None,
        gt=0,
        description="s of sigma' = s sigma / (1 + (s - 1) sigma), in training and sampling; null is sqrt(dim / 4096) "
        "where latents have more than 4096 values, else 1.",
    )


def dimension_shift(latent_shape: tuple[int, ...]) -> float:
    """sqrt(dim / 4096) for dim = C H W > 4096, else 1: the same sigma destroys less of a larger latent, whose values
    help each other (Esser et al., arXiv 2403.03206, eq. 23; Zheng et al., arXiv 2510.11690)."""
    return math.sqrt(max(1.0, math.prod(latent_shape) / _SHIFT_FREE_DIM))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s sigma / (1 + (s - 1) sigma), which keeps 0 and 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigma(normal: Tensor, config: FlowConfig, shift: float) -> Tensor:
    """Noise levels in (0, 1) from standard normal draws, float32, any shape."""
    return shift_sigma(torch.sigmoid(config.logit_mean + config.logit_std * normal.float()), shift)


def timestep(sigma: Tensor) -> Tensor:
    """What the network is told of a noise level: floor(1000 sigma).

    diffusers' multistep schedulers cut their timesteps to integers. A network trained on the exact 1000 sigma would be
    told too small a time at every step of sampling, by 0.5 on average; so it is trained on what it will be told.
    """
    return torch.floor(TIMESTEPS * sigma)


def flow_loss(velocity: Callable, latents: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the velocity for each sample, mean over its values.

    `velocity(x, timestep, labels)` predicts noise - latents; latents and noise [B, C, H, W], sigma [B], labels [B]
    -> [B] float32.
    """
    latents, noise = latents.float(), noise.float()
    level = sigma.float()[:, None, None, None]
    predicted = velocity((1 - level) * latents + level * noise, timestep(sigma), labels)
    return (predicted.float() - (noise - latents)).square().flatten(1).mean(1)


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_class: int) -> Tensor:
    """Labels [B] with a share `probability` replaced by the null class, and those that are -1 (none) too."""
    return torch.where((uniform < probability) | (labels < 0), null_class, labels)


def make_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) over flow sigmas, with the shift of training."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


@torch.no_grad()
def sample(
    velocity: Callable,
    scheduler,
    noise: Tensor,
    labels: Tensor,
    null_class: int,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """From noise [B, C, H, W] to latents of the classes `labels` [B].

    v = v_null + guidance_scale (v_class - v_null) on all channels while sigma lies in `guidance_interval`, v_class
    alone outside of it. A scale of 1 evaluates the class only, 0 the null class only. Each diffusers scheduler of
    flow models will do; `generator` is for those that draw noise. `on_step(step, timestep, latents)` returns the
    latents to go on with.
    """
    null_labels = torch.full_like(labels, null_class)
    both = torch.cat([labels, null_labels])
    drawing = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(steps)
    # Timesteps that are equal after rounding would otherwise make the scheduler look up the wrong start.
    scheduler.set_begin_index(0)
    latents = noise
    for i, t in enumerate(scheduler.timesteps):
        time = t.floor().to(latents.device).expand(len(latents))  # as in training; some schedulers have fractions
        guided = guidance_interval[0] <= float(t) / TIMESTEPS <= guidance_interval[1]
        scale = guidance_scale if guided else 1.0
        if scale == 1:
            v = velocity(latents, time, labels)
        elif scale == 0:
            v = velocity(latents, time, null_labels)
        else:
            v_class, v_null = velocity(torch.cat([latents, latents]), time.repeat(2), both).chunk(2)
            v = v_null + scale * (v_class - v_null)
        latents = scheduler.step(v, t, latents, return_dict=False, **drawing)[0]
        if on_step is not None:
            latents = on_step(i, t, latents)
    return latents
