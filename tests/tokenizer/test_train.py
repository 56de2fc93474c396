import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UsageError
from tokenizer import Tokenizer
from tokenizer.train import main

ROOT = Path(__file__).parents[2]
TINY = """
data: {source: synthetic, image_size: 16}
model: {channels: 8, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 4}
quantizer: {name: nsvq, codebook_size: 64}
loss: {perceptual: none, discriminator_channels: 8, discriminator_layers: 1}
schedule: {epoch_samples: 16, epochs: 8, latest_freeze: 4, warmup: 2, ramp: 1, replace_after: 0}
optim: {lr: 1.0e-3, ema_decay: 0.5, clip_grad_norm: 1.0}
validation: {every: 2, images: 8, probe_images: 4, statistics_images: 32}
run: {batch_size: 8, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 2, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out, step, name):
    """Weights of a module at a checkpoint."""
    return load_file(out / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_trains_in_each_phase_what_the_paper_lists(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out)
    rows = metrics(out)
    phases = [row["phase"] for row in rows]
    assert phases == ["stage1"] * 8 + ["warmup"] * 4 + ["stage2"] * 4
    for row in rows:
        assert ("nonstationary" in row) == (row["phase"] == "stage1")
        assert ("discriminator" in row) == (row["phase"] != "warmup")
    ramp = [row["adversarial_weight"] for row in rows if row["phase"] == "stage2"]
    assert ramp == pytest.approx([0.0, 0.05, 0.1, 0.1])
    assert sum(row.get("replaced_codes", 0) for row in rows if row["phase"] == "stage1") > 0
    assert sum(row.get("replaced_codes", 0) for row in rows if row["phase"] != "stage1") == 0
    # The phase of the steps between two checkpoints decides which weights moved between them.
    for start, end, moved in [(2, 4, "edD"), (8, 10, "d"), (10, 12, "d"), (14, 16, "dD")]:
        for letter, name in zip("edD", ("encoder", "decoder", "discriminator"), strict=True):
            assert equal(weights(out, start, name), weights(out, end, name)) == (letter not in moved), (start, name)
    codes = [weights(out, step, "decoder")["quantizer.weight"] for step in (8, 10, 14, 16)]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[2], codes[3])
    assert {"val_psnr", "val_utilization", "val_perplexity", "epoch_commitment", "near_duplicates"} <= rows[-1].keys()
    assert {"drift_rms", "churn", "winner_mass", "images_per_second", "memory_gib"} <= rows[3].keys()
    assert rows[-1]["drift_rms"] == 0.0
    assert (out / "samples" / "step-16.png").exists()
    # With the encoder frozen its average is the encoder itself.
    exported = load_file(out / "tokenizer" / "diffusion_pytorch_model.safetensors")
    live = weights(out, 16, "encoder")
    assert all(torch.equal(exported[f"encoder.{name}"], value) for name, value in live.items())


def test_exported_latents_have_mean_zero_and_deviation_one(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out, "--schedule.epochs", 7)
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    from common.data import DataConfig, eval_batches

    data = DataConfig(source="synthetic", image_size=16)
    images = torch.cat([batch["image"] for batch in eval_batches(data, "train", batch_size=8, limit=32)])
    z = tokenizer.latents(images)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert float((z.var((0, 2, 3), unbiased=False)).mean().sqrt()) == pytest.approx(1, abs=1e-3)


def launch(*arguments, processes=1):
    options = f"--quiet --cpu --num_machines 1 --num_processes {processes} --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    command += map(str, arguments)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("step", [6, 10, 14])  # in each phase
def test_a_killed_run_goes_on_to_the_same_weights_to_the_bit(run_script, tiny, tmp_path, step):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script(main, "--config", tiny, "--out", whole)
    command = ["tokenizer/train.py", "--config", tiny, "--out", killed]
    process = launch(*command)
    while not (killed / "checkpoints" / f"step-{step}").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "tokenizer").exists()
    run_script(main, *command[1:])
    names = "diffusion_pytorch_model.safetensors"
    assert equal(load_file(whole / "tokenizer" / names), load_file(killed / "tokenizer" / names))
    clean = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in metrics(o)]
        for o in (whole, killed)
    ]
    assert clean[0] == clean[1]


def test_two_ranks_end_with_equal_codebooks_and_equal_one_rank_with_the_same_batch(run_script, tiny, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_script(main, "--config", tiny, "--out", alone)
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "import os, torch\n"
        "from common import launch\n"
        "from tokenizer import train\n"
        "original = train.near_duplicates\n"
        "def recorded(codebook):\n"
        "    recorded.tables.append(codebook.detach().clone())\n"
        "    return original(codebook)\n"
        "recorded.tables = []\n"
        "train.near_duplicates = recorded\n"
        "launch.run(train.main)\n"
        f"torch.save(recorded.tables, r'{tmp_path}/rank-' + os.environ['RANK'] + '.pt')\n"
    )
    process = launch(script, "--config", tiny, "--out", shared, processes=2)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    tables = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert len(tables[0]) == 8  # at each epoch's end: in every phase, after every replacement
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    assert [row["phase"] for row in metrics(alone)] == [row["phase"] for row in metrics(shared)]
    # Rounding differs between the two, and grows with every step; until the second replacement it shows nowhere.
    for name in ("replaced_codes", "dead_codes", "epoch_commitment"):
        one, two = ([row[name] for row in metrics(o)[:4] if name in row] for o in (alone, shared))
        assert one == pytest.approx(two, rel=1e-3)
    assert sum(row.get("replaced_codes", 0) for row in metrics(shared)[:4]) > 0
    for module in ("encoder", "decoder", "discriminator"):
        one, two = weights(alone, 4, module), weights(shared, 4, module)
        for name in one:
            if one[name].numel() > 1:  # the discriminator's last bias: real and fake gradients cancel to rounding
                torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-2)


def test_accumulating_micro_batches_equals_one_large_batch(run_script, tiny, tmp_path):
    results = []
    for accumulation in (1, 4):
        out = tmp_path / str(accumulation)
        run_script(
            main, "--config", tiny, "--out", out, "--run.accumulation", accumulation, "--run.checkpoint_every", 1
        )
        results.append(weights(out, 2, "decoder"))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.chanels", "8"], "did you mean model.channels"),
        (["--quantizer.codebook_size", "many"], "quantizer.codebook_size = 'many'"),
        (["--quantizer.name", "simvq"], "schedule.replace: false"),
        (["--data.image_size", "17"], "multiple of f = 2"),
        (["--run.batch_size", "9", "--run.accumulation", "2"], "must be a multiple of ranks"),
        (["--config", "absent.yaml"], "cannot read the config absent.yaml"),
    ],
)
def test_impossible_configs_end_at_once_with_the_key_and_the_remedy(run_script, tiny, tmp_path, arguments, message):
    arguments = arguments if "--config" in arguments else ["--config", tiny, *arguments]
    with pytest.raises(UsageError, match=message) as caught:
        run_script(main, *arguments, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_folder_of_another_run_is_refused(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out)
    with pytest.raises(UsageError, match=r"optim.lr: 0.001 -> 0.002"):
        run_script(main, "--config", tiny, "--out", out, "--optim.lr", 0.002)
