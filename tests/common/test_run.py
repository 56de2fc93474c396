import errno
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from instrumented import Sharding
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsvq.common import checkpoints, metrics
from nsvq.common.config import Config
from nsvq.common.run import Run, RunConfig, code_version, make_accelerator, micro_batch_size
from nsvq.errors import UsageError


class Settings(Config):
    rate: float = 0.1
    source: str = "here"
    run: RunConfig = Field(default_factory=lambda: RunConfig(trackers=[], keep_checkpoints=2))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make(accelerator, out, **values):
    accelerator._models, accelerator._optimizers = [], []
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    return Run(accelerator, Settings(**values), out, "test", {"net": model}, {}), model


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


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_newest_complete_checkpoint_is_taken_and_old_ones_go(accelerator, tmp_path):
    run, model = make(accelerator, tmp_path)
    for step in (9, 10, 100):
        advance(run, model, step)
        run.save({})
    assert saved(tmp_path) == ["step-10", "step-100"]
    (tmp_path / "checkpoints" / ".step-200.part").mkdir()  # what a kill in the middle of writing leaves
    again, other = make(accelerator, tmp_path)
    again.load()
    assert again.step == 100
    assert (other.weight == 100).all()
    assert saved(tmp_path) == ["step-10", "step-100"]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_taken(accelerator, tmp_path, capsys):
    run, model = make(accelerator, tmp_path)
    for step in (1, 2):
        advance(run, model, step)
        run.save({})
    path = tmp_path / "checkpoints" / "step-2" / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again, other = make(accelerator, tmp_path)
    again.load()
    assert again.step == 1
    assert (other.weight == 1).all()
    assert "warning: step-2 is damaged: net.safetensors" in capsys.readouterr().err


def test_a_checkpoint_of_another_config_is_refused(accelerator, tmp_path):
    for out, rate in (("mine", 0.1), ("other", 0.2)):
        run, model = make(accelerator, tmp_path / out, rate=rate)
        advance(run, model, 3)
        run.save({})
    shutil.rmtree(tmp_path / "mine" / "checkpoints" / "step-3")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-3", tmp_path / "mine" / "checkpoints" / "step-3")
    again, _ = make(accelerator, tmp_path / "mine")
    with pytest.raises(UsageError, match=r"step-3 is a checkpoint of another config \(rate: 0\.2 -> 0\.1\)"):
        again.load()


def test_what_a_run_cannot_begin_from_is_told(accelerator, tmp_path):
    run, _ = make(accelerator, tmp_path / "first")
    run.save({})
    run.close()
    folder = tmp_path / "first" / "checkpoints" / "step-0"

    def begin(at, network=torch.nn.Linear(4, 2)):  # noqa: B008
        settings = Settings(run=RunConfig(trackers=[], resume_from=at))
        begun = Run(accelerator, settings, tmp_path / "second", "test", {"net": network}, {})
        try:
            begun.load()
        finally:
            begun.close()

    with pytest.raises(UsageError, match=r"step-0 is a checkpoint of other networks .*size mismatch for weight"):
        begin(folder)
    with pytest.raises(UsageError, match=r"run.resume_from = .*nowhere is no whole checkpoint: manifest.json is not"):
        begin(tmp_path / "nowhere")
    (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"state\.pt is not the file that was written"):
        begin(folder)


@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (checkpoints, "save_file"), (Path, "mkdir")])
def test_a_failed_write_keeps_the_run_and_is_tried_again(accelerator, tmp_path, monkeypatch, capsys, owner, name):
    run, model = make(accelerator, tmp_path, run=RunConfig(trackers=[], checkpoint_every=100))
    advance(run, model, 100)
    run.save({})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    advance(run, model, 200)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        run.save({"counts": torch.zeros(3)})
    assert "no checkpoint at step 200 ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert saved(tmp_path) == ["step-100"]
    due = []
    for step in range(201, 301):
        advance(run, model, step)
        if run.checkpoint_due():
            due.append(step)
            run.save({})
    assert due == [210, 300]
    assert saved(tmp_path) == ["step-210", "step-300"]


