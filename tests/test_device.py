"""On a pretended GPU (tests/harness/pretend.py): nothing mixes devices, and the host waits once a step at most."""

import json
from itertools import pairwise

import pytest
import torch
from accelerate.state import PartialState
from pretend import DEVICE, Mixed, Pretend, PretendAccelerator, two_ranks

from nsvq import ResidualVectorQuantizer, VectorQuantizer
from nsvq.autoregressive.train import main as train_autoregressive
from nsvq.common import training
from nsvq.common.guard import Guard
from nsvq.common.metrics import Means
from nsvq.data.bad_images import BadImages
from nsvq.data.config import DataConfig
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.samplers import ddpm_scheduler, flow_scheduler
from nsvq.diffusion.samplers import sample as draw
from nsvq.diffusion.train import main as train_diffusion
from nsvq.eval.generation import main as generation
from nsvq.eval.reconstruction import main as reconstruction
from nsvq.pipelines.sample import main as sample
from nsvq.tokenizer import ranks
from nsvq.tokenizer.encode import _Encoding, open_cache
from nsvq.tokenizer.health import EpochUsage
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.losses import random_lpips
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.train import main as train_tokenizer

RUN = """
run: {batch_size: 8, accumulation: 2, workers: 0, log_every: 2, sample_every: 4, checkpoint_every: 4, trackers: [],
      mixed_precision: "no"}
"""
TOKENIZER = """
data: {source: synthetic, image_size: 8}
model: {channels: 4, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 2}
quantizer: {name: ema, codebook_size: 64}
nsvq: {pull: {relative_to: mean}, revive: 0.5, replace: {after: 1, weights: error},
       freeze: {latest: 2, warmup: 1, ramp: 1, consolidate: 1, consolidate_images: 32}}
loss: {perceptual: none}
discriminator: {channels: 4, layers: 1}
schedule: {epoch_samples: 16, epochs: 4}
optim: {lr: 1.0e-3, ema_decay: 0.5, clip_grad_norm: 1.0}
validation: {every: 2, images: 8, probe_images: 4, statistics_images: 16}
"""
DIFFUSION = """
steps: 3
model: {size: tiny, depth: 1, width: 16, heads: 2}
optim: {ema_decay: 0.5}
sampling: {images: 2, steps: 2}
"""
AUTOREGRESSIVE = """
schedule: {steps: 3, warmup_steps: 1}
model: {size: tiny, depth: 1, width: 16, heads: 2}
optim: {ema_decay: 0.5}
sampling: {images: 2}
"""


@pytest.fixture
def on_device(run_script, monkeypatch):
    """Run a script on the pretended GPU; returns for each optimizer step the waits of the host in it."""

    def run(main, *arguments):
        steps, original = [], training._optimizer_step

        def step(trainer, batches):
            with device.counting() as waits:
                original(trainer, batches)
            steps.append(waits)

        with monkeypatch.context() as patch, Pretend() as device:
            for module in ("nsvq.common.run", "nsvq.eval.reconstruction", "nsvq.eval.generation"):
                patch.setattr(f"{module}.Accelerator", PretendAccelerator)
            patch.setattr(training, "_optimizer_step", step)
            run_script(main, *arguments)
        return steps

    return run


def only_the_guard_waits(steps):
    for waits in steps:
        assert [line.split()[2].split(":")[0] for line in waits] == ["common/guard.py"], "\n".join(waits)


