"""The wheel, installed elsewhere on the disk beside the libraries of this environment, trains and samples by itself."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DATA = {"source": "synthetic", "image_size": 16}
RUN = {"batch_size": 8, "workers": 0, "checkpoint_every": 100, "mixed_precision": "no", "trackers": []}
TOKENIZER = {
    "data": DATA,
    "model": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "layers_per_block": 1,
        "norm_groups": 4,
        "latent_channels": 4,
    },
    "quantizer": {"codebook_size": 16},
    "loss": {"perceptual": "none"},
    "discriminator": {"channels": 8, "layers": 1},
    "nsvq": None,
    "schedule": {"epoch_samples": 16, "epochs": 2},
    "validation": {"images": 8, "probe_images": 4, "statistics_images": 16},
    "run": RUN,
}
DIT = {
    "data": DATA,
    "steps": 2,
    "cache_images": 16,
    "model": {"size": "tiny", "depth": 1, "width": 32, "heads": 2},
    "sampling": {"images": 2, "steps": 2},
    "run": RUN,
}
IMPORTS = """
import sys
from pathlib import Path
import nsvq
assert "torch" not in sys.modules, "the face loads nothing before it is asked to"
from nsvq import ClassConditionalPipeline, Tokenizer, __version__
from nsvq.common.run import code_version
assert code_version() == __version__, "no commit of the repository around it"
loaded = {"datasets", "lpips", "matplotlib", "torch_fidelity", "tensorboard"} & sys.modules.keys()
assert not loaded, f"a tokenizer needs none of {loaded}"
import nsvq.diffusion.train
import nsvq.tokenizer.train
here = Path(sys.prefix).resolve()
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "nsvq":
        assert here in Path(module.__file__).resolve().parents, f"{name} is not the wheel's: {module.__file__}"
for default in (nsvq.tokenizer.train.DEFAULT_CONFIG, nsvq.diffusion.train.DEFAULT_CONFIG):
    assert default.is_file() and here in default.resolve().parents
"""
STOCK = """
import sys
sys.modules["nsvq"] = None  # not to be imported
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline).__name__ == "DiTPipeline"
assert pipeline([3], num_inference_steps=2).images[0].size == (16, 16)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools builds in place, and would take up what an earlier build left.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, folder / "source"], check=True)
    (path,) = folder.glob("nsvq-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel in it, inside another project's repository. It sees this one's
    libraries, but not the clone: a .pth file of a folder on the path is not read."""
    project = tmp_path_factory.mktemp("project")
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    subprocess.run(["git", "init", "--quiet", project], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "Start"], cwd=project, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (site,) = (project / ".venv" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, wheel], check=True)
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return project / ".venv" / "bin" / "python"


def _run(python, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    project = python.parents[2]
    done = subprocess.run([python, *arguments], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_code_configs_licence_and_type_marker_and_nothing_beside_them(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0] for name in names} == {"nsvq", info}
    folders = ("data", "common", "tokenizer", "diffusion", "autoregressive", "pipelines", "eval", "configs")
    found = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found += [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    expected = {f"nsvq/{path}" for path in found} | {f"nsvq/{path.name}" for path in (ROOT / "nsvq").glob("*.py")}
    files = {"nsvq/py.typed", "nsvq/data/imagenet_classes.txt"}
    assert {name for name in names if name.startswith("nsvq/")} == expected | files
    assert f"{info}/licenses/LICENSE" in names


def test_both_stages_run_from_the_wheel_and_stock_diffusers_loads_the_result(python, tmp_path):
    _run(python, "-c", IMPORTS)
    for name, config in (("tokenizer", TOKENIZER), ("dit", DIT)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    options = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", *options.split(), "-m"]
    tokenizer, pipeline = tmp_path / "nsvq" / "tokenizer", tmp_path / "dit" / "pipeline"
    _run(python, *launch, "nsvq.tokenizer.train", "--config", tmp_path / "tokenizer.yaml", "--out", tokenizer.parent)
    given = ["--config", tmp_path / "dit.yaml", "--tokenizer", tokenizer, "--out", pipeline.parent]
    _run(python, "-m", "nsvq.diffusion.train", *given)
    options = "--data synthetic --workers 0 --features none --lpips none --limit 8"
    given = ["--tokenizer", tokenizer, *options.split(), "--output", tmp_path / "reconstruction.json"]
    _run(python, "-m", "nsvq.eval.reconstruction", *given)
    given = ["--pipeline", pipeline, "--classes", "star", "--steps", "2", "--output", tmp_path / "grid.png"]
    _run(python, "-m", "nsvq.pipelines.sample", *given)
    assert (tmp_path / "grid.png").is_file()
    _run(python, "-c", STOCK, pipeline)
