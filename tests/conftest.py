import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import VQModel
from PIL import Image

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / "tests" / "harness"
sys.path.append(str(HARNESS))  # not tests itself, whose folders are named as the packages are

# Autograd starts its threads at the first backward: for no GPU, as here, and not for the one that a plan pretends, with
# which no test could fork.
torch.zeros(1, requires_grad=True).sum().backward()

SLOW_FIXTURES = {"run_script", "run_instrumented", "run_two_ranks", "ranks", "trained"}
SLOW_FILES = {"test_soak.py", "test_wheel.py"}


def pytest_collection_modifyitems(items):
    """Tests that run whole scripts or train are slow, as are those that say so: `make test-fast` goes without."""
    for item in items:
        if item.path.name in SLOW_FILES or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


EXTRACTOR = '''
import torch
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class Tiny(FeatureExtractorBase):
    """Random projections of small images: "6" (an embedding), "classes" (4 logits), "spatial"."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("project", torch.randn(3 * 8 * 8, 6, generator=generator) / 14)
        self.register_buffer("classify", torch.randn(6, 4, generator=generator))

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x.float() / 64 - 2, (8, 8)).flatten(1)
        # A matrix product may round a row by its place in the batch.
        embedding = torch.tanh((x[:, :, None] * self.project).sum(1))
        out = {"6": embedding, "classes": embedding @ self.classify, "spatial": x[:, 5:12]}
        return tuple(out[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "6", "classes", "spatial"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "classes", "fid": "6", "kid": "6", "prc": "6", "sfid": "spatial"}[metric]


register_feature_extractor("tiny", Tiny)
'''


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def forget_accelerator():
    """accelerate keeps one state a process, and refuses an `Accelerator` of another kind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True, scope="module")
def _files_share_no_accelerator():
    forget_accelerator()


@pytest.fixture(scope="session")
def tiny_extractor(tmp_path_factory):
    """A Python file that registers the extractor `tiny`."""
    path = tmp_path_factory.mktemp("extractor") / "tiny.py"
    path.write_text(EXTRACTOR)
    return str(path)


@pytest.fixture
def run_script(monkeypatch):
    """Call a script's `main` in this process with arguments, as one rank of its own, on one thread: the networks are
    tiny, and a sum's bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(main, *arguments):
        forget_accelerator()
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        main()

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def run_instrumented(monkeypatch, run_script):
    """The same for a trainer's script under tests/harness/instrumented.py, with the keys of its SPEC."""
    from instrumented import instrument, trainer_of

    def run(train, *arguments, **spec):
        with monkeypatch.context() as patch:
            trainer = trainer_of(train.__name__.split(".")[1])
            for name in ("batches", "step", "tries_micro_batches"):
                patch.setattr(trainer, name, getattr(trainer, name))  # comes back at the end
            instrument(trainer, **{name: str(v) if name == "record" else v for name, v in spec.items()})
            run_script(train.main, *arguments)

    return run


@pytest.fixture(scope="session")
def torchrun():
    """Run a script with its arguments on two ranks, as the README says; returns the exit code and stderr."""

    def run(*command):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*launcher, *map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=300
        )
        return done.returncode, done.stderr

    return run


@pytest.fixture
def run_two_ranks(torchrun):
    """`run_instrumented` on two ranks; returns the exit code and stderr."""
    from instrumented import OUTLIVED

    def run(stage, *arguments, **spec):
        spec = json.dumps({"stage": stage, **spec}, default=str)
        code, error = torchrun(HARNESS / "instrumented.py", spec, *arguments)
        assert OUTLIVED not in error, error
        return code, error

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; the test is skipped where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def make_tokenizer(seed):
    """A stock VQModel for images of 16 pixels: 4 x 4 x 3 latents."""
    torch.manual_seed(seed)
    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=32,
        sample_size=16,
        scaling_factor=2.0,
        mid_block_add_attention=False,
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other-tokenizer")
    make_tokenizer(1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Class folders without splits: 46 images of 18 x 16 pixels in 2 classes, of which one in 20 is held out."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(46):
        folder = root / ("ant", "bee")[i % 2]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((18, 16), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def accelerator():
    forget_accelerator()
    return Accelerator(cpu=True)


@pytest.fixture
def references(tmp_path, monkeypatch):
    """A folder of the test, where trainers keep the references of Frechet distances."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "references"))  # of processes
    monkeypatch.setattr("nsvq.eval.monitor.DEFAULT_CACHE", tmp_path / "references")


@pytest.fixture
def distance(tiny_extractor, references):
    """Options that turn the Frechet distance of a generator on."""
    return ["--sampling.fd_every", 2, "--sampling.fd_samples", 20, "--sampling.fd_features", tiny_extractor]
