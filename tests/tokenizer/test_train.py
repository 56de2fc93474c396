import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import torch
from instrumented import attempts, samples
from PIL import Image
from safetensors.torch import load_file, save_file

from nsvq.common import checkpoints
from nsvq.common.config import read_yaml, validate
from nsvq.common.image_metrics import psnr, to_uint8
from nsvq.data.batches import eval_batches
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.eval import reconstruction
from nsvq.tokenizer import train
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.model import make_encoder
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.quantizers.ema import EMAQuantizer
from nsvq.tokenizer.train import main
from nsvq.tokenizer.trainer import TokenizerTrainer
from nsvq.tokenizer.upkeep import CodebookUpkeep

ROOT = Path(__file__).parents[2]
TINY = """
data: {source: synthetic, image_size: 16}
model: {channels: 8, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 4}
quantizer: {name: vq, codebook_size: 64}
nsvq: {replace: {after: 0}, freeze: {latest: 4, warmup: 2, ramp: 1}}
loss: {perceptual: none}
discriminator: {channels: 8, layers: 1}
schedule: {epoch_samples: 16, epochs: 8}
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


def test_a_compiled_run_is_the_same_run(run_script, tiny, tmp_path, monkeypatch):
    """With Dynamo alone, which captures the graphs that torch.compile makes kernels of: the same checkpoint, to the
    bit. Only what a step computes is compiled."""
    graphs, whole = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend=backend, fullgraph=True))
    epochs = ["--schedule.epochs", 3, "--nsvq.freeze.latest", 1, "--nsvq.freeze.warmup", 1]
    arguments = ["--config", tiny, "--quantizer.name", "ema", *epochs]
    run_script(main, *arguments, "--out", tmp_path / "eager")
    assert not graphs
    run_script(main, *arguments, "--out", tmp_path / "compiled", "--model.compile", "true")
    assert len(graphs) == 4  # encoder and decoder, each before and after the freeze
    for name in ("encoder", "decoder", "discriminator"):
        assert equal(weights(tmp_path / "eager", 6, name), weights(tmp_path / "compiled", 6, name))
    exported = [
        load_file(tmp_path / run / "tokenizer/diffusion_pytorch_model.safetensors") for run in ("eager", "compiled")
    ]
    assert equal(*exported)


def test_codes_are_revived_within_the_epochs_before_the_first_replacement(run_script, tiny, tmp_path, monkeypatch):
    steps, real = [], EMAQuantizer._start_anew

    def start_anew(quantizer, rows, written):
        steps.append(int(written.sum()) if quantizer.training else 0)
        real(quantizer, rows, written)

    monkeypatch.setattr(EMAQuantizer, "_start_anew", start_anew)
    arguments = ["--quantizer.name", "ema", "--nsvq.revive", 0.5, "--nsvq.replace.after", 2]
    run_script(main, "--config", tiny, "--out", tmp_path / "out", *arguments)
    # The start, a step each until the end of the third epoch (2 steps each), and that end itself, which replaces.
    assert len(steps) == 1 + 6 + 1
    assert sum(steps[1:7]) > 0


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_method_trains_by_the_same_command_to_a_tokenizer_that_loads(run_script, tiny, tmp_path, name):
    save_file({"features": torch.randn(64, 5)}, tmp_path / "features.safetensors")
    options = {
        "fsq": {"levels": [4, 4, 2, 2]},
        "fsp": {"levels": [4, 4, 2, 2]},
        "lfq": {},
        "bsq": {},
        "lc": {"features": str(tmp_path / "features.safetensors")},
    }.get(name, {"codebook_size": 64})
    config = read_yaml(tiny) | {"quantizer": {"name": name, **options}, "nsvq": None}
    if name == "ns-vq":  # its pull is what it is
        config["nsvq"] = {"pull": {"weight": 1.0, "temperature": 1.0}, "replace": None, "freeze": None}
    config["model"]["latent_channels"] = 6 if name in ("lfq", "bsq") else 4  # K = 64 has 6 bits
    config["schedule"]["epochs"] = 2
    (tmp_path / "method.yaml").write_text(json.dumps(config))
    keep = [] if name == "vp" else ["--export_every", 4]  # vp has codes at the end alone
    run_script(main, "--config", tmp_path / "method.yaml", "--out", tmp_path / "run", *keep)
    if keep:
        kept = load_file(tmp_path / "run" / "tokenizers" / "step-4" / "diffusion_pytorch_model.safetensors")
        assert equal(kept, exported(tmp_path / "run"))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    images = next(iter(eval_batches(validate(TrainConfig, config).data, "test", batch_size=8, limit=8)))["image"]
    codes = tokenizer.encode(images)
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codebook_size == 64
    decibels = psnr(to_uint8(tokenizer.decode(codes)), to_uint8(images)).mean().item()
    if name != "vp":  # it perturbs in validation, and quantizes once it is exported
        assert decibels == pytest.approx(metrics(tmp_path / "run")[-1]["val_psnr"], abs=0.02)


def test_earlier_tokenizers_are_kept_and_the_rfid_on_the_way_is_that_of_the_evaluation(
    run_script, tiny, tiny_extractor, references, tmp_path
):
    out, plain, result = tmp_path / "out", tmp_path / "plain", tmp_path / "result.json"
    options = ["--export_every", 4, "--validation.features", tiny_extractor]
    run_script(main, "--config", tiny, "--out", out, "--schedule.epochs", 7, *options)
    for step in (4, 8, 12):
        kept = load_file(out / "tokenizers" / f"step-{step}" / "diffusion_pytorch_model.safetensors")
        averages = state(out, step)["ema"]["shadow_params"]
        assert torch.equal(kept["encoder.conv_in.weight"], averages[0])
        trained = weights(out, step, "decoder")["decoder.conv_out.weight"]
        assert not torch.equal(kept["decoder.conv_out.weight"], trained)
    run_script(main, "--config", tiny, "--out", plain, "--schedule.epochs", 7)
    assert equal(exported(plain), exported(out))
    rows = clean(out)
    measured = {i: row.pop("val_rfd_tiny") for i, row in enumerate(rows, 1) if "val_rfd_tiny" in row}
    assert rows == clean(plain)
    assert list(measured) == [4, 8, 12, 14]
    arguments = ["--tokenizer", out / "tokenizer", "--data", "synthetic", "--limit", 8, "--lpips", "none"]
    run_script(reconstruction.main, *arguments, "--features", tiny_extractor, "--cache", "null", "--output", result)
    found = json.loads(result.read_text())["metrics"]["rfd_tiny"]
    assert measured[14] == pytest.approx(found, rel=1e-3)


def test_exported_latents_have_mean_zero_and_deviation_one(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out, "--schedule.epochs", 7)
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
    from nsvq.data.batches import eval_batches
    from nsvq.data.config import DataConfig

    data = DataConfig(source="synthetic", image_size=16)
    images = torch.cat([batch["image"] for batch in eval_batches(data, "train", batch_size=8, limit=32)])
    z = tokenizer.latents(images)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert float((z.var((0, 2, 3), unbiased=False)).mean().sqrt()) == pytest.approx(1, abs=1e-3)


def clean(out):
    """Lines of metrics without what depends on the machine."""
    return [{k: row[k] for k in row if k not in ("images_per_second", "memory_gib")} for row in metrics(out)]


def unvalidated(out):
    return [{k: row[k] for k in row if not k.startswith("val_")} for row in clean(out)]


def tensors(state):
    """Those of a checkpoint's state, in their order."""
    if torch.is_tensor(state):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


