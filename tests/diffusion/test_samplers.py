import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)

from nsvq.diffusion.objectives import shift_sigma
from nsvq.diffusion.samplers import ddpm_scheduler, flow_scheduler, make_sampler, sample, set_steps, timestep

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
BETAS = {"linear": LINEAR, "cosine": COSINE}
TYPES = {"epsilon": "epsilon", "v": "v_prediction"}


@pytest.mark.parametrize("shift", [1.0, math.sqrt(8)])
def test_scheduler_uses_the_shift_of_training(shift):
    scheduler = flow_scheduler(shift)
    set_steps(scheduler, 20)
    uniform = torch.linspace(0, 0.999, 21, dtype=torch.float64).flip(0)  # the scheduler starts at 0.999, not at 1
    torch.testing.assert_close(scheduler.sigmas.double(), shift_sigma(uniform, shift), atol=1e-6, rtol=0)
    euler = flow_scheduler(shift, "euler")
    set_steps(euler, 20)
    uniform = torch.linspace(0, 1, 21, dtype=torch.float64).flip(0)
    torch.testing.assert_close(euler.sigmas.double(), shift_sigma(uniform, shift), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, math.sqrt(8)])
@pytest.mark.parametrize("steps", [7, 50, 250])
def test_network_is_told_the_times_in_training_that_the_scheduler_tells_it(shift, steps):
    scheduler = flow_scheduler(shift)
    set_steps(scheduler, steps)
    sigmas = scheduler.sigmas[:-1].double()
    clear = (1000 * sigmas - (1000 * sigmas).round()).abs() > 1e-3  # of integers, the rounding may go either way
    assert clear.sum() >= 0.9 * steps - 1
    assert torch.equal(timestep(sigmas)[clear], scheduler.timesteps[clear].double())


# The toy: data N(MEAN, DEVIATION^2) in every value, of which the best predictions and the flow are known.

MEAN, DEVIATION = 0.7, 2.0


class FlowToy:
    """x = (1 - sigma) x_0 + sigma noise."""

    def __init__(self, sampler, shift=1.0, believed=lambda sigma, time: sigma):
        self.scheduler, self.believed = flow_scheduler(shift, sampler), believed

    def signal_and_noise(self, call):
        """The factors of x_0 and of the noise when the network is called for the `call`-th time."""
        exact = isinstance(self.scheduler, DPMSolverMultistepScheduler)  # its timesteps are cut
        sigma = float(self.scheduler.sigmas[call] if exact else self.scheduler.timesteps[call] / 1000)
        return 1 - sigma, sigma

    def predict(self, x, signal, noise, time):
        sigma = self.believed(noise, time)
        x_0, epsilon = posterior(x, 1 - sigma, sigma)
        return epsilon - x_0


