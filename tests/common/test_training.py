"""A trainer of a few lines through the training loop that the real ones share."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from pydantic import Field

from nsvq.common import checkpoints
from nsvq.common.config import Config
from nsvq.common.optimized import Optimized
from nsvq.common.run import RunConfig, make_accelerator
from nsvq.common.trainer import Trainer
from nsvq.common.training import train
from nsvq.errors import Stopped, UserError

STEPS, BATCH = 12, 6


class ToyConfig(Config):
    out: Path
    rate: float = 0.1
    ema_decay: float = 0.5
    run: RunConfig = Field(default_factory=RunConfig)


class Toy(Trainer):
    """Fits y = 3 x - 1. Its batches and its noise depend on the position alone."""

    total_steps = STEPS
    kill_at: int | None = None  # a position at whose sample the process is killed
    fits: int | None = None  # samples in the largest micro-batch that memory holds

    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        model = torch.nn.Linear(1, 1)
        self.model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), config.rate))
        weights = list(model.parameters())
        ema = {"decay": config.ema_decay}
        self.register("toy", {"model": self.model}, {"model": Optimized(optimizer, weights)}, weights, ema)
        self.events = []

    def batches(self, start):
        for m in count():
            positions = np.arange(start + m * self.micro_batch, start + (m + 1) * self.micro_batch)
            if self.kill_at in positions:
                os.kill(os.getpid(), signal.SIGKILL)
            x = torch.from_numpy(np.stack([np.random.default_rng([7, p]).random(1, np.float32) for p in positions]))
            yield {"x": x, "id": [str(p) for p in positions]}

    def rate_factor(self):
        return 1 - self.run.step / STEPS

    def step(self, batch):
        x = batch["x"] + 0.01 * torch.randn_like(batch["x"])
        loss = (self.model(x) - (3 * batch["x"] - 1)).square().mean()
        self.accelerator.backward(loss)
        if self.fits is not None and len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"loss": loss.detach(), "largest": (batch["x"].max(), 1)}

    def tries_micro_batches(self):
        return self.fits is not None

    def draw(self):
        self.events.append(("draw", self.run.step))

    def keep(self):
        self.events.append(("keep", self.run.step))

    def export(self):
        self.events.append(("export", self.run.step))
        with self.averaged_weights():
            average = [p.tolist() for p in self.averaged]
        (self.config.out / "result.json").write_text(json.dumps([[p.tolist() for p in self.averaged], average]))


def make(out, rate=0.1, ema_decay=0.5, **run):
    for state in (AcceleratorState, PartialState):
        state._reset_state(**({"reset_partial_state": True} if state is AcceleratorState else {}))
    GradientState._reset_state()
    torch.set_num_threads(1)
    settings = {
        "batch_size": BATCH,
        "mixed_precision": "no",
        "trackers": [],
        "log_every": 4,
        "sample_every": 5,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
    } | run
    config = ToyConfig(out=out, rate=rate, ema_decay=ema_decay, run=RunConfig(**settings))
    return Toy(config, make_accelerator(config.run, config.out))


def train_until(out, position=None):
    Toy.kill_at = position
    train(make(out))


def in_a_process(function, *arguments):
    """Its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def metrics(out):
    keep = ("step", "samples_seen", "loss", "largest", "grad_norm", "skipped_steps")
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in keep} for row in rows]


def test_a_trainer_that_is_killed_anywhere_ends_as_one_that_was_not(tmp_path):
    train(make(tmp_path / "whole"))
    for position in (0, 15, 33, 34, 70):
        assert in_a_process(train_until, tmp_path / "parts", position) == -signal.SIGKILL
    train(make(tmp_path / "parts"))
    whole, parts = ((tmp_path / name / "result.json").read_text() for name in ("whole", "parts"))
    assert whole == parts
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_run_begins_from_another_ones_checkpoint_with_rates_and_averages_of_its_own(tmp_path, capsys):
    train(make(tmp_path / "first"))
    middle = tmp_path / "first" / "checkpoints" / "step-6"
    train(make(tmp_path / "same", resume_from=middle))
    assert (tmp_path / "same" / "result.json").read_text() == (tmp_path / "first" / "result.json").read_text()
    assert metrics(tmp_path / "same") == metrics(tmp_path / "first")[1:]

    still = make(tmp_path / "still", rate=0.0, ema_decay=0.75, resume_from=middle)
    capsys.readouterr()
    train(still)
    assert "rate: 0.1 -> 0.0; ema_decay: 0.5 -> 0.75" in capsys.readouterr().out
    weights, state = checkpoints.read(middle)
    live, average = json.loads((tmp_path / "still" / "result.json").read_text())
    assert live == [weights["model"][name].tolist() for name in ("weight", "bias")]
    left = math.prod(min(0.75, (1 + step) / (10 + step)) for step in range(6, STEPS))  # EMAModel's rise
    for now, before, at in zip(average, state["ema"]["shadow_params"], map(torch.tensor, live), strict=True):
        torch.testing.assert_close(torch.tensor(now), at + left * (before - at))

    with_its_own = make(tmp_path / "still", ema_decay=0.75, rate=0.0)  # which need not say it again
    assert with_its_own.run.load()["ema"] is not None
    assert with_its_own.run.step == STEPS


def test_the_events_of_a_step_come_in_their_order_and_at_their_intervals(tmp_path):
    trainer = make(tmp_path)
    train(trainer)
    drawn = [step for what, step in trainer.events if what == "draw"]
    assert drawn == [5, 10, 12]
    assert trainer.events[-3:] == [("draw", 12), ("keep", 12), ("export", 12)]
    assert [row["step"] for row in metrics(tmp_path)] == [4, 8, 12]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        f"step-{n}" for n in range(2, STEPS + 1, 2)
    )


