import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.errors import UsageError, UserError
from common.run import Run
from diffusion import train
from diffusion.flow import FlowConfig, drop_labels, flow_loss, make_scheduler, sample, training_sigma
from diffusion.latents import LatentCache, train_batches
from diffusion.model import DiT
from diffusion.train import main

ROOT = Path(__file__).parents[2]
TINY = """
steps: 8
model: {size: tiny, depth: 2, width: 32, heads: 2}
optim: {lr: 1.0e-3, warmup_steps: 4, ema_decay: 0.5}
sampling: {images: 3, steps: 2}
run: {batch_size: 8, workers: 0, log_every: 2, sample_every: 100, checkpoint_every: 100, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Kept between tests: all of them train on the same images."""
    return tmp_path_factory.mktemp("cache") / "latents"


@pytest.fixture
def arguments(tmp_path, tokenizer_folder, image_folder, latents):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    return ["--config", config, "--tokenizer", tokenizer_folder, "--data", image_folder, "--data.image_size", 16,
            "--data.holdout", 0.05, "--cache", latents]  # fmt: skip


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "memory_gib")} for row in rows
    ]


def checkpoint(out, step):
    folder = out / "checkpoints" / f"step-{step}"
    state = torch.load(folder / "state.pt")
    moments = state["optimizers"]["model"]["state"]
    return {
        **load_file(folder / "model.safetensors"),
        **{f"ema/{i}": value for i, value in enumerate(state["ema"]["shadow_params"])},
        **{f"{i}/{name}": value for i, values in moments.items() for name, value in values.items()},
    }


def exported(out):
    return load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def test_resume_after_a_kill_is_bit_exact(run_script, arguments, tmp_path, monkeypatch):
    run_script(main, *arguments, "--out", tmp_path / "whole", "--run.sample_every", 1)
    saved, real = tmp_path / "parts", train.training_sigma
    resumed = [*arguments, "--out", saved, "--run.checkpoint_every", 4]
    with monkeypatch.context() as patch:
        steps = itertools.count(1)
        patch.setattr(
            train, "training_sigma", lambda *a: real(*a) if next(steps) < 7 else (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            run_script(main, *resumed)
    assert [path.name for path in (saved / "checkpoints").glob("step-*")] == ["step-4"]
    assert metrics(saved)[-1]["step"] == 6  # beyond the checkpoint, and to be written again
    run_script(main, *resumed)
    assert same(checkpoint(saved, 8), checkpoint(tmp_path / "whole", 8))
    assert same(exported(saved), exported(tmp_path / "whole"))
    assert metrics(saved) == metrics(tmp_path / "whole")


def test_a_finished_run_that_is_started_again_exports_again(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 2)
    before, log = exported(tmp_path / "out"), metrics(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pipeline")
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 2)
    assert same(exported(tmp_path / "out"), before)
    assert metrics(tmp_path / "out") == log


def test_micro_batches_change_no_number(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "one", "--steps", 4)
    run_script(main, *arguments, "--out", tmp_path / "four", "--steps", 4, "--run.accumulation", 4)
    one, four = exported(tmp_path / "one"), exported(tmp_path / "four")
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_ranks_are_one_rank_of_the_double_batch(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "one", "--steps", 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["diffusion/train.py", *map(str, arguments[:-2]), "--out", str(tmp_path / "two"), "--steps", "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(exported(tmp_path / "two"), exported(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_metrics_are_means_over_the_interval_with_warmup_and_quartiles(run_script, arguments, tmp_path, monkeypatch):
    recorded, real = [], train.flow_loss

    def record(network, latents, noise, sigma, labels):
        losses = real(network, latents, noise, sigma, labels)
        recorded.append((losses.detach(), sigma))
        return losses

    monkeypatch.setattr(train, "flow_loss", record)
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 6)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["samples_seen"] for row in rows] == [16, 32, 48]
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3])
    for i, row in enumerate(rows):
        losses, sigma = (torch.cat(parts) for parts in zip(*recorded[2 * i : 2 * i + 2], strict=True))
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert row["grad_norm"] > 0
        for q in range(4):
            inside = (sigma >= q / 4) & (sigma < (q + 1) / 4)
            mean = row.get(f"loss_sigma_q{q + 1}")
            assert (mean is not None) == bool(inside.any())
            if mean is not None:
                assert mean == pytest.approx(losses[inside].mean().item(), rel=1e-5)