class DDPMToy:
    """x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""

    def __init__(self, sampler, prediction, schedule):
        self.prediction = prediction
        self.scheduler = ddpm_scheduler(TYPES[prediction], BETAS[schedule], sampler)
        # From the definitions, not from the scheduler: Ho et al. for the linear betas, Nichol and Dhariwal eq. 17.
        cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = {"linear": np.linspace(1e-4, 2e-2, 1000), "cosine": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)}
        self.alpha_bars = np.cumprod(1 - betas[schedule])

    def signal_and_noise(self, call):
        alpha_bar = self.alpha_bars[int(self.scheduler.timesteps[call])]
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def predict(self, x, signal, noise, time):
        x_0, epsilon = posterior(x, signal, noise)
        return epsilon if self.prediction == "epsilon" else signal * epsilon - noise * x_0


def posterior(x, signal, noise):
    """E[x_0 | x] and E[noise | x], which are jointly normal with x."""
    residual = (x - signal * MEAN) / (signal**2 * DEVIATION**2 + noise**2)
    return MEAN + signal * DEVIATION**2 * residual, noise * residual


def drawn(toy, steps, count=128, seed=0):
    """The noise that sampling starts from, and the samples, float64 [1, 1, count, 8]."""
    start = torch.randn(1, 1, count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    calls = []

    def predict(x, time, labels):
        calls.append(toy.signal_and_noise(len(calls)))
        return toy.predict(x, *calls[-1], float(time[0]))

    got = sample(
        predict,
        toy.scheduler,
        start,
        torch.zeros(1, dtype=torch.int64),
        1,
        steps=steps,
        generator=torch.Generator().manual_seed(seed + 1),
    )
    return start, got, calls


def error(toy, steps):
    """Largest error of samples against the exact solution, along which (x - mean) / deviation does not change."""
    start, got, calls = drawn(toy, steps)
    signal, noise = calls[0]
    z = (start - signal * MEAN) / math.sqrt(signal**2 * DEVIATION**2 + noise**2)
    return (got - (MEAN + DEVIATION * z)).abs().max().item()


def order(make_toy, counts):
    """p of error = c log(N)^q / N^p over the numbers of steps N.

    q = 1 for DPM-Solver++(2M), whose steps in the log of sigma do not shrink near sigma = 0: with equal steps 1 / N of
    sigma, the local error of the k-th from the end is of order k^-3 (k / N)^2, which adds up to log(N) / N^2.
    """
    logs = isinstance(make_toy().scheduler, DPMSolverMultistepScheduler)
    errors = [error(make_toy(), steps) / math.log(steps) ** logs for steps in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("sampler", "expected"), [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_samplers_of_flow_converge_to_the_exact_solution_at_their_order(sampler, expected, shift):
    assert order(lambda: FlowToy(sampler, shift), (40, 80, 160)) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("sampler", "expected", "counts"), [("ddim", 1, (50, 100, 200, 500)), ("dpm++", 2, (40, 80, 160))]
)
def test_samplers_of_ddpms_converge_to_the_exact_solution_at_their_order(
    sampler, expected, counts, prediction, schedule
):
    assert order(lambda: DDPMToy(sampler, prediction, schedule), counts) == pytest.approx(expected, abs=0.15)


COUNT = 2**14  # times 8 values


def moments(toy, steps):
    """(mean, variance, correlation with the noise of the start), and the standard errors of the first two."""
    start, got, _ = drawn(toy, steps, COUNT)
    correlation = np.corrcoef(start.flatten(), got.flatten())[0, 1]
    number = got.numel()
    errors = DEVIATION / math.sqrt(number), DEVIATION**2 * math.sqrt(2 / number)
    return got.mean().item(), got.var().item(), correlation, errors


@pytest.mark.parametrize(
    "make_toy",
    [
        lambda: FlowToy("sde"),
        lambda: FlowToy("sde", 2.0),
        lambda: DDPMToy("sde", "epsilon", "linear"),
        lambda: DDPMToy("sde", "v", "cosine"),
    ],
    ids=["flow", "shifted flow", "epsilon", "v"],
)
def test_the_sde_sampler_draws_from_the_data_distribution(make_toy):
    mean, variance, correlation, errors = moments(make_toy(), 160)
    assert abs(mean - MEAN) < 4 * errors[0]
    assert abs(variance - DEVIATION**2) < 4 * errors[1]
    assert abs(correlation) < 0.02


def ancestral_moments(toy, steps):
    """Mean and variance that the chain of Ho et al., eq. 6 and 7, leads to, in float64."""
    set_steps(toy.scheduler, steps)
    mean, variance = 0.0, 1.0
    times = toy.scheduler.timesteps.tolist()
    for t, before in zip(times, [*times[1:], None], strict=True):
        bar, bar_before = toy.alpha_bars[t], 1.0 if before is None else toy.alpha_bars[before]
        alpha = bar / bar_before
        gain = math.sqrt(bar) * DEVIATION**2 / (bar * DEVIATION**2 + 1 - bar)
        of_x_0 = math.sqrt(bar_before) * (1 - alpha) / (1 - bar)
        of_x = math.sqrt(alpha) * (1 - bar_before) / (1 - bar)
        x_0 = MEAN + gain * (mean - math.sqrt(bar) * MEAN)
        mean = of_x_0 * x_0 + of_x * mean
        variance = (of_x_0 * gain + of_x) ** 2 * variance + (1 - alpha) * (1 - bar_before) / (1 - bar)
    return mean, variance


@pytest.mark.parametrize(("prediction", "schedule"), [("epsilon", "linear"), ("v", "cosine"), ("epsilon", "cosine")])
def test_ancestral_sampling_is_the_chain_of_ho_et_al_and_approaches_the_data_distribution(prediction, schedule):
    toy = DDPMToy("ddpm", prediction, schedule)
    mean, variance, correlation, errors = moments(toy, 50)
    expected = ancestral_moments(toy, 50)
    assert abs(mean - expected[0]) < 4 * errors[0]
    assert abs(variance - expected[1]) < 4 * errors[1]
    assert abs(correlation) < 0.1
    biases = [abs(ancestral_moments(toy, steps)[1] - DEVIATION**2) for steps in (50, 100, 200, 500)]
    assert -np.polyfit(np.log([50, 100, 200, 500]), np.log(biases), 1)[0] == pytest.approx(1, abs=0.25)


def test_times_cut_to_integers_cost_nothing_to_a_network_that_was_trained_on_them():
    exact = error(FlowToy("dpm++"), 320)
    trained_on_cut = error(FlowToy("dpm++", believed=lambda _, time: (time + 0.5) / 1000), 320)  # the mean of training
    trained_on_exact = error(FlowToy("dpm++", believed=lambda _, time: time / 1000), 320)
    assert trained_on_cut < 1.25 * exact
    assert trained_on_exact > 5 * exact


# Guidance

SCHEDULERS = {
    **{sampler: flow_scheduler(1.0, sampler) for sampler in ("euler", "heun", "dpm++", "sde")},
    **{f"ddpm {sampler}": ddpm_scheduler("epsilon", LINEAR, sampler) for sampler in ("ddim", "dpm++", "sde", "ddpm")},
    "v": ddpm_scheduler("v_prediction", COSINE, "ddim"),
}


class Recorder:
    """A network that notes what is evaluated: its value is 1 + label, in every channel differently."""

    def __init__(self, factor=1.0):
        self.calls, self.factor = [], factor

    def __call__(self, x, time, labels):
        self.calls.append((int(time[0]), labels.tolist()))
        channels = torch.arange(1, x.shape[1] + 1).view(1, -1, 1, 1)
        return self.factor * (1.0 + labels.view(-1, 1, 1, 1)) * channels * torch.ones_like(x)


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler]
)
def test_schedulers_of_k_diffusion_sample_what_a_perfect_network_predicts(kind):
    scheduler = kind(1000, **LINEAR, prediction_type="epsilon", timestep_spacing="trailing")
    kept = scheduler.alphas_cumprod

    def predict(latents, time, labels):
        signal = kept[time.long()].view(-1, 1, 1, 1)
        return (latents - signal.sqrt() * MEAN) / (1 - signal).sqrt()

    labels = torch.zeros(2, dtype=torch.int64)
    found = sample(predict, scheduler, torch.randn(2, 1, 8, 8), labels, 9, steps=50)
    torch.testing.assert_close(found, torch.full_like(found, MEAN), atol=0.02, rtol=0)


def test_guidance_acts_on_all_channels():
    noise, scheduler = torch.randn(2, 5, 2, 2), flow_scheduler(1.0)
    got = sample(Recorder(), scheduler, noise, torch.tensor([0, 2]), 9, steps=1, guidance_scale=3.0)
    v_class, v_null = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), 10.0
    v = (v_null + 3.0 * (v_class - v_null)) * torch.arange(1, 6).view(1, 5, 1, 1)
    # The only step goes from sigma = 0.999 to 0.
    torch.testing.assert_close(got, noise - 0.999 * v)


def test_autoguidance_starts_from_the_guide_at_the_same_classes():
    noise, scheduler, main, guide = torch.randn(2, 5, 2, 2), flow_scheduler(1.0), Recorder(), Recorder(0.3)
    how = {"steps": 1, "guidance_scale": 3.0, "guide": guide}
    got = sample(main, scheduler, noise, torch.tensor([0, 2]), 9, **how)
    v = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) * torch.arange(1, 6).view(1, 5, 1, 1)
    torch.testing.assert_close(got, noise - 0.999 * (0.3 * v + 3.0 * (v - 0.3 * v)))
    assert main.calls == guide.calls == [(999, [0, 2])]


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_network_is_told_the_scheduler_s_timesteps_cut_to_0_to_999(scheduler):
    recorder = Recorder()
    steps = 1000 if hasattr(scheduler, "alphas_cumprod") else 300
    sample(recorder, scheduler, torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), 1, steps=steps)
    expected = [min(math.floor(t), 999) for t in scheduler.timesteps.tolist()]
    assert [time for time, _ in recorder.calls] == expected
    assert len(expected) == len(scheduler.timesteps) >= steps


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional_one(scheduler):
    labels, noise = torch.tensor([0, 2]), torch.randn(2, 3, 2, 2)

    def network(x, time, y):
        return torch.sin(x + y.view(-1, 1, 1, 1)) * (1 + time.view(-1, 1, 1, 1) / 1000)

    def draw(predict, of, scale, guide=None):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        how = {"guidance_scale": scale, "guide": guide, "generator": generators}
        return sample(predict, scheduler, noise, of, 9, steps=8, **how)

    conditional = draw(network, labels, 1.0)
    unconditional = draw(network, torch.tensor([9, 9]), 1.0)
    assert (conditional - unconditional).abs().max() > 0.05
    assert torch.equal(draw(network, labels, 0.0), unconditional)
    for scale in (1 - 1e-5, 1 + 1e-5):  # both are evaluated, and the weight goes to one of them
        torch.testing.assert_close(draw(network, labels, scale), conditional, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(draw(network, labels, 1e-5), unconditional, rtol=1e-2, atol=1e-2)
    weak = Recorder()
    assert torch.equal(draw(network, labels, 1.0, guide=weak), conditional)
    assert not weak.calls
    assert torch.equal(draw(weak, labels, 0.0, guide=network), conditional)
    for scale, evaluated in [(1.0, [0, 2]), (0.0, [9, 9]), (0.5, [0, 2, 9, 9])]:
        recorder = Recorder()
        draw(recorder, labels, scale)
        assert [call[1] for call in recorder.calls] == [evaluated] * len(scheduler.timesteps)


def test_outside_the_guidance_interval_only_the_class_is_evaluated():
    velocity = Recorder()
    labels = torch.tensor([0, 2])
    sample(
        velocity,
        flow_scheduler(1.0),
        torch.randn(2, 3, 2, 2),
        labels,
        9,
        steps=20,
        guidance_scale=2.0,
        guidance_interval=(0.3, 0.8),
    )
    guided = [time for time, evaluated in velocity.calls if evaluated == [0, 2, 9, 9]]
    unguided = [time for time, evaluated in velocity.calls if evaluated == [0, 2]]
    assert len(guided) + len(unguided) == 20
    assert all(300 <= time <= 800 for time in guided)
    assert not any(300 <= time <= 800 for time in unguided)
    assert len(guided) == 10
    guide = Recorder()
    sample(
        Recorder(),
        flow_scheduler(1.0),
        torch.randn(2, 3, 2, 2),
        labels,
        9,
        steps=20,
        guidance_scale=2.0,
        guidance_interval=(0.3, 0.8),
        guide=guide,
    )
    assert [time for time, _ in guide.calls] == guided


def test_what_depends_on_time_and_class_alone_is_computed_once_for_each_class():
    asked = []

    class Network:
        def condition(self, time, labels):
            asked.append(labels.tolist())
            return torch.sin(labels + time / 100)[:, None]

        def __call__(self, x, time, labels, condition=None):
            condition = self.condition(time, labels) if condition is None else condition
            return x * condition[:, :, None, None]

    network, noise, labels = Network(), torch.randn(4, 3, 2, 2), torch.tensor([2, 0, 2, 0])
    how = {"steps": 3, "guidance_scale": 2.0}
    got = sample(network, flow_scheduler(1.0), noise, labels, 9, **how)
    assert asked == [[0, 2, 9]] * 3
    plain = sample(lambda x, time, y: network(x, time, y), flow_scheduler(1.0), noise, labels, 9, **how)
    assert asked[3:] == [[2, 0, 2, 0, 9, 9, 9, 9]] * 3
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("scheduler", [SCHEDULERS["sde"], SCHEDULERS["ddpm ddpm"]], ids=["sde", "ddpm"])
def test_stochastic_samplers_draw_for_each_image_from_its_own_generator(scheduler):
    noise, labels = torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)

    def draw(part):
        generators = [torch.Generator().manual_seed(i) for i in range(4)][part]
        return sample(lambda x, *_: 0.3 * x, scheduler, noise[part], labels[part], 1, steps=5, generator=generators)

    whole = draw(slice(0, 4))
    torch.testing.assert_close(torch.cat([draw(slice(i, i + 1)) for i in range(4)]), whole)
    alike = sample(
        lambda x, *_: 0.3 * x,
        scheduler,
        noise[:1].repeat(2, 1, 1, 1),
        labels[:2],
        1,
        steps=5,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    )
    assert (alike[0] - alike[1]).abs().max() > 0.1


# Samplers by name


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "sde"])
def test_a_sampler_of_flow_keeps_the_shift_of_the_folder_s_scheduler(sampler):
    for folder in (flow_scheduler(2.5), flow_scheduler(2.5, "sde"), flow_scheduler(2.5, "heun")):
        made, expected = make_sampler(sampler, folder), flow_scheduler(2.5, sampler)
        assert type(made) is type(expected)
        assert made.config == expected.config


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "sde", "ddpm"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "betas",
    [LINEAR, COSINE, {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 1e-2}],
    ids=["linear", "cosine", "other"],
)
def test_a_sampler_of_a_ddpm_keeps_what_was_trained(sampler, prediction_type, betas):
    folder = DDIMScheduler(**betas, prediction_type=prediction_type, clip_sample=True)
    made = make_sampler(sampler, folder)
    assert torch.equal(made.alphas_cumprod, folder.alphas_cumprod)
    assert made.config.prediction_type == prediction_type
    assert not made.config.get("clip_sample", False)
    set_steps(made, 50)
    # From noise that leaves little of the image, though not too little to tell x_0 from epsilon, to no noise at all.
    left = made.alphas_cumprod[int(made.timesteps[0])].sqrt()
    assert left < 0.1
    assert left > 0.003 or prediction_type == "v_prediction"
    if sampler in ("ddim", "ddpm"):
        last = made.step(torch.zeros(1, 1), made.timesteps[-1], torch.ones(1, 1))
        torch.testing.assert_close(last.prev_sample, last.pred_original_sample)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "message"),
    [
        ("ddim", flow_scheduler(1.0), "'ddim' is no sampler of rectified flow: take one of euler, heun, dpm"),
        ("euler", ddpm_scheduler("epsilon", LINEAR), "'euler' is no sampler of a DDPM: take one of dpm"),
        ("Euler", flow_scheduler(1.0), "'Euler' is no sampler"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(sampler, scheduler, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(sampler, scheduler)


def test_steps_with_which_ddim_would_leave_out_noise_are_refused():
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(ValueError, match="must divide 1000, which 30 does not: take 25 or 40"):
            set_steps(ddpm_scheduler("epsilon", LINEAR, sampler), 30)
