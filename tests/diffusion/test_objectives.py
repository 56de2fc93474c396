import math

import numpy as np
import pytest
import torch

from nsvq.diffusion.objectives import (
    DDPM,
    DDPMConfig,
    Flow,
    FlowConfig,
    dimension_shift,
    drop_labels,
    make_objective,
)

SHAPE = (3, 4, 4)
LEVELS = np.array([0.001, 0.25, 0.5004, 0.7777, 0.9999], np.float32)
TOLD = np.array([1, 250, 500, 777, 999])  # floor(1000 level)


def drawn_losses(objective):
    """The losses of a made-up network, what it saw, and the float64 arrays they are of."""
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 5, *SHAPE))
    seen = {}

    def network(x, time, labels):
        seen.update(x=x, time=time, labels=labels)
        return torch.sin(x) * time[:, None, None, None] / 500

    arrays = [torch.from_numpy(a.astype(np.float32)) for a in (x0, noise)]
    losses = objective.losses(network, *arrays, torch.from_numpy(LEVELS), torch.arange(5))
    assert seen["time"].tolist() == TOLD.tolist()
    assert seen["labels"].tolist() == [0, 1, 2, 3, 4]
    assert losses.dtype == torch.float32
    return losses.numpy(), seen["x"].numpy(), x0, noise


def squared_error(x, target):
    return ((np.sin(x) * TOLD[:, None, None, None] / 500 - target) ** 2).mean((1, 2, 3))


def test_loss_of_flow_equals_the_formula_in_float64():
    losses, seen, x0, noise = drawn_losses(Flow(FlowConfig(), SHAPE))
    s = LEVELS.astype(np.float64)[:, None, None, None]
    x = (1 - s) * x0 + s * noise
    np.testing.assert_allclose(seen, x, atol=1e-6)
    np.testing.assert_allclose(losses, squared_error(x, noise - x0), rtol=2e-6)


def alpha_bars(schedule):
    """From the definitions: linear betas (Ho et al.), and a cosine alpha_bar with betas of at most 0.999 (Nichol and
    Dhariwal, eq. 17)."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_of_a_ddpm_equals_the_formula_in_float64(prediction, schedule):
    objective = DDPM(DDPMConfig(prediction=prediction, schedule=schedule))
    losses, seen, x0, noise = drawn_losses(objective)
    bar = alpha_bars(schedule)[TOLD][:, None, None, None]
    x = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * noise
    target = noise if prediction == "epsilon" else np.sqrt(bar) * noise - np.sqrt(1 - bar) * x0
    np.testing.assert_allclose(seen, x, atol=2e-4)  # diffusers' cumulative product is float32
    np.testing.assert_allclose(losses, squared_error(x, target), rtol=1e-3)
    scheduler = objective.scheduler()
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), alpha_bars(schedule), rtol=1e-3, atol=1e-9)
    assert scheduler.config.prediction_type == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    assert not scheduler.config.clip_sample


@pytest.mark.parametrize("objective", [Flow(FlowConfig(), SHAPE), DDPM(DDPMConfig())], ids=["flow", "ddpm"])
def test_loss_is_float32_whatever_the_latents_and_the_network_give(objective):
    latents, noise, levels = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), torch.rand(4)
    exact = objective.losses(lambda x, *_: x.bfloat16().float(), latents.half().float(), noise, levels, None)
    losses = objective.losses(lambda x, *_: x.bfloat16(), latents.half(), noise, levels, None)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, exact)


def test_shift_follows_the_dimension_of_the_latents():
    assert dimension_shift((128, 16, 16)) == pytest.approx(math.sqrt(8))
    assert dimension_shift((16, 16, 16)) == 1.0
    assert dimension_shift((4, 8, 8)) == 1.0
    objective = make_objective(FlowConfig(), (128, 16, 16))
    assert objective.scheduler().config.flow_shift == objective.shift == pytest.approx(math.sqrt(8))
    assert make_objective(FlowConfig(shift=1.0), (128, 16, 16)).scheduler().config.flow_shift == 1.0


NORMAL = torch.randn(200_000, generator=torch.Generator().manual_seed(0))


def test_training_noise_levels_are_logit_normal_and_shifted():
    sigma = Flow(FlowConfig(logit_mean=-0.4, logit_std=1.3, shift=2.5), SHAPE).levels(NORMAL).double()
    # The shift multiplies sigma / (1 - sigma) by s, so it moves the logit by log s.
    logits = torch.logit(sigma)
    assert logits.mean().item() == pytest.approx(-0.4 + math.log(2.5), abs=0.02)
    assert logits.std().item() == pytest.approx(1.3, abs=0.02)
    assert sigma.min() > 0
    assert sigma.max() < 1


@pytest.mark.parametrize(
    ("objective", "shift"),
    [(Flow(FlowConfig(noise_levels="uniform", shift=2.5), SHAPE), 2.5), (DDPM(DDPMConfig()), 1.0)],
    ids=["flow", "ddpm"],
)
def test_uniform_noise_levels_are_uniform_before_the_shift(objective, shift):
    level = objective.levels(NORMAL).double()
    uniform = level / (shift - (shift - 1) * level)
    counts = torch.histc(uniform, 10, 0, 1)
    assert (counts / len(NORMAL) - 0.1).abs().max() < 0.004  # six standard errors
    # Also draws far out, which float32 rounds to 1, are of the thousand timesteps.
    far = objective.levels(torch.tensor([-9.0, 9.0]))
    seen = []
    objective.losses(lambda x, t, y: (seen.append(t), x)[1], torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE), far, None)
    assert seen[0].tolist() == [0, 999]


def test_labels_are_dropped_with_the_given_probability_and_absent_ones_always():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(torch.full((100_000,), 3), uniform, 0.1, 7)
    assert set(dropped.tolist()) == {3, 7}
    assert (dropped == 7).double().mean().item() == pytest.approx(0.1, abs=0.005)
    assert drop_labels(torch.tensor([-1, 0]), torch.ones(2), 0.0, 7).tolist() == [7, 0]