def test_pictures_and_pipeline_come_from_the_averaged_weights(run_script, arguments, tmp_path, monkeypatch):
    drawn = []
    real = train.sample
    monkeypatch.setattr(train, "sample", lambda model, *a, **k: (drawn.append(model.proj_out.weight.clone()),
                                                                 real(model, *a, **k))[1])  # fmt: skip
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 4, "--run.sample_every", 2)
    state = checkpoint(tmp_path / "out", 4)
    names = [name for name, _ in DiT(4, 3, 2, depth=2, width=32, heads=2).named_parameters()]
    averaged = state[f"ema/{names.index('proj_out.weight')}"]
    assert len(drawn) == 2
    assert torch.equal(drawn[-1], averaged)
    assert torch.equal(exported(tmp_path / "out")["proj_out_2.weight"], averaged)
    assert not torch.equal(averaged, state["proj_out.weight"])
    assert Image.open(tmp_path / "out" / "samples" / "step-4.png").size == (2 * 18 + 2, 2 * 18 + 2)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_checkpoint_of_it(
    run_script, arguments, tmp_path, monkeypatch
):
    steps, real = itertools.count(1), train.flow_loss
    monkeypatch.setattr(train, "flow_loss", lambda *a: real(*a) * (1 if next(steps) < 6 else float("nan")))
    with pytest.raises(UserError, match="the loss is not finite at step 8"):
        run_script(main, *arguments, "--out", tmp_path / "out", "--run.checkpoint_every", 4, "--run.log_every", 100)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-4"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (["--tokenizer", "nowhere/tokenizer"], UserError, "there is no tokenizer at nowhere/tokenizer: train one"),
        (["--model.width", "2"], UsageError, "model.width"),
        (["--model.width", "8", "--model.heads", "1", "--model.patch_size", "3"], UsageError, "patches of side 3"),
        (["--run.batch_size", "9", "--run.accumulation", "2"], UsageError, "must be a multiple of ranks"),
        (["--model.sizes", "S"], UsageError, "did you mean model.size"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(run_script, arguments, tmp_path, change, error, text):
    for key in change[::2]:
        if key in arguments:
            del arguments[arguments.index(key) : arguments.index(key) + 2]
    with pytest.raises(UserError) as raised:
        run_script(main, *arguments, "--out", tmp_path / "out", *change)
    assert type(raised.value) is error
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_more_classes_than_the_stock_pipeline_has_are_refused_before_training(
    run_script, arguments, tmp_path, monkeypatch
):
    run_script(main, *arguments, "--out", tmp_path / "first", "--steps", 1)
    real = LatentCache.__init__

    def with_many_classes(self, folder):
        real(self, folder)
        self.classes = [str(i) for i in range(1001)]

    monkeypatch.setattr(LatentCache, "__init__", with_many_classes)
    monkeypatch.setattr(Run, "save", None)
    with pytest.raises(UserError, match="hard-codes 1000 as its null class"):
        run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 1)


class TwoPoints:
    """A cache of two classes, all of whose latents are -1 or +1."""

    shape, flips = (2, 4, 4), 1

    def __len__(self):
        return 64

    def read(self, index, flip):
        return torch.full(self.shape, 2.0 * (index % 2) - 1), index % 2


def test_a_trained_network_samples_the_class_that_was_asked_for():
    model = DiT(sample_size=4, in_channels=2, num_classes=2, patch_size=2, depth=2, width=32, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batches = train_batches(TwoPoints(), batch_size=32, seed=0)
    for batch in itertools.islice(batches, 600):
        sigma = training_sigma(batch["time_normal"], FlowConfig(), 1.0)
        labels = drop_labels(batch["labels"], batch["drop_uniform"], 0.2, model.null_class)
        flow_loss(model, batch["latents"], batch["noise"], sigma, labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    labels = torch.tensor([0, 1] * 8)
    got = sample(model, make_scheduler(1.0), torch.randn(16, 2, 4, 4), labels, model.null_class, steps=20)
    assert (got - (2.0 * labels.view(-1, 1, 1, 1) - 1)).abs().mean() < 0.15
    unlabelled = sample(model, make_scheduler(1.0), torch.randn(256, 2, 4, 4), torch.zeros(256, dtype=torch.int64), 2,
                        steps=20, guidance_scale=0.0)  # fmt: skip
    signs = unlabelled.mean((1, 2, 3)).sign()
    assert 32 < (signs > 0).sum() < 224, signs.sum()
