"""The order of the folders, as their imports show it. Imports inside functions count, those for type checkers too."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["nsvq", "data", "common", "tokenizer", "diffusion", "autoregressive", "pipelines", "eval", "benchmarks"]
RANK = {folder: i for i, folder in enumerate(FOLDERS)}
APART = {("autoregressive", "diffusion")}  # the two generators do not know each other


def _name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    # The files of benchmarks/ are no package: they import each other as scripts do.
    return ".".join(parts[1:] if parts[0] == "benchmarks" else parts if parts[0] == "nsvq" else ("nsvq", *parts))


SOURCES = {_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
SCRIPTS = {name for name, path in SOURCES.items() if 'if __name__ == "__main__":' in path.read_text()}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write relative imports in full"
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in SOURCES else node.module for name in whole)


IMPORTS = {name: set(_imports(path)) for name, path in SOURCES.items()}
# The public face names what it likes, for type checkers; it imports nothing before it is asked to.
OURS = {name: found & SOURCES.keys() for name, found in IMPORTS.items() if name != "nsvq"}


def _folder(name):
    return SOURCES[name].relative_to(ROOT).parts[0]


def test_a_module_imports_from_its_own_folder_and_the_ones_above_and_no_script():
    arrows = [(name, other) for name in OURS.keys() - SCRIPTS for other in OURS[name]]
    ranks = {(name, other): (_folder(name), _folder(other)) for name, other in arrows}
    assert [pair for pair, (of, to) in ranks.items() if RANK[to] > RANK[of] or (of, to) in APART] == []
    assert [pair for pair in arrows if pair[1] in SCRIPTS] == []
    assert [pair for pair in arrows if pair[1] == "nsvq"] == [], "the face is for users: import from where it is"
    unknown = {n for found in IMPORTS.values() for n in found if n.split(".")[0] == "nsvq"} - SOURCES.keys()
    assert unknown == set(), "modules that do not exist"


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(OURS).prepare()  # raises CycleError, which names the circle


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["demo"]
    declared = {re.match(r"[\w-]+", d)[0].lower() for d in wanted}
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    inside = [name for name in SOURCES if _folder(name) != "benchmarks"]
    libraries = {name.split(".")[0] for module in inside for name in IMPORTS[module]} - sys.stdlib_module_names
    names = {distribution.get(name, name.replace("_", "-")) for name in libraries - {"nsvq"}}
    by_others = {"triton", "tensorboard"}  # torch brings triton for GPUs; accelerate's tracker imports tensorboard
    assert names - by_others == declared - by_others


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_beside_a_script_hides_one_of_python_or_of_a_library(folder, tmp_path):
    """`accelerate launch eval/generation.py` puts eval/ first on the path."""
    names = [path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("__")]
    code = f"import importlib.util as u; print(*(n for n in {names} if u.find_spec(n)))"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert found.stdout.split() == []
    assert found.returncode == 0, found.stderr


def test_every_process_group_waits_for_hours():
    """Ranks wait for one that prepares data; NCCL gives up after ten minutes."""
    calls = [
        (path.name, {word.arg: ast.unparse(word.value) for word in node.keywords})
        for path in SOURCES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Accelerator"
    ]
    assert len(calls) >= 3
    assert [name for name, words in calls if "LONG_WAIT" not in words.get("kwargs_handlers", "")] == []
