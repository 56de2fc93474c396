"""What a benchmark says where the extra `bench` is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys(("faiss", "matplotlib", "vector_quantize_pytorch"))  # as if they were not installed
sys.path.insert(0, {folder!r})
sys.argv = {argv!r}
{run}
"""


def run_without(*argv, run="runpy.run_path(sys.argv[0], run_name='__main__')"):
    code = WITHOUT.format(folder=str(BENCHMARKS), argv=[str(word) for word in argv], run=run)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "options", "module"),
    [
        ("layer", ["--codebook_size", 16, "--steps", 10], "vector_quantize_pytorch"),
        ("codebook", ["--sizes", 16, "--dims", 2, "--latents", 8], "faiss"),
    ],
)
def test_a_benchmark_against_a_peer_needs_it_for_its_numbers_alone(script, options, module):
    file = BENCHMARKS / f"{script}.py"
    asked = run_without(file, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "usage: " in asked.stdout
    refused = run_without(file, *options)
    assert refused.returncode == 1
    assert refused.stderr == f"error: this needs {module}: pip install --editable '.[bench]' in a clone\n"


@pytest.mark.parametrize(
    "plot",
    [
        "pictures import plot; plot([], None)",
        "evidence_page import plot; plot({}, {}, [], None)",
    ],
)
def test_what_plots_needs_matplotlib_for_its_plots_alone(plot):
    refused = run_without("x.py", run=f"from nsvq.common import launch\ndef main():\n    from {plot}\nlaunch.run(main)")
    assert refused.returncode == 1
    assert refused.stderr == "error: this needs matplotlib: pip install --editable '.[bench]' in a clone\n"