def test_metrics_that_cannot_be_written_come_with_the_next_line(accelerator, tmp_path, monkeypatch, capsys):
    run, model = make(accelerator, tmp_path)
    room = [10]

    class Full(io.FileIO):
        """A file on a disk with room for some bytes."""

        def write(self, data):
            count = min(room[0], len(data))
            if not count:
                raise OSError(28, "No space left on device")
            room[0] -= count
            return super().write(data[:count])

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", lambda path, mode, buffering: Full(path, "a"), raising=False)
        for step in (1, 2):
            advance(run, model, step)
            run.log({"loss": step / 2})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert capsys.readouterr().err.count("cannot write metrics.jsonl") == 2
    advance(run, model, 3)
    run.log({"loss": 1.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 1.0, 1.5]


def test_metrics_after_the_checkpoint_are_dropped_on_resuming(accelerator, tmp_path):
    run, model = make(accelerator, tmp_path)
    for step in (1, 2, 3):
        advance(run, model, step)
        run.log({"loss": step / 2, "phase": "stage1"})
        if step == 2:
            run.save({})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a line torn by a kill
    again, _ = make(accelerator, tmp_path)
    again.load()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["samples_seen"], row["loss"]) for row in rows] == [(1, 8, 0.5), (2, 16, 1.0)]


