import math

import numpy as np
import pytest
import torch

from diffusion.flow import (
    FlowConfig,
    dimension_shift,
    drop_labels,
    flow_loss,
    make_scheduler,
    sample,
    shift_sigma,
    timestep,
    training_sigma,
)


def test_loss_equals_the_formula_in_float64():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 5, 3, 4, 4))
    sigma = np.array([0.001, 0.25, 0.5004, 0.7777, 0.9999], np.float32)
    seen = {}

    def velocity(x, time, labels):
        seen.update(x=x, time=time, labels=labels)
        return torch.sin(x) * time[:, None, None, None] / 500

    arrays = [torch.from_numpy(a.astype(np.float32)) for a in (x0, noise)]
    losses = flow_loss(velocity, *arrays, torch.from_numpy(sigma), torch.arange(5))
    s = sigma.astype(np.float64)[:, None, None, None]
    x = (1 - s) * x0 + s * noise
    told = np.array([1, 250, 500, 777, 999])  # floor(1000 sigma)
    expected = ((np.sin(x) * told[:, None, None, None] / 500 - (noise - x0)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(seen["x"].numpy(), x, atol=1e-6)
    assert seen["time"].tolist() == told.tolist()
    assert seen["labels"].tolist() == [0, 1, 2, 3, 4]
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-6)


def test_loss_is_float32_whatever_the_latents_and_the_network_give():
    latents, noise, sigma = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), torch.rand(4)
    exact = flow_loss(lambda x, *_: x.bfloat16().float(), latents.half().float(), noise, sigma, None)
    losses = flow_loss(lambda x, *_: x.bfloat16(), latents.half(), noise, sigma, None)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, exact)


def test_shift_follows_the_dimension_of_the_latents():
    assert dimension_shift((128, 16, 16)) == pytest.approx(math.sqrt(8))
    assert dimension_shift((16, 16, 16)) == 1.0
    assert dimension_shift((4, 8, 8)) == 1.0


def test_training_noise_levels_are_logit_normal_and_shifted():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    sigma = training_sigma(normal, FlowConfig(logit_mean=-0.4, logit_std=1.3), shift=2.5).double()
    # The shift multiplies sigma / (1 - sigma) by s, so it moves the logit by log s.
    logits = torch.logit(sigma)
    assert logits.mean().item() == pytest.approx(-0.4 + math.log(2.5), abs=0.02)
    assert logits.std().item() == pytest.approx(1.3, abs=0.02)
    assert sigma.min() > 0
    assert sigma.max() < 1


@pytest.mark.parametrize("shift", [1.0, math.sqrt(8)])
def test_scheduler_uses_the_shift_of_training(shift):
    scheduler = make_scheduler(shift)
    scheduler.set_timesteps(20)
    uniform = torch.linspace(0, 0.999, 21, dtype=torch.float64).flip(0)  # the scheduler starts at 0.999, not at 1
    torch.testing.assert_close(scheduler.sigmas.double(), shift_sigma(uniform, shift), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, math.sqrt(8)])