def test_the_tokenizers_trainer_waits_once_a_step_in_every_phase(on_device, tmp_path):
    (tmp_path / "config.yaml").write_text(TOKENIZER + RUN)
    steps = on_device(train_tokenizer, "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 8
    assert [row["phase"] for row in rows] == ["stage1", "stage1", "warmup", "stage2"]
    # The first step asks what the seed of the draws is.
    only_the_guard_waits(steps[1:])
    assert (tmp_path / "run" / "tokenizer" / "config.json").exists()


def test_planted_mistakes_are_found():
    cpu, generator = torch.ones(3), torch.Generator()
    with Pretend() as device:
        gpu = torch.ones(3).to(DEVICE)
        assert (gpu.device, cpu.device.type, (gpu + torch.tensor(1.0)).is_cuda) == (DEVICE, "cpu", True)
        for mistake in (
            lambda: gpu + cpu,
            lambda: torch.cat([gpu, cpu]),
            lambda: torch.stack([gpu[0], torch.tensor(1.0)]),
            lambda: cpu[gpu.long()],
            lambda: gpu.index_put_((gpu.long(),), cpu),
            lambda: torch.nn.functional.embedding(gpu.long(), torch.ones(3, 2)),
            lambda: torch.rand(3, device=DEVICE, generator=generator),
            lambda: gpu.normal_(generator=generator),
            lambda: gpu.numpy(),
        ):
            with pytest.raises(Mixed):
                mistake()
        with device.counting() as none:
            for _ in (gpu[gpu.long()], gpu.new_full((), 2), torch.full((3,), 1.0, device=DEVICE), gpu.clone()):
                pass
            gpu[gpu > 0] = 0
            cpu.to(DEVICE, non_blocking=True)
        assert none == []
        for wait in (
            lambda: gpu.sum().item(),
            lambda: bool(gpu.sum() > 0),
            lambda: gpu.tolist(),
            lambda: gpu.cpu(),
            lambda: cpu.to(DEVICE),
            lambda: cpu.copy_(gpu),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: gpu.new_tensor(1.0),
            lambda: gpu.nonzero(),
            lambda: gpu[gpu > 0],
            lambda: gpu[cpu.long()],
            lambda: torch.bincount(gpu.long()),
            lambda: gpu.unique(),
            lambda: torch.equal(gpu, gpu),
        ):
            with device.counting() as one:
                wait()
            assert len(one) == 1
            assert "test_device.py" in one[0]


@pytest.fixture
def stage_two(tmp_path, tokenizer_folder, image_folder):
    """Arguments of a generator's trainer, given its config."""

    def arguments(config):
        (tmp_path / "config.yaml").write_text(config + RUN)
        data = ("--data", image_folder, "--data.image_size", 16, "--data.holdout", 0.05, "--cache_images", 32)
        return "--config", tmp_path / "config.yaml", "--tokenizer", tokenizer_folder, *data, "--out", tmp_path / "run"

    return arguments


@pytest.mark.parametrize(
    "options",
    [
        ["--objective.name", "flow"],
        ["--objective.name", "ddpm", "--objective.prediction", "v", "--model.variant", "modern"],
    ],
)
def test_the_dits_trainer_waits_once_a_step(on_device, stage_two, tmp_path, options):
    steps = on_device(train_diffusion, *stage_two(DIFFUSION), *options)
    # A DDPM's alphas go to the GPU in the first step.
    only_the_guard_waits(steps[1:])
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_the_autoregressive_trainer_waits_once_a_step(on_device, stage_two, tmp_path):
    steps = on_device(train_autoregressive, *stage_two(AUTOREGRESSIVE))
    only_the_guard_waits(steps)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize("kind", ["continuous", "quantized", "codes"])
def test_encoding_waits_at_the_end_of_a_shard_alone(accelerator, image_folder, tokenizer_folder, tmp_path, kind):
    """However many batches it has, so that images are loaded while the GPU encodes."""
    accelerator.state.device = PartialState().device = DEVICE
    data = DataConfig(source=str(image_folder), image_size=16, holdout=0.2)
    waits = {}
    for images in (8, 32):  # one batch, and four
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
        with Pretend() as device, pytest.MonkeyPatch.context() as patch:
            original = _Encoding.encode_shard

            def encode(*arguments, device=device, images=images, original=original):
                with device.counting() as waits[images]:
                    return original(*arguments)

            patch.setattr(_Encoding, "encode_shard", encode)
            patch.setattr("nsvq.tokenizer.encode.BATCH_IMAGES", 8)
            tokenizer.model.to(DEVICE)
            cache = open_cache(tmp_path / str(images), tokenizer, data, accelerator, limit=images, kind=kind)
        assert len(cache) == images
    assert len(waits[32]) == len(waits[8]) <= 2, "\n".join(waits[32])


def test_evaluation_mixes_no_devices(on_device, stage_two, tmp_path, image_folder, tokenizer_folder, tiny_extractor):
    on_device(train_diffusion, *stage_two(DIFFUSION), "--steps", 1)
    data = ("--data", image_folder, "--data.holdout", 0.2, "--features", tiny_extractor, "--workers", 0)
    cache = ("--cache", "null")
    output = tmp_path / "reconstruction.json"
    how = ("--lpips", "none", "--compare", tokenizer_folder, *cache)
    on_device(reconstruction, "--tokenizer", tokenizer_folder, "--output", output, *data, *how)
    assert json.loads(output.read_text())["metrics"]["psnr"] > 0
    output, pipeline = tmp_path / "generation.json", tmp_path / "run" / "pipeline"
    how = ("--samples", 20, "--steps", 2, "--data.image_size", 16, "--guidance_scale", 2, *cache)
    on_device(generation, "--pipeline", pipeline, "--output", output, *data, *how)
    assert json.loads(output.read_text())["metrics"]
    on_device(sample, "--pipeline", pipeline, "--classes", 1, "--output", tmp_path / "grid.png", "--device", "cuda:0")
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(("sampler", "noise"), [("dpm++", 0), ("euler", 0), ("ddim", 0), ("ddpm", 1), ("sde", 1)])
def test_a_sampler_waits_for_nothing_but_the_noise_that_it_draws_on_the_cpu(sampler, noise):
    epsilon = ("epsilon", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2})
    scheduler = ddpm_scheduler(*epsilon, sampler) if sampler in ("ddim", "ddpm") else flow_scheduler(1.5, sampler)
    waits = []
    with Pretend() as device, device.counting() as found:
        draw(
            DiT(4, 3, 5, depth=1, width=16, heads=2).to(DEVICE),
            scheduler,
            torch.randn(2, 3, 4, 4).to(DEVICE),
            torch.tensor([1, 2], device=DEVICE),
            5,
            steps=4,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            on_step=lambda i, t, latents: waits.append(len(found)) or latents,
        )
    assert [after - before for before, after in pairwise(waits[:-1])] == [noise] * 2, "\n".join(found)


