"""Samplers by name, and the sampling loop: guidance by the null class or by a weaker model, on diffusers' schedulers.

The network is called `predict(latents [B, C, H, W], timestep [B], class_labels [B]) -> prediction [B, C, H, W]`, with
timesteps from 0 to 999."""

import inspect
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

TIMESTEPS = 1000  # the network's unit of time
Sampler = Literal["euler", "heun", "dpm++", "sde", "ddim", "ddpm"]
_FLOW_SAMPLERS, _DDPM_SAMPLERS = get_args(Sampler)[:4], get_args(Sampler)[2:]
_ALGORITHMS = {"dpm++": "dpmsolver++", "sde": "sde-dpmsolver++"}
_LOWEST_LOG_SNR = -5.1  # of lambda, half the log of the signal-to-noise ratio: where linear betas end
# What of a scheduler's config the training decided.
_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")


def timestep(level: Tensor) -> Tensor:
    """What the network is told of a time in [0, 1]: floor(1000 level), at most 999. diffusers' multistep schedulers cut
    their timesteps to integers. A network trained on the exact 1000 sigma would be told too small a time at every step
    of sampling, by 0.5 on average; so it is trained on what it will be told."""
    return _whole(TIMESTEPS * level)


def _whole(time: Tensor) -> Tensor:
    return torch.floor(time).clamp(max=TIMESTEPS - 1)


def flow_scheduler(shift: float, sampler: str = "dpm++") -> SchedulerMixin:
    """A sampler of rectified flow with the shift of training."""
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift)
    if sampler == "heun":
        return FlowMatchHeunDiscreteScheduler(TIMESTEPS, shift)
    how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return DPMSolverMultistepScheduler(TIMESTEPS, algorithm_type=_ALGORITHMS[sampler], **how)


def ddpm_scheduler(prediction_type: str, noise_schedule: Mapping, sampler: str = "ddim") -> SchedulerMixin:
    """A sampler of a DDPM. `prediction_type`: "epsilon" or "v_prediction"; `noise_schedule`: diffusers' arguments for
    the betas, and their number where it is not 1000.

    Nothing is clipped, as latents have no range. The cosine schedule leaves almost no signal at its last timesteps
    (sqrt(alpha_bar) = 5e-5), so that dividing by it turns a small error of epsilon into a large one of x_0: epsilon
    starts one stride below them, and multistep solvers start where linear betas end."""
    common = {"num_train_timesteps": TIMESTEPS, "prediction_type": prediction_type, **noise_schedule}
    cosine = noise_schedule["beta_schedule"] == "squaredcos_cap_v2"
    if sampler in _ALGORITHMS:
        start = {"lambda_min_clipped": _LOWEST_LOG_SNR if cosine else -float("inf"), "timestep_spacing": "linspace"}
        return DPMSolverMultistepScheduler(**common, algorithm_type=_ALGORITHMS[sampler], **start)
    spacing = "leading" if cosine and prediction_type == "epsilon" else "trailing"
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler]
    return scheduler(**common, clip_sample=False, timestep_spacing=spacing)


def sampler_names(scheduler: SchedulerMixin) -> tuple[str, ...]:
    """The samplers that fit the model which `scheduler` belongs to."""
    flow = scheduler.config.get("prediction_type") == "flow_prediction"
    return _FLOW_SAMPLERS if flow or type(scheduler).__name__.startswith("FlowMatch") else _DDPM_SAMPLERS


