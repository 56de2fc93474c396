import os
import subprocess
import sys

import pytest
import torch

from nsvq.common import launch

SCRIPT = """
from nsvq.common import launch

def main():
    from pathlib import Path
    from torch import device, distributed
    from nsvq.common.run import RunConfig, make_accelerator
    accelerator = make_accelerator(RunConfig(trackers=[]), Path())
    if accelerator.num_processes > 1:
        patience = distributed.group.WORLD._get_backend(device("cpu")).options._timeout
        assert patience.total_seconds() >= 3600 * 12, patience
    open(f"{accelerator.process_index}-of-{accelerator.num_processes}", "w").close()

launch.run(main)
"""
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
ACCELERATE = (
    "accelerate.commands.accelerate_cli launch --quiet --cpu --num_machines 1 --mixed_precision no --dynamo_backend no"
)


@pytest.mark.parametrize(
    ("launcher", "use_cpu", "code", "ranks"),
    [
        (f"{TORCHRUN}", "true", 0, ["0-of-2", "1-of-2"]),
        (f"{TORCHRUN}", "false", 1, []),
        (f"{ACCELERATE} --num_processes 2", "false", 1, []),
        (f"{ACCELERATE} --num_processes 1", "false", 0, ["0-of-1"]),
    ],
)
def test_cpu_processes_know_each_other_or_none_of_them_trains(launcher, use_cpu, code, ranks, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"ACCELERATE_USE_CPU": use_cpu, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher.split(), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "script.py") == ranks
    advice = "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N script.py"
    assert (advice in done.stderr) == bool(code)


def test_memory_that_runs_out_anywhere_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with pytest.raises(SystemExit) as end:
        launch.run(main)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory is too small" in line
    assert "Tried to allocate 2.00 GiB" in line


@pytest.mark.parametrize(("id", "seconds", "warned"), [(None, None, False), ("1", None, True), ("1", "600", False)])
def test_a_launcher_that_leaves_too_little_time_for_a_checkpoint_is_told(monkeypatch, id, seconds, warned):
    for name, value in (("TORCHELASTIC_RUN_ID", id), ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert ("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in (launch.shutdown_advice() or "")) == warned