def test_metrics_of_a_start_that_left_no_checkpoint_are_dropped(accelerator, tmp_path):
    for step in (1, 2):
        run, model = make(accelerator, tmp_path)
        assert run.load() is None
        advance(run, model, step)
        run.log({"loss": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2]


@pytest.mark.slow
def test_a_folder_that_another_process_trains_in_is_refused_until_that_is_killed(accelerator, tmp_path):
    program = (
        "import sys, time; from test_run import *; held = make(Accelerator(cpu=True), Path(sys.argv[1])); "
        "print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    try:
        assert "held" in other.stdout.readline()
        with pytest.raises(UsageError, match=f"another process trains in {tmp_path}"):
            make(accelerator, tmp_path)
    finally:
        other.kill()
        other.wait()
    make(accelerator, tmp_path)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(accelerator, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run, _ = make(accelerator, tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    run.save({})
    assert saved(tmp_path) == ["step-0"]


def test_another_config_is_refused_unless_it_changes_no_number(accelerator, tmp_path):
    make(accelerator, tmp_path)
    make(accelerator, tmp_path, run=RunConfig(trackers=[], workers=9, log_every=3))
    with pytest.raises(UsageError, match=r"rate: 0\.1 -> 0\.2"):
        make(accelerator, tmp_path, rate=0.2)
    with pytest.raises(UsageError, match=r"run\.seed: 0 -> 1"):
        make(accelerator, tmp_path, run=RunConfig(trackers=[], seed=1))


def test_what_lies_elsewhere_but_is_the_same_goes_on(accelerator, tmp_path):
    inputs = {"source": "a fingerprint"}
    run = Run(accelerator, Settings(source="here"), tmp_path, "test", {}, {}, inputs)
    run.save({})
    again = Run(accelerator, Settings(source="there"), tmp_path, "test", {}, {}, inputs)
    assert again.load()["step"] == 0
    for other in ({"source": "another"}, None):
        with pytest.raises(UsageError, match=r"source: 'there' -> 'elsewhere'"):
            Run(accelerator, Settings(source="elsewhere"), tmp_path, "test", {}, {}, other)


def test_what_lies_at_the_same_place_and_has_changed_is_said(accelerator, tmp_path, capsys):
    said = "note: source is not what it was at this run's start: it goes on with what is there"
    for fingerprint, expected in (("a", False), ("a", False), ("b", True), ("b", False)):
        Run(accelerator, Settings(source="here"), tmp_path, "test", {}, {}, {"source": fingerprint})
        assert (said in capsys.readouterr().out) == expected


def test_a_run_of_a_program_that_lacked_a_key_goes_on_with_its_default(accelerator, tmp_path):
    run, _ = make(accelerator, tmp_path)
    run.save({})
    for path in (tmp_path / "config.yaml", tmp_path / "checkpoints" / "step-0" / "manifest.json"):
        about = yaml.safe_load(path.read_text())
        del about["config"]["rate"], about["config"]["run"]["seed"], about["config"]["run"]["trackers"], about["inputs"]
        path.write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"rate: 0\.1 -> 0\.2"):
        make(accelerator, tmp_path, rate=0.2)
    assert make(accelerator, tmp_path)[0].load()["step"] == 0


def test_compiled_networks_leave_the_checkpoints_of_plain_ones(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    run, model = make(Accelerator(cpu=True, dynamo_backend="eager"), tmp_path)
    assert "_orig_mod.weight" in model.state_dict()
    run.save({})
    assert load_file(tmp_path / "checkpoints" / "step-0" / "net.safetensors").keys() == {"weight", "bias"}
    assert run.load()["step"] == 0
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_disk_that_cannot_be_read_is_told_to_every_rank(accelerator, tmp_path, monkeypatch):
    run, _ = make(accelerator, tmp_path)
    told = []
    monkeypatch.setattr("nsvq.common.run.broadcast_object_list", lambda answer: told.append(answer[1]) or answer)
    monkeypatch.setattr(Run, "_choose", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        run.load()
    assert isinstance(told[0], OSError)


def test_trackers_that_cannot_work_are_told_in_one_line(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "logs").touch()
    settings = Settings(run=RunConfig(trackers=["tensorboard"], mixed_precision="no"))
    with pytest.raises(UsageError, match=r"cannot write to .*logs: "):
        Run(make_accelerator(settings.run, tmp_path), settings, tmp_path, "test", {}, {})
    monkeypatch.setattr("nsvq.common.run.is_wandb_available", lambda: False)
    with pytest.raises(UsageError, match="wandb, which is not installed"):
        make_accelerator(RunConfig(trackers=["wandb"], mixed_precision="no"), tmp_path)


def test_trackers_get_numbers_and_pictures(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = Settings(run=RunConfig(trackers=["tensorboard"], mixed_precision="no"))
    accelerator = make_accelerator(settings.run, tmp_path)
    run = Run(accelerator, settings, tmp_path, "test", {}, {})
    run.step = 3
    run.log({"l1": 0.5})
    images = torch.rand(3, 3, 4, 5) * 2 - 1
    run.save_picture(images, per_row=3)
    accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "logs" / "test"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("l1")] == [(3, 0.5)]
    (event,) = found.Images("samples")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 3
    assert np.array_equal(shown, np.asarray(Image.open(tmp_path / "samples" / "step-3.png")))


def test_a_global_batch_that_does_not_divide_is_refused(accelerator):
    assert micro_batch_size(RunConfig(batch_size=12, accumulation=3), accelerator) == 4
    with pytest.raises(UsageError, match=r"run\.batch_size = 10"):
        micro_batch_size(RunConfig(batch_size=10, accumulation=3), accelerator)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the malloc of glibc")
@pytest.mark.slow
def test_a_run_on_the_cpu_keeps_the_memory_that_it_frees(tmp_path):
    """A step finds the pages of the blocks that the step before has freed."""
    script = """
import ctypes, resource
from pathlib import Path
from nsvq.common.run import RunConfig, make_accelerator
make_accelerator(RunConfig(trackers=[], mixed_precision="no"), Path("."))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(2**23) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 2**23)  # 2048 pages
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20 * 2048 // 10


def test_the_version_is_told_without_git(monkeypatch):
    assert code_version().startswith(metadata.version("nsvq"))
    monkeypatch.setenv("PATH", "")
    assert code_version() == metadata.version("nsvq")


@pytest.mark.parametrize(
    ("version", "may_shard", "advice"),
    [(2, False, r"launch with DDP \(configs/accelerate/four-gpus\.yaml\)"), (1, True, "fsdp_version: 2")],
)
def test_a_launch_with_fsdp_is_refused_where_it_does_not_work(
    run_script, monkeypatch, tmp_path, version, may_shard, advice
):
    class Launched(Sharding):
        def __init__(self, **options):
            super().__init__(**options)
            self.state.fsdp_plugin.fsdp_version = version

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it; it comes back at the end
    monkeypatch.setattr("nsvq.common.run.Accelerator", Launched)
    config = RunConfig(trackers=[], mixed_precision="no")
    with pytest.raises(UsageError, match=advice):
        run_script(lambda: make_accelerator(config, tmp_path, may_shard=may_shard))
    AcceleratorState._reset_state(reset_partial_state=True)  # or what follows would be split too