@pytest.mark.parametrize("levels", [1, 4])
def test_a_layer_waits_for_two_numbers_of_each_level(levels):
    layer = VectorQuantizer(8, 64) if levels == 1 else ResidualVectorQuantizer(8, 64, levels)
    with Pretend() as device:
        layer.to(DEVICE)
        x = torch.randn(32, 16, 8).to(DEVICE)
        for _ in range(3):
            layer(x)
        with device.counting() as waits:
            layer(x)
    assert len(waits) <= 2 * levels, "\n".join(
        waits
    )  # latents that are not finite, and the distance of the temperature


@pytest.mark.parametrize("bf16", [False, True])
def test_lpips_stays_on_the_device(bf16):
    metric = random_lpips("squeeze", "bf16" if bf16 else "fp32")
    with Pretend() as device:
        metric = metric.to(DEVICE)
        with device.counting() as waits:
            assert metric(
                torch.rand(1, 3, 32, 32).to(DEVICE, non_blocking=True), torch.rand(1, 3, 32, 32, device=DEVICE)
            ).is_cuda
    assert waits == []


def test_two_ranks_reduce_tensors_on_the_device_alone(accelerator, tmp_path):
    """Two ranks that hold the same: sums are doubled, means are as they were."""
    accelerator.state.device = PartialState().device = DEVICE
    with Pretend(), two_ranks(accelerator) as called:
        assert accelerator.num_processes == 2
        means, guard, bad = Means(accelerator), Guard(accelerator), BadImages(0.5, accelerator)
        means.add("l1", torch.tensor(6.0, device=DEVICE), 3)
        means.load_state_dict(means.state_dict())
        assert means.take() == {"l1": 2.0}
        assert guard.step([], [torch.tensor(1.0, device=DEVICE)], torch.tensor(3.0, device=DEVICE))
        assert guard.told == 3
        bad.update({"label": [0] * 4, "bad": ["x"]})
        assert bad.check() == 2
        usage = EpochUsage(4, accelerator)
        indices = torch.tensor([[[0, 1, 1]]], device=DEVICE)
        usage.update(indices, torch.ones(1, 1, 3, device=DEVICE), torch.tensor(0.5, device=DEVICE), 1)
        counts, errors, commitment = usage.total()
        assert (counts.tolist(), errors.tolist(), commitment) == ([2, 4, 0, 0], [2, 4, 0, 0], 0.5)
        tokens = torch.arange(6.0, device=DEVICE).view(3, 2)
        assert ranks.rows(tokens, torch.tensor([1, 4], device=DEVICE)).tolist() == [[4, 6], [0, 0]]
        assert ranks.mean(tokens.sum()).item() == 15
        points = torch.randn(40, 2, device=DEVICE)
        assert kmeans(lambda: [points], 4, seed=0, iterations=2).is_cuda
        assert {"all_reduce", "broadcast"} <= set(called)
        for forgotten in (lambda: ranks.total(torch.ones(2)), lambda: accelerator.reduce(torch.ones(2), "sum")):
            with pytest.raises(Mixed):
                forgotten()
