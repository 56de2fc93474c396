import os
import subprocess
import sys

import pytest

SCRIPT = """
from nsvq.common import launch

def main():
    from accelerate import Accelerator
    accelerator = Accelerator()
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
