import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsvq.diffusion import train as diffusion
from nsvq.tokenizer import codebook
from nsvq.tokenizer import train as tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu = importlib.import_module("gpu")
sys.path.remove(str(ROOT / "benchmarks"))
SCRIPTS = {"tokenizer/train.py": tokenizer.main, "diffusion/train.py": diffusion.main}


@pytest.fixture
def here(monkeypatch, run_script):
    """Trainings in this process."""
    start = gpu.run

    def run(*words, **how):
        words = list(map(str, words))
        if not (scripts := [word for word in words if word in SCRIPTS]):
            return start(*words, **how)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run_script(SCRIPTS[scripts[0]], *words[words.index(scripts[0]) + 1 :])
        return said.getvalue()

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.chdir(ROOT)


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return end.value.code


@pytest.mark.slow
def test_every_part_runs_at_toy_size_and_the_report_tells_each(monkeypatch, here, tmp_path):
    code = main(monkeypatch, "--toy", "--folder", tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "FAILED" not in report
    assert code == 0
    for part in gpu.PARTS:
        assert f"| {part} |" in report
    assert "torch " + torch.__version__.split("+")[0] in report
    assert "resume | goes on from step" in report
    assert "DiT-B: speed" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys, tmp_path):
    assert main(monkeypatch, "--folder", tmp_path) == 2
    assert "finds no NVIDIA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path):
    def broken(setting):
        raise gpu.Failed("the driver is gone\nCUDA error")
        yield

    monkeypatch.setitem(gpu.PARTS, "precision", broken)
    assert main(monkeypatch, "--toy", "--folder", tmp_path, "--parts", "precision", "kernels") == 1
    report = (tmp_path / "report.md").read_text()
    assert "| precision | runs to its end | see below | it does | **FAILED** |" in report
    assert "the driver is gone\nCUDA error" in report
    assert "| kernels | N = 64, K = 100, d = 8: error of the NS loss |" in report


def test_a_wrong_kernel_is_seen(monkeypatch, tmp_path):
    sums = codebook.codebook_tiles.softmax_sums

    def wrong(*arguments):
        winners, mass, entropy, loss, s, weighted = sums(*arguments)
        return winners, mass, entropy, 1.001 * loss, s, 1.001 * weighted

    monkeypatch.setattr(codebook.codebook_tiles, "softmax_sums", wrong)
    assert main(monkeypatch, "--toy", "--folder", tmp_path, "--parts", "kernels") == 1
    failed = [line for line in (tmp_path / "report.md").read_text().splitlines() if "FAILED" in line]
    assert ["NS loss" in line or "gradient" in line for line in failed] == 4 * [True]


def test_make_has_both_targets_and_leaves_time_for_a_checkpoint():
    for target, words in (("gpu", ""), ("smoke", "--parts smoke")):
        told = subprocess.run(["make", "-n", target, "OPTIONS=--x 1"], cwd=ROOT, capture_output=True, text=True).stdout
        assert f"benchmarks/gpu.py {words}".strip() in told
        assert "--x 1" in told
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_a_known_gpu_is_measured_against_its_plan_and_another_against_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = gpu._expected("DiT-B")
    assert f"| {found.memory / 2**30:.0f} | {found.images_per_second:,.0f} |" in (ROOT / "README.md").read_text()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce RTX 9990")
    assert gpu._expected("DiT-B") is None
