"""The Triton kernels against the plain passes: on the GPU where there is one, else through Triton's interpreter, which
must be switched on before anything imports Triton, and so gets a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from nsvq.tokenizer import codebook, codebook_tiles
from nsvq.tokenizer.codebook import _centered

pytest.importorskip("triton")
from nsvq.tokenizer import codebook_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(100, 300, 8), (33, 70, 100), (200, 1, 4), (3, 40, 200)]
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels are tested in this process")
@pytest.mark.slow
def test_kernels_through_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-k", "not compile and not without", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout
    assert "26 passed" in done.stdout, done.stdout


def latents_and_codes(shape):
    n, k, d = shape
    z, codes = 0.1 * torch.randn(n, d, device=DEVICE), 0.1 * torch.randn(k, d, device=DEVICE)
    return _centered(z, codes)


@runs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("programs", [1, 64])
def test_search_finds_what_the_plain_search_finds(monkeypatch, shape, programs):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)  # one part of the codebook, or several that are merged
    z, codes = latents_and_codes(shape)
    assert torch.equal(kernels.nearest_code(z, codes, False), codebook_tiles.nearest_code(z, codes, False))
    z, codes = (32 * z).round(), (32 * codes).round()  # their products are exact, in any order of sums
    codes = torch.cat([codes, codes])  # twins: the lower index wins
    assert torch.equal(kernels.nearest_code(z, codes, False), codebook_tiles.nearest_code(z, codes, False))


@runs_kernels
def test_search_leaves_a_code_itself_out():
    _, codes = latents_and_codes((1, 150, 16))
    expected = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(kernels.nearest_code(codes, codes, True), expected)
    assert torch.equal(codebook_tiles.nearest_code(codes, codes, True), expected)


@runs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize(("temperature", "own"), [(0.05, False), (0.3, True)])
@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in lanes that are masked out
def test_sums_equal_a_dense_float64_softmax(monkeypatch, shape, programs, temperature, own):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    z, codes = latents_and_codes(shape)
    for indices in (None, torch.randint(len(codes), (len(z),), device=DEVICE)):
        found, mass, entropy, loss, s, weighted = kernels.softmax_sums(z, codes, indices, temperature, own)
        z64, codes64 = z.double(), codes.double()
        distances = (z64[:, None] - codes64[None]).square().sum(-1)
        winners = distances.argmin(1) if indices is None else indices
        tau = temperature * distances.amin(1, keepdim=True) if own else temperature
        logits = -distances / tau
        p = logits.softmax(1)
        w = p.scatter(1, winners[:, None], 0.0)
        assert torch.equal(found, winners)
        close = {"rtol": 3e-5, "atol": 3e-6}
        torch.testing.assert_close(mass.double(), p.gather(1, winners[:, None]).squeeze(1), **close)
        torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum(1).mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, (w * distances).sum(), **close)
        torch.testing.assert_close(s.double(), w.sum(0), **close)
        torch.testing.assert_close(weighted.double(), w.T @ z64, **close)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nsvq.tokenizer import codebook_triton as kernels

def shared_memory(kernel, constants, capability, warps, stages):
    types = {"index_out": "*i32", "winners": "*i32"}
    types |= dict.fromkeys(("latent_count", "code_count", "dim", "codes_per_split", "latents_per_split"), "i32")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}).metadata.shared

for capability in (80, 90):
    torch.cuda.get_device_capability = lambda device: (capability // 10, 0)
    shared = {"precision": "tf32x3", "CHUNK": kernels._CHUNK}
    latents, codes, *how = kernels.SEARCH
    tile = {"exclude_self": False, "normalize": True, "LATENTS": latents, "CODES": codes}
    print(shared_memory(kernels._search_kernel, shared | tile, capability, *how))
    for dim in (128, 256):
        latents, codes, *how = kernels.sums_tile(dim, torch.device("cuda"))
        tile = {"LATENTS": latents, "CODES": codes, "DIM": dim}
        print(shared_memory(kernels._softmax_sums_kernel, shared | tile, capability, *how))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler on Linux alone")
@pytest.mark.slow
def test_kernels_compile_for_gpus_and_fit_the_shared_memory_of_a_consumer_card():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 6
    assert max(sizes) <= 99 * 1024  # bytes a block, compute capability 8.6 and 8.9


def test_launches_are_made_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whichever the tensors are on."""
    current, launched = [], []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **_: launched.append((arguments[0].device, *current))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("_search_kernel", "_softmax_sums_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    z, codes = torch.zeros(3, 4), torch.zeros(5, 4)
    kernels.nearest_code(z, codes, False)
    kernels.softmax_sums(z, codes, torch.zeros(3, dtype=torch.int64), 1.0, False)
    assert launched == [(z.device, z.device)] * 3


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler."), AssertionError()])
def test_without_a_compiler_the_plain_passes_run_and_one_line_says_what_it_costs(monkeypatch, capsys, error):
    class OnTheGPU:
        is_cuda, shape = True, (1, 16)

    def fail(*_):
        raise error

    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(*shape))
    monkeypatch.setattr(kernels, "nearest_code", fail)
    codebook._kernels.cache_clear()
    try:
        codebook.prepare(torch.device("cuda"))
        (line,) = capsys.readouterr().err.splitlines()
        assert str(error) in line
        assert "0.5 s more for a step" in line
        assert codebook._passes(OnTheGPU()) is codebook_tiles
        assert capsys.readouterr().err == ""
        codebook._kernels.cache_clear()
        monkeypatch.setattr(kernels, "nearest_code", lambda *_: None)
        assert codebook._passes(OnTheGPU()) is kernels
    finally:
        codebook._kernels.cache_clear()
