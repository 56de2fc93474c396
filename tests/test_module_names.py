"""`accelerate launch eval/generation.py` puts eval/ first on the path: its modules must not stand before other ones."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["tokenizer", "diffusion", "pipelines", "eval", "common", "benchmarks"])
def test_no_module_beside_a_script_hides_one_of_python_or_of_a_library(folder, tmp_path):
    names = [path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
    code = f"import importlib.util as u; print(*(n for n in {names} if u.find_spec(n)))"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert found.stdout.split() == []
    assert found.returncode == 0, found.stderr