def exported(out):
    return load_file(out / "tokenizer" / "diffusion_pytorch_model.safetensors")


def state(out, step):
    return torch.load(out / "checkpoints" / f"step-{step}" / "state.pt")


def check_early_rows(one, two):
    """Two runs take the same decisions from equal losses, until the second replacement has made rounding grow. Only the
    generator's GAN loss sees it at once: to the discriminator's last bias, where the gradients of real and fake images
    cancel, Adam adds lr times the sign of rounding."""
    losses = ("loss", "l1", "codebook", "commitment", "nonstationary", "discriminator", "grad_norm", "epoch_commitment")
    for a, b in zip(metrics(one)[:4], metrics(two)[:4], strict=True):
        for name in ("replaced_codes", "dead_codes", "utilization"):
            assert a.get(name) == b.get(name), name
        assert {k: a[k] for k in losses if k in a} == pytest.approx({k: b[k] for k in losses if k in b}, rel=3e-3)
    assert sum(row.get("replaced_codes", 0) for row in metrics(one)[:4]) > 0


# Epochs of 20 samples end within batches of 8; with 8 epochs: stage1 to sample 80, warmup to 120, stage2 to 160.
UNEVEN = ["--schedule.epoch_samples", 20, "--run.accumulation", 2, "--run.log_every", 3, "--run.checkpoint_every", 7]


