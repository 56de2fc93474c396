import os
import signal

import pytest
import torch
from accelerate import Accelerator

from nsvq.common.guard import Guard


@pytest.fixture
def training():
    accelerator = Accelerator(cpu=True)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    prepared = [accelerator.prepare(torch.optim.Adam(m.parameters(), 0.1)) for m in (model, other)]
    return Guard(accelerator), (model, other), prepared


def backward(models):
    for model in models:
        model(torch.ones(4, 3)).sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments_and_is_counted(training, bad):
    guard, models, optimizers = training
    backward(models)
    assert guard.step(optimizers, [torch.tensor(1.0)])
    before = [parameter.clone() for model in models for parameter in model.parameters()]
    moments = [state["exp_avg"].clone() for o in optimizers for state in o.optimizer.state.values()]
    for count in (1, 2):
        backward(models)
        assert not guard.step(optimizers, [torch.tensor(1.0), torch.tensor(bad)])
        assert (guard.skipped, guard.in_a_row) == (count, count)
    after = [parameter for model in models for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    now = [state["exp_avg"] for o in optimizers for state in o.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    backward(models)
    assert guard.step(optimizers, [torch.tensor(1.0)])
    assert (guard.skipped, guard.in_a_row) == (2, 0)
    assert not torch.equal(before[0], after[0])
    fresh = Guard(guard.accelerator)
    fresh.load_state_dict(guard.state_dict())
    assert fresh.skipped == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_step_that_it_comes_in(training, number):
    guard, models, optimizers = training
    before = signal.getsignal(number)
    steps = 0
    for _ in guard.until(lambda: guard.stop is not None):
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), number)
        backward(models)
        guard.step(optimizers, [torch.tensor(1.0)])
    assert steps == 2
    assert guard.stop == number
    assert signal.getsignal(number) == before


def test_a_signal_after_the_last_step_is_not_lost(training):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    guard = training[0]
    done = iter([False, True])

    def last():
        if next(done):
            os.kill(os.getpid(), signal.SIGINT)
            return True
        return False

    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in guard.until(last):
                pass
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_known_at_once(training):
    guard, models, optimizers = training
    for _ in guard.until(lambda: guard.stop is not None):
        assert not guard.interrupted()
        assert not guard.interrupted_anywhere()
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.interrupted()
        assert guard.interrupted_anywhere()
        backward(models)
        guard.step(optimizers, [torch.tensor(1.0)])
