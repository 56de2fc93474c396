import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pydantic import Field

from common.config import Config
from common.errors import UsageError
from common.run import Run, RunConfig, micro_batch_size


class Settings(Config):
    rate: float = 0.1
    run: RunConfig = Field(default_factory=lambda: RunConfig(trackers=[], keep_checkpoints=2))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make(accelerator, out, **values):
    accelerator._models, accelerator._optimizers = [], []
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    return Run(accelerator, Settings(**values), out, "test"), model


def advance(run, model, value):
    run.step, run.samples_seen = value, 8 * value
    with torch.no_grad():
        model.weight.fill_(value)


def test_a_checkpoint_brings_back_step_samples_weights_and_state(accelerator, tmp_path):
    run, model = make(accelerator, tmp_path)
    assert run.load() is None
    advance(run, model, 5)
    run.save({"counts": torch.arange(3), "phase": "stage1"})
    again, other = make(accelerator, tmp_path)
    state = again.load()
    assert (again.step, again.samples_seen, state["phase"]) == (5, 40, "stage1")
    assert state["counts"].tolist() == [0, 1, 2]
    assert (other.weight == 5).all()


def test_the_newest_complete_checkpoint_is_taken_and_old_ones_go(accelerator, tmp_path):
    run, model = make(accelerator, tmp_path)
    for step in (9, 10, 100):
        advance(run, model, step)
        run.save({})
    assert [path.name for path in run.checkpoints()] == ["step-10", "step-100"]
    (tmp_path / "checkpoints" / ".step-200.part").mkdir()  # what a kill in the middle of writing leaves
    again, other = make(accelerator, tmp_path)
    again.load()
    assert again.step == 100
    assert (other.weight == 100).all()


@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (Path, "mkdir")])
def test_a_failed_write_keeps_the_run_and_its_last_checkpoint(accelerator, tmp_path, monkeypatch, capsys, owner, name):
    run, model = make(accelerator, tmp_path)
    advance(run, model, 1)
    run.save({})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    advance(run, model, 2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        run.save({"counts": torch.zeros(3)})
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    run.save({})
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2"]


def test_metrics_after_the_checkpoint_are_dropped_on_resuming(accelerator, tmp_path):
    run, model = make(accelerator, tmp_path)
    for step in (1, 2, 3):
        advance(run, model, step)
        run.log({"loss": step / 2}, phase="stage1")
        if step == 2:
            run.save({})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a line torn by a kill
    again, _ = make(accelerator, tmp_path)
    again.load()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["samples_seen"], row["loss"]) for row in rows] == [(1, 8, 0.5), (2, 16, 1.0)]


def test_another_config_is_refused_unless_it_changes_no_number(accelerator, tmp_path):
    make(accelerator, tmp_path)
    make(accelerator, tmp_path, run=RunConfig(trackers=[], workers=9, log_every=3))
    with pytest.raises(UsageError, match=r"rate: 0\.1 -> 0\.2"):
        make(accelerator, tmp_path, rate=0.2)
    with pytest.raises(UsageError, match=r"run\.seed: 0 -> 1"):
        make(accelerator, tmp_path, run=RunConfig(trackers=[], seed=1))


def test_a_global_batch_that_does_not_divide_is_refused(accelerator):
    assert micro_batch_size(RunConfig(batch_size=12, accumulation=3), accelerator) == 4
    with pytest.raises(UsageError, match=r"run\.batch_size = 10"):
        micro_batch_size(RunConfig(batch_size=10, accumulation=3), accelerator)