def test_means_are_over_the_samples_of_the_interval_and_rates_follow_the_factor(tmp_path):
    trainer = make(tmp_path, log_every=1, accumulation=2)
    train(trainer)
    x = [np.random.default_rng([7, p]).random(1, np.float32) for p in range(STEPS * BATCH)]
    largest = np.reshape(x, (STEPS, 2, BATCH // 2)).max(2).mean(1)
    assert [row["largest"] for row in metrics(tmp_path)] == pytest.approx(largest, rel=1e-6)
    (group,) = trainer.optimized["model"].optimizer.param_groups
    assert group["lr"] == pytest.approx(0.1 / STEPS)


def test_a_stopped_run_leaves_its_folder_to_the_next(tmp_path):
    first = make(tmp_path)
    first.measure = lambda due, last: os.kill(os.getpid(), signal.SIGTERM) or {}
    with pytest.raises(Stopped):
        train(first)
    assert in_a_process(train_until, tmp_path) == 0
    assert metrics(tmp_path)[-1]["step"] == STEPS


def test_the_average_follows_the_weights_of_each_step(tmp_path):
    trainer, seen = make(tmp_path), []
    trainer.keep = lambda: seen.append([p.detach().clone() for p in trainer.averaged])
    before = [p.detach().clone() for p in trainer.averaged]
    train(trainer)
    for n, now in enumerate(seen):
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0  # diffusers' warmup
        before = [decay * a + (1 - decay) * b for a, b in zip(before, now, strict=True)]
    for average, expected in zip(trainer.ema.shadow_params, before, strict=True):
        torch.testing.assert_close(average, expected)


def test_auto_takes_the_fewest_micro_batches_that_fit_with_the_bits_of_the_explicit_number(
    tmp_path, monkeypatch, capsys
):
    train(make(tmp_path / "explicit", accumulation=3))
    monkeypatch.setattr(Toy, "fits", 2)
    train(make(tmp_path / "auto"))
    assert "run.accumulation auto: 3, micro-batches of 2 images" in capsys.readouterr().out
    explicit, auto = ((tmp_path / name / "result.json").read_text() for name in ("explicit", "auto"))
    assert explicit == auto
    assert metrics(tmp_path / "explicit") == metrics(tmp_path / "auto")


def test_a_resumed_run_keeps_the_micro_batches_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "fits", 3)
    train(make(tmp_path))
    monkeypatch.setattr(Toy, "fits", 6)
    again = make(tmp_path)
    train(again)
    assert (again.accumulation, again.micro_batch) == (2, 3)
    other = make(tmp_path / "other")  # another folder is another run
    train(other)
    assert (other.accumulation, other.micro_batch) == (1, 6)


def test_flops_are_counted_of_networks_that_are_not_compiled(tmp_path):
    counted = []

    def counting(run, kind, images):
        counted.append(run.out.name)
        return contextlib.nullcontext()

    for name in ("eager", "compiled"):
        toy = make(tmp_path / name)
        toy.run.counting_flops = partial(counting, toy.run)
        if name == "compiled":
            toy.model.compile(backend="eager")
        train(toy)
    assert set(counted) == {"eager"}


def test_auto_on_a_cpu_is_one_micro_batch_without_a_try(tmp_path):
    trainer = make(tmp_path)
    trainer.heaviest = None
    train(trainer)
    assert (trainer.accumulation, trainer.accelerator.gradient_accumulation_steps) == (1, 1)


@pytest.mark.parametrize(
    ("accumulation", "fits", "says"),
    [
        (1, 3, "6 images do not fit .* --run.accumulation 2"),
        (2, 1, "3 images do not fit .* --run.accumulation 3"),
        (6, 0, "one image does not fit"),
        ("auto", 0, "one image"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_what_to_set(tmp_path, monkeypatch, accumulation, fits, says):
    monkeypatch.setattr(Toy, "fits", fits)
    with pytest.raises(UserError, match=says):
        train(make(tmp_path, accumulation=accumulation))


def test_memory_that_runs_out_beside_a_step_is_not_answered_with_micro_batches(tmp_path, monkeypatch):
    def draw(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Toy, "draw", draw)
    with pytest.raises(torch.OutOfMemoryError):
        train(make(tmp_path))


@pytest.mark.parametrize(
    "said",
    [
        "FIND was unable to find an engine to execute this computation",  # of cuDNN, for a convolution's workspace
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_libraries_that_run_out_of_memory_are_understood(tmp_path, monkeypatch, capsys, said):
    step, in_tries = Toy.step, []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def large(self, batch):
        if len(batch["x"]) > 2:
            in_tries.append(torch.backends.cudnn.benchmark)
            raise RuntimeError(said)
        return step(self, batch)

    monkeypatch.setattr(Toy, "step", large)
    with pytest.raises(UserError, match=r"6 images do not fit .* --run.accumulation 2") as error:
        train(make(tmp_path / "explicit", accumulation=1))
    assert said.splitlines()[0] in str(error.value)
    in_tries.clear()
    monkeypatch.setattr(Toy, "fits", 6)  # on a GPU, which has to be asked
    trainer = make(tmp_path / "auto")
    train(trainer)
    assert trainer.accumulation == 3
    assert (in_tries, torch.backends.cudnn.benchmark) == ([False, False], True)  # cuDNN chooses with all memory free
    assert said.splitlines()[0] in capsys.readouterr().err


def test_another_error_of_a_try_is_told_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "fits", 9)
    monkeypatch.setattr(Toy, "step", lambda self, batch: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(make(tmp_path))