def test_a_run_that_signals_stop_in_each_phase_ends_with_the_same_weights_to_the_bit(run_instrumented, tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_instrumented(train, "--config", tiny, "--out", whole, *UNEVEN, record=tmp_path / "whole-record")
    command = ["--config", tiny, "--out", parts, *UNEVEN]
    for position, workers in ((44, 0), (92, 1), (133, 0)):  # in the first or second micro-batch of a step
        with pytest.raises(Stopped, match=f"SIGTERM at step {position // 8 + 1}; the same command") as stopped:
            run_instrumented(
                train, *command, "--run.workers", workers, record=tmp_path / "parts-record", signal_at=position
            )
        assert stopped.value.exit_code == 143
        assert (parts / "stopped").exists()
        assert not (parts / "tokenizer").exists()
    run_instrumented(train, *command, record=tmp_path / "parts-record")
    assert not (parts / "stopped").exists()
    assert {row["phase"] for row in metrics(whole)} == {"stage1", "warmup", "stage2"}
    assert equal(exported(whole), exported(parts))
    assert clean(whole) == clean(parts)
    assert samples(tmp_path / "whole-record") == samples(tmp_path / "parts-record")
    # The first look at the data is for the start of the codebook.
    assert [first for first, _ in attempts(tmp_path / "parts-record")] == [
        0,
        0,
        48,
        96,
        136,
    ]


def test_a_run_whose_launcher_is_stopped_writes_a_checkpoint_and_goes_on(run_script, tiny, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_script(main, "--config", tiny, "--out", whole)
    options = "--quiet --cpu --num_machines 1 --num_processes 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    command += ["tokenizer/train.py", "--config", str(tiny), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints" / "step-2").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.terminate()
    assert launcher.wait() == -signal.SIGTERM
    end = time.monotonic() + 60
    while not (out / "stopped").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    with open(out / ".lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # until the trainer is gone
    step = int(re.search(r"at step (\d+)", (out / "stopped").read_text())[1])
    assert (out / "checkpoints" / f"step-{step}" / "manifest.json").exists()
    run_script(main, "--config", tiny, "--out", out)
    assert equal(exported(whole), exported(out))
    assert unvalidated(whole) == unvalidated(out)  # the signal may have come in a validation


def test_a_batch_of_bad_images_alone_changes_no_validation(run_script, tiny, tmp_path, monkeypatch):
    run_script(main, "--config", tiny, "--out", tmp_path / "whole")

    def batches(*arguments, **how):
        for batch in eval_batches(*arguments, **how):
            yield batch
            yield batch | {"image": batch["image"][:0], "label": batch["label"][:0], "bad": ["x"]}

    monkeypatch.setattr("nsvq.tokenizer.trainer.eval_batches", batches)
    run_script(main, "--config", tiny, "--out", tmp_path / "bad")
    validated = [
        [{k: v for k, v in row.items() if k.startswith("val_")} for row in metrics(tmp_path / out)]
        for out in ("whole", "bad")
    ]
    assert validated[0] == validated[1]
    assert any(validated[0])


def test_a_signal_in_a_validation_leaves_its_numbers_out_and_nothing_else(
    run_script, tiny, tmp_path, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["--config", tiny, "--run.checkpoint_every", 100, "--validation.images", 24, "--out"]
    run_script(main, *command, whole)
    read = []

    def batches(*arguments, **how):
        for batch in eval_batches(*arguments, **how):
            read.append(len(batch["image"]))
            if len(read) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("nsvq.tokenizer.trainer.eval_batches", batches)
        with pytest.raises(Stopped, match="SIGTERM at step 5"):  # the next one agrees on it, over all ranks
            run_script(main, *command, parts)
    assert len(read) == 1
    assert "no validation here" in capsys.readouterr().err
    assert (parts / "checkpoints" / "step-5").exists()
    run_script(main, *command, parts)
    assert equal(exported(whole), exported(parts))
    assert unvalidated(whole) == unvalidated(parts)
    steps = lambda out: [row["step"] for row in metrics(out) if "val_psnr" in row]  # noqa: E731
    assert (steps(whole), steps(parts)) == ([4, 8, 12, 16], [8, 12, 16])


@pytest.mark.parametrize(
    "quantizer",
    [
        ["ema", "--nsvq.revive", 5, "--quantizer.codebook_size", 64],
        [
            "vp",
            "--nsvq.pull",
            "null",
            "--nsvq.replace",
            "null",
            "--quantizer.codebook_size",
            16,
            "--quantizer.push",
            0.5,
        ],
    ],
    ids=lambda words: words[0],
)
def test_micro_batches_that_were_tried_leave_no_trace_in_a_run(run_instrumented, tiny, tmp_path, quantizer):
    command = [
        "--config",
        tiny,
        "--nsvq.freeze",
        "null",
        "--schedule.epochs",
        3,
        "--quantizer.name",
        *quantizer,
        "--out",
    ]
    how = {"record": tmp_path / "record"}
    run_instrumented(train, *command, tmp_path / "explicit", "--run.accumulation", 4, **how)
    run_instrumented(train, *command, tmp_path / "auto", **how, fits=[2])
    assert clean(tmp_path / "explicit") == clean(tmp_path / "auto")
    assert equal(exported(tmp_path / "explicit"), exported(tmp_path / "auto"))
    explicit, auto = (state(tmp_path / name, 6) for name in ("explicit", "auto"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(explicit), tensors(auto), strict=True))


def test_ranks_agree_on_micro_batches_that_fit_one_of_them_alone(run_two_ranks, tiny, tmp_path):
    """vp looks at all ranks in its forward, where a rank would wait for one that ran out of memory."""
    method = ["--quantizer.name", "vp", "--nsvq.pull", "null", "--nsvq.replace", "null", "--nsvq.freeze", "null"]
    method += ["--quantizer.codebook_size", 16, "--schedule.epochs", 2]
    command = ["--config", tiny, *method, "--out", tmp_path / "out"]
    code, error = run_two_ranks("tokenizer", *command, record=tmp_path / "record", fits=[4, 2])
    assert code == 0, error
    assert json.loads((tmp_path / "out" / "micro_batch.json").read_text())["accumulation"] == 2


def test_each_epoch_is_validated_before_codes_are_replaced_and_the_last_replaces_none(
    run_script, tiny, tmp_path, monkeypatch
):
    events = []
    for owner, name in ((TokenizerTrainer, "validate"), (CodebookUpkeep, "replace")):
        real = getattr(owner, name)
        recorded = lambda self, *a, real=real, name=name: (result := real(self, *a), events.append((name, result)))[0]  # noqa: E731
        monkeypatch.setattr(owner, name, recorded)
    arguments = ["--nsvq.freeze", "null", "--nsvq.replace.after", 0, "--validation.every", 1, "--schedule.epochs", 4]
    arguments += ["--quantizer.codebook_size", 256]
    run_script(main, "--config", tiny, "--out", tmp_path / "out", *arguments)
    assert [name for name, _ in events] == ["validate", "replace"] * 3 + ["replace", "validate"]
    replaced = [count for name, count in events if name == "replace"]
    assert sum(replaced) > 0
    assert replaced[-1] == 0


def test_two_ranks_are_one_rank_of_the_double_batch_also_from_two_to_one_and_back(
    run_instrumented, run_two_ranks, tiny, tiny_extractor, references, tmp_path
):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    arguments = ["--config", tiny, "--validation.features", tiny_extractor, "--export_every", 4, "--out"]
    run_instrumented(train, *arguments, alone, record=tmp_path / "alone-record", nan_at=[29])
    how = {"record": tmp_path / "shared-record", "nan_at": [29]}  # of the second rank, in step 4
    code, error = run_two_ranks("tokenizer", *arguments, shared, **how, signal_at=44)  # the second rank, in step 6
    assert "SIGTERM at step 6" in error
    assert code != 0
    with pytest.raises(Stopped, match="at step 10"):
        run_instrumented(train, *arguments, shared, **how, signal_at=72)
    code, error = run_two_ranks("tokenizer", *arguments, shared, **how)
    assert code == 0, error
    assert samples(tmp_path / "alone-record") == samples(tmp_path / "shared-record")
    for name in ("phase", "samples_seen", "skipped_steps", "bad_images", "adversarial_weight"):
        assert [row[name] for row in metrics(alone)] == [row[name] for row in metrics(shared)], name
    assert metrics(shared)[-1]["skipped_steps"] == 1
    check_early_rows(alone, shared)
    one, two = (metrics(out)[3]["val_rfd_tiny"] for out in (alone, shared))
    assert one == pytest.approx(two, rel=1e-2)
    kept = Path("tokenizers", "step-4", "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(load_file(alone / kept), load_file(shared / kept), atol=1e-3, rtol=1e-2)
    for module in ("encoder", "decoder", "discriminator"):
        one, two = weights(alone, 4, module), weights(shared, 4, module)
        for name in one:
            if one[name].numel() > 1:  # the discriminator's last bias: real and fake gradients cancel to rounding
                torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-2)


def test_consolidation_leaves_each_code_at_the_mean_of_its_latents_when_the_encoder_freezes(run_script, tiny, tmp_path):
    """The codes at the freeze are a fixed point of Lloyd's iteration on the frozen encoder's latents."""
    out = tmp_path / "out"
    arguments = ["--nsvq.freeze.consolidate", 500, "--nsvq.freeze.consolidate_images", 64, "--data.image_size", 16]
    run_script(main, "--config", tiny, "--out", out, *arguments)
    codes = {step: weights(out, step, "decoder")["quantizer.weight"] for step in (6, 8)}
    config = validate(TrainConfig, read_yaml(out / "config.yaml")["config"])
    encoder = make_encoder(config.model).eval()
    encoder.load_state_dict(weights(out, 8, "encoder"))
    images = torch.cat([b["image"] for b in eval_batches(config.data, "train", limit=64, batch_size=8)])
    with torch.no_grad():
        z = encoder(images).permute(0, 2, 3, 1).flatten(0, 2)

    def error(codes):
        return float(torch.cdist(z.double(), codes.double()).square().min(1).values.mean())

    nearest = torch.cdist(z.double(), codes[8].double()).argmin(1)
    means = torch.stack([z[nearest == j].mean(0) if (nearest == j).any() else codes[8][j] for j in range(64)])
    torch.testing.assert_close(codes[8], means, atol=2e-4, rtol=1e-4)
    assert error(codes[8]) < 0.9 * error(codes[6])


def test_accumulating_micro_batches_equals_one_large_batch(run_script, tiny, tmp_path):
    for accumulation in (1, 4):
        run_script(main, "--config", tiny, "--out", tmp_path / str(accumulation), "--run.accumulation", accumulation)
    assert [row["phase"] for row in metrics(tmp_path / "1")] == [row["phase"] for row in metrics(tmp_path / "4")]
    check_early_rows(tmp_path / "1", tmp_path / "4")
    for module in ("encoder", "decoder"):
        a, b = (weights(tmp_path / name, 2, module) for name in "14")
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)


def test_a_decay_of_null_is_that_of_all_tokens_of_a_step_whatever_splits_it(
    run_script, run_two_ranks, tiny, tmp_path, capsys
):
    """Of 8 images of 64 tokens at K = 256; what the averages' counts add up to shows decay and tokens as they were."""
    command = ["--config", tiny, "--quantizer.name", "ema", "--quantizer.codebook_size", 256, "--nsvq", "null"]
    command += ["--schedule.epochs", 1, "--quantizer.decay"]
    for accumulation in (1, 4):
        run_script(main, *command, "null", "--run.accumulation", accumulation, "--out", tmp_path / str(accumulation))
        said = "codes: decay 0.92, a code of mean use remembers 25 tokens (512 a step, K = 256)"
        assert said in capsys.readouterr().out
    code, error = run_two_ranks("tokenizer", *command, "null", "--out", tmp_path / "ranks", record=tmp_path / "record")
    assert code == 0, error
    for name in ("1", "4", "ranks"):
        total = 256 * (1 - 0.92)
        for _ in range(2):
            total = 0.92 * total + (1 - 0.92) * 512
        assert float(weights(tmp_path / name, 2, "decoder")["quantizer.counts"].sum()) == pytest.approx(total)
        assert read_yaml(tmp_path / name / "config.yaml")["config"]["quantizer"]["decay"] == pytest.approx(0.92)
    number = read_yaml(tmp_path / "1" / "config.yaml")["config"]["quantizer"]["decay"]
    run_script(main, *command, number, "--out", tmp_path / "1", "--run.accumulation", 1)  # the same run
    run_script(main, *command, 0.5, "--out", tmp_path / "chosen")
    assert "codes: decay 0.5, a code of mean use remembers 4 tokens" in capsys.readouterr().out


def test_a_batch_that_is_not_a_number_changes_nothing_but_the_count_of_skipped_steps(run_instrumented, tiny, tmp_path):
    out, in_step_3 = tmp_path / "out", [22]  # in its second micro-batch
    run_instrumented(
        train,
        "--config",
        tiny,
        "--out",
        out,
        "--run.accumulation",
        2,
        "--run.checkpoint_every",
        1,
        record=tmp_path / "record",
        nan_at=in_step_3,
    )
    for module in ("encoder", "decoder", "discriminator"):
        assert equal(weights(out, 2, module), weights(out, 3, module))
        assert not equal(weights(out, 3, module), weights(out, 4, module))
    before, after = state(out, 2), state(out, 3)
    for part in ("optimizers", "ema", "schedule"):
        assert soak.equal(before[part], after[part]), part
    assert after["epoch_usage"]["counts"].sum() == 0  # step 2 ended an epoch
    assert [row["skipped_steps"] for row in metrics(out)][:4] == [0, 0, 1, 1]
    assert "loss" not in metrics(out)[2]
    assert all(math.isfinite(v) for row in metrics(out) for v in row.values() if isinstance(v, float))


def test_many_such_batches_in_a_row_end_the_run_with_the_ids_and_a_dump(run_instrumented, tiny, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to step 5") as error:
        run_instrumented(
            train,
            "--config",
            tiny,
            "--out",
            out,
            "--run.skip_limit",
            3,
            "--run.checkpoint_every",
            1,
            record=tmp_path / "record",
            nan_at=[16, 24, 32],
        )
    ids = [id for position, id in samples(tmp_path / "record").items() if 32 <= position < 40]
    assert ", ".join(ids) in str(error.value)
    assert (out / "checkpoints" / "step-4").exists()
    assert not (out / "checkpoints" / "step-5").exists()
    (batch,) = torch.load(out / "failed" / "step-5-batches-0.pt", weights_only=True)
    assert batch["id"] == ids
    assert batch["image"].isnan().any()
    dumped, _ = checkpoints.read(out / "failed" / "step-5")
    assert equal(dumped["encoder"], weights(out, 4, "encoder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.chanels", "8"], "did you mean model.channels"),
        (["--quantizer.codebook_size", "many"], "quantizer.codebook_size = 'many'"),
        (["--quantizer.name", "simvq"], "simvq has no free codes to replace; set nsvq.replace: null"),
        (["--quantizer.name", "ibq"], "the NS loss pulls no codes of ibq; set nsvq.pull: null"),
        (["--quantizer.name", "simvq", "--nsvq.replace", "null", "--nsvq.revive", "5"], "set nsvq.revive: null"),
        (["--quantizer.name", "ns-vq", "--nsvq.pull.relative_to", "own"], "ns-vq has a temperature of its own"),
        (["--nsvq.pull.relative", "true"], "nsvq.pull.relative: it is now nsvq.pull.relative_to .mean for true"),
        (["--quantizer.name", "vp", "--nsvq", "null", "--export_every", "4"], "vp finds its codes after the last step"),
        (["--nsvq.freeze.decay", "0.999"], "vq has no decay; set nsvq.freeze.decay: null"),
        (["--quantizer.name", "fc_l2", "--nsvq.freeze.consolidate", "9"], "set nsvq.freeze.consolidate: 0"),
        (
            ["--schedule.epochs", "6"],
            "latest \\+ warmup leaves no stage2 in schedule.epochs = 6; .* nsvq.freeze: null",
        ),
        (["--quantizer.name", "nsvq"], "unknown quantizer.name: nsvq: it is now the section nsvq"),
        (["--loss.nonstationary_weight", "0.1"], "nonstationary_weight: it is now nsvq.pull.weight"),
        (["--schedule.freeze", "false"], "schedule.freeze: it is now nsvq.freeze"),
        (["--nsvq.freeze", "false"], "nsvq.freeze = False: it must be a section"),
        (["--quantizer.decay", "0.9"], "quantizer.decay is a key of another choice"),
        (["--data.image_size", "17"], "multiple of f = 2"),
        (["--schedule.epoch_samples", "7"], "an epoch of 7 images is shorter than run.batch_size = 8"),
        (["--run.batch_size", "9", "--run.accumulation", "2"], "must be a multiple of ranks"),
        (["--config", "absent.yaml"], "cannot read the config absent.yaml"),
    ],
)
def test_impossible_configs_end_at_once_with_the_key_and_the_remedy(run_script, tiny, tmp_path, arguments, message):
    arguments = arguments if "--config" in arguments else ["--config", tiny, *arguments]
    with pytest.raises(UsageError, match=message) as caught:
        run_script(main, *arguments, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_codes_that_too_few_images_cannot_give_at_the_end_are_refused_at_the_start(run_script, tiny, tmp_path):
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    vp = ["--config", tiny, "--nsvq", "null", "--data", tmp_path, "--data.holdout", "0.2"]
    vp += ["--quantizer.name", "vp", "--quantizer.codebook_size", "1024"]
    with pytest.raises(UsageError, match=r"1024 codes cannot be found among 640 tokens of 10 images: set a smaller"):
        run_script(main, *vp, "--out", tmp_path / "out")


def test_the_folder_of_another_run_is_refused(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out)
    with pytest.raises(UsageError, match=r"optim.lr: 0.001 -> 0.002"):
        run_script(main, "--config", tiny, "--out", out, "--optim.lr", 0.002)