def same_process(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Whether the networks of both predict the same thing of the same noisy latents, so that they can be mixed."""
    if (flow := sampler_names(one) is _FLOW_SAMPLERS) or sampler_names(other) is _FLOW_SAMPLERS:
        return flow and sampler_names(other) is _FLOW_SAMPLERS
    decided = ("prediction_type", "num_train_timesteps", *_BETAS)
    return all(one.config.get(name) == other.config.get(name) for name in decided)


def make_sampler(sampler: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """The sampler of that name for the model that `scheduler` belongs to. Raises `ValueError` where there is none of
    that name, or none for models of this kind."""
    config, names = scheduler.config, sampler_names(scheduler)
    flow = names is _FLOW_SAMPLERS
    if sampler not in names:
        kind = "rectified flow" if flow else "a DDPM"
        raise ValueError(f"{sampler!r} is no sampler of {kind}: take one of {', '.join(names)}")
    if flow:
        return flow_scheduler(config.get("flow_shift") or config.get("shift", 1.0), sampler)
    noise_schedule = {name: config[name] for name in ("num_train_timesteps", *_BETAS) if config.get(name) is not None}
    return ddpm_scheduler(config.prediction_type, noise_schedule, sampler)


def set_steps(scheduler: SchedulerMixin, steps: int) -> Tensor:
    """Prepare `scheduler` for sampling in that many steps; returns the timesteps at which the network is evaluated (one
    a step; Heun's method takes two, but in the last step). Raises `ValueError` for numbers of steps with which DDIM and
    DDPM would leave out a part of the noise."""
    if isinstance(scheduler, DDIMScheduler | DDPMScheduler) and scheduler.config.num_train_timesteps % steps:
        count = scheduler.config.num_train_timesteps
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        near = [max(n for n in divisors if n < steps), *[n for n in divisors if n > steps][:1]]
        what = f"the steps of {type(scheduler).__name__} must divide {count}, which {steps} does not"
        raise ValueError(f"{what}: take {' or '.join(map(str, near))}")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Equal steps before the shift, as diffusers' flow pipelines ask for; by default it shifts its last one twice.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    # Timesteps that are equal after rounding would otherwise make the scheduler look up the wrong start.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps


@torch.no_grad()
def sample(
    predict: Callable,
    scheduler: SchedulerMixin,
    noise: Tensor,
    labels: Tensor,
    null_class: int,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guide: Callable | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """From noise [B, C, H, W] to latents of the classes `labels` [B].

    While t / 1000 lies in `guidance_interval`, weak + guidance_scale (predict - weak) on all channels; outside of it
    `predict` alone. `weak` is `predict` at the null class (classifier-free guidance, Ho and Salimans, arXiv
    2207.12598), or `guide`, a weaker model that is asked for the same classes (autoguidance, Karras et al., arXiv
    2406.02507). A scale of 1 evaluates `predict` only, 0 `weak` only.

    `generator` is for samplers that draw noise. `on_step(step, timestep, latents)` returns the latents to go on with.
    Raises what `set_steps` does."""
    null_labels = torch.full_like(labels, null_class)
    strong = _at(predict, labels)
    weak = _at(predict, null_labels) if guide is None else _at(guide, labels)
    pair = _at(predict, torch.cat([labels, null_labels])) if guide is None else None
    drawing = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    def guided(latents: Tensor, time: Tensor, scale: float) -> Tensor:
        if scale in (0, 1):
            return (weak, strong)[int(scale)](latents, time)
        if pair is None:
            main, base = strong(latents, time), weak(latents, time)
        else:
            main, base = pair(torch.cat([latents, latents]), time.repeat(2)).chunk(2)
        return base + scale * (main - base)

    timesteps = set_steps(scheduler, steps)
    # k-diffusion's samplers (Euler, Heun, LMS) work on latents of another scale than the network's.
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    for i, t in enumerate(timesteps):
        # Some schedulers have fractions. A fill, where a copy would have the host wait for the GPU at each step.
        time = torch.full((len(latents),), _whole(t).item(), dtype=t.dtype, device=latents.device)
        inside = guidance_interval[0] <= float(t) / TIMESTEPS <= guidance_interval[1]
        prediction = guided(scaled(latents, t), time, guidance_scale if inside else 1.0)
        latents = scheduler.step(prediction, t, latents, return_dict=False, **drawing)[0]
        if on_step is not None:
            latents = on_step(i, t, latents)
    return latents


def _at(predict: Callable, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`predict` at these classes, all at one time. A network that offers `condition(timestep, class_labels)`, which its
    call takes as `condition`, computes it once for each class in the batch: all unconditional rows share one."""
    if not hasattr(predict, "condition"):
        return lambda latents, time: predict(latents, time, labels)
    classes, rows = labels.unique(return_inverse=True)

    def shared(latents: Tensor, time: Tensor) -> Tensor:
        condition = predict.condition(time[: len(classes)], classes)[rows]
        return predict(latents, time, labels, condition=condition)

    return shared