@pytest.mark.parametrize("steps", [7, 50, 250])
def test_network_is_told_the_times_in_training_that_the_scheduler_tells_it(shift, steps):
    scheduler = make_scheduler(shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[:-1].double()
    clear = (1000 * sigmas - (1000 * sigmas).round()).abs() > 1e-3  # of integers, the rounding may go either way
    assert clear.sum() >= 0.9 * steps - 1
    assert torch.equal(timestep(sigmas)[clear], scheduler.timesteps[clear].double())


MEAN, DEVIATION = 0.7, 0.4


def gaussian_velocity(x, sigma):
    """E[noise - x_0 | x] for x_0 ~ N(MEAN, DEVIATION^2): both are jointly normal with x."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    residual = (x - (1 - sigma) * MEAN) / variance
    return sigma * residual - (MEAN + (1 - sigma) * DEVIATION**2 * residual)


def gaussian_error(steps, shift, believed=lambda sigma, time: sigma):
    """Largest error of samples against the exact solution of the flow, which keeps (x - mean) / deviation.

    `believed` is the noise level that the network answers for, given the real one and the time that it is told.
    """
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(shift)
    sigmas = []

    def velocity(x, time, labels):
        sigmas.append(float(scheduler.sigmas[len(sigmas)]))
        return gaussian_velocity(x, believed(sigmas[-1], float(time[0])))

    got = sample(velocity, scheduler, noise, torch.zeros(2, dtype=torch.int64), 1, steps=steps)
    start = sigmas[0]
    z = (noise - (1 - start) * MEAN) / math.sqrt((1 - start) ** 2 * DEVIATION**2 + start**2)
    return (got - (MEAN + DEVIATION * z)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_sampler_converges_to_the_exact_flow_of_a_gaussian(shift):
    errors = {steps: gaussian_error(steps, shift) for steps in (20, 80, 320)}
    assert errors[320] < 1e-3
    assert errors[320] < errors[80] / 8  # second order: a sixteenth in the limit
    assert errors[80] < errors[20] / 2


def test_times_cut_to_integers_cost_nothing_to_a_network_that_was_trained_on_them():
    exact = gaussian_error(320, 1.0)
    trained_on_cut = gaussian_error(320, 1.0, believed=lambda _, time: (time + 0.5) / 1000)  # the mean of its training
    trained_on_exact = gaussian_error(320, 1.0, believed=lambda _, time: time / 1000)
    assert trained_on_cut < 1.1 * exact
    assert trained_on_exact > 5 * exact


class Recorder:
    """A velocity that notes what is evaluated: its value is 1 + label, in every channel differently."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, time, labels):
        self.calls.append((int(time[0]), labels.tolist()))
        channels = torch.arange(1, x.shape[1] + 1).view(1, -1, 1, 1)
        return (1.0 + labels.view(-1, 1, 1, 1)) * channels * torch.ones_like(x)


def test_guidance_acts_on_all_channels():
    noise, scheduler = torch.randn(2, 5, 2, 2), make_scheduler(1.0)
    got = sample(Recorder(), scheduler, noise, torch.tensor([0, 2]), 9, steps=1, guidance_scale=3.0)
    v_class, v_null = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), 10.0
    v = (v_null + 3.0 * (v_class - v_null)) * torch.arange(1, 6).view(1, 5, 1, 1)
    # The only step goes from sigma = 0.999 to 0.
    torch.testing.assert_close(got, noise - 0.999 * v)


def test_guidance_of_one_evaluates_the_class_only_and_of_zero_the_null_class_only():
    labels = torch.tensor([0, 2])
    for scale, evaluated in [(1.0, [0, 2]), (0.0, [9, 9]), (0.5, [0, 2, 9, 9])]:
        velocity = Recorder()
        sample(velocity, make_scheduler(1.0), torch.randn(2, 3, 2, 2), labels, 9, steps=4, guidance_scale=scale)
        assert [call[1] for call in velocity.calls] == [evaluated] * 4


def test_outside_the_guidance_interval_only_the_class_is_evaluated():
    velocity = Recorder()
    labels = torch.tensor([0, 2])
    sample(velocity, make_scheduler(1.0), torch.randn(2, 3, 2, 2), labels, 9, steps=20, guidance_scale=2.0,
           guidance_interval=(0.3, 0.8))  # fmt: skip
    guided = [time for time, evaluated in velocity.calls if evaluated == [0, 2, 9, 9]]
    unguided = [time for time, evaluated in velocity.calls if evaluated == [0, 2]]
    assert len(guided) + len(unguided) == 20
    assert all(300 <= time <= 800 for time in guided)
    assert not any(300 <= time <= 800 for time in unguided)
    assert len(guided) == 10


def test_labels_are_dropped_with_the_given_probability_and_absent_ones_always():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(torch.full((100_000,), 3), uniform, 0.1, 7)
    assert set(dropped.tolist()) == {3, 7}
    assert (dropped == 7).double().mean().item() == pytest.approx(0.1, abs=0.005)
    assert drop_labels(torch.tensor([-1, 0]), torch.ones(2), 0.0, 7).tolist() == [7, 0]
