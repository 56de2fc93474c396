"""On a pretended GPU (tests/harness/pretend.py): nothing mixes devices, and the host waits once a step at most."""

import json

import lpips
import pytest
import torch
from pretend import DEVICE, Mixed, Pretend, PretendAccelerator, two_ranks

from nsvq.autoregressive.train import main as train_autoregressive
from nsvq.common.training import Trainer
from nsvq.diffusion.train import main as train_diffusion
from nsvq.eval.generation import main as generation
from nsvq.eval.reconstruction import main as reconstruction
from nsvq.pipelines.sample import main as sample
from nsvq.tokenizer.losses import _Distance
from nsvq.tokenizer.train import main as train_tokenizer

RUN = """
run: {batch_size: 8, accumulation: 2, workers: 0, log_every: 2, sample_every: 4, checkpoint_every: 4, trackers: [],
      mixed_precision: "no"}
"""
TOKENIZER = """
data: {source: synthetic, image_size: 32}
model: {channels: 4, channel_multipliers: [1, 1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 2}
quantizer: {name: ema, codebook_size: 64}
nsvq: {pull: {relative: true}, revive: 0.5, replace: {after: 1, weights: error},
       freeze: {latest: 2, warmup: 1, ramp: 1, consolidate: 1, consolidate_images: 32}}
loss: {perceptual: squeeze, discriminator_channels: 4, discriminator_layers: 1}
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
        steps, original = [], Trainer._optimizer_step

        def step(self, batches):
            with device.counting() as waits:
                original(self, batches)
            steps.append(waits)

        with monkeypatch.context() as patch, Pretend() as device:
            for module in ("nsvq.common.run", "nsvq.eval.reconstruction", "nsvq.eval.generation"):
                patch.setattr(f"{module}.Accelerator", PretendAccelerator)
            patch.setattr(Trainer, "_optimizer_step", step)
            run_script(main, *arguments)
        return steps

    return run


def test_the_tokenizers_trainer_waits_once_a_step_in_every_phase(on_device, tmp_path, monkeypatch):
    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    monkeypatch.setattr("nsvq.tokenizer.trainer.load_lpips", lambda *_: _Distance(net, False).requires_grad_(False))
    (tmp_path / "config.yaml").write_text(TOKENIZER + RUN)
    steps = on_device(train_tokenizer, "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["stage1", "stage1", "warmup", "stage2"]
    # The first step asks what the seed of the draws is.
    assert [len(waits) for waits in steps[1:]] == [1] * 7, "\n".join(sum(steps, []))
    assert all("guard.py" in line for waits in steps[1:] for line in waits)
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
    assert [len(waits) for waits in steps] == [1] * 3, "\n".join(sum(steps, []))
    assert all("guard.py" in line for waits in steps for line in waits)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


def test_the_autoregressive_trainer_waits_once_a_step(on_device, stage_two, tmp_path):
    steps = on_device(train_autoregressive, *stage_two(AUTOREGRESSIVE))
    assert [len(waits) for waits in steps] == [1] * 3, "\n".join(sum(steps, []))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()
