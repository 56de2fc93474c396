"""Runs with a logit-perceptual loss, alignment and latent perturbation, all at once."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nsvq.common.config import read_yaml
from nsvq.errors import Stopped, UsageError
from nsvq.tokenizer import train
from nsvq.tokenizer.train import main

TINY = """
data: {source: synthetic, image_size: 16}
model: {channels: 8, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 4}
quantizer: {name: vq, codebook_size: 64}
nsvq: {replace: null, freeze: {latest: 3, warmup: 1, ramp: 1}}
loss: {perceptual: none}
discriminator: {channels: 8, layers: 1}
schedule: {epoch_samples: 16, epochs: 5}
optim: {lr: 1.0e-3, ema_decay: 0.5, clip_grad_norm: 1.0}
validation: {every: 2, images: 8, probe_images: 4, statistics_images: 16}
run: {batch_size: 8, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 2, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture
def options(network_file, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--config", tmp_path / "tiny.yaml", "--loss.logits.network", network_file]
    options += ["--loss.alignment.network", network_file, "--loss.alignment.layer", "stem", "--loss.alignment.width", 8]
    options += ["--perturbation.beta", 0.5, "--perturbation.delta", 9, "--perturbation.anneal_from", 1]
    return [*options, "--perturbation.anneal_to", 4]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exported(out):
    return load_file(out / "tokenizer" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_each_loss_is_there_where_it_means_something_and_only_the_head_is_saved(run_script, options, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    run_script(main, *options, "--out", out, "--loss.alignment.form", "vf")
    rows = metrics(out)
    assert {row["phase"] for row in rows} == {"stage1", "warmup", "stage2"}
    for row in rows:
        assert ("alignment" in row) == ("alignment_weight" in row) == (row["phase"] == "stage1")
        assert row["logits"] > 0
    assert [row["perturbation_alpha"] for row in rows[:8:2]] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert rows[-1]["perturbation_alpha"] == 0
    heads = [load_file(out / "checkpoints" / f"step-{step}" / "alignment.safetensors") for step in (2, 6, 10)]
    assert [tuple(tensor.shape) for tensor in heads[0].values()] == [(5, 4, 1, 1)]
    assert not equal(heads[0], heads[1])
    assert equal(heads[1], heads[2])  # nothing trains it once the encoder is frozen
    saved = [path.name for path in (out / "checkpoints" / "step-10").glob("*.safetensors")]
    assert sorted(saved) == [f"{name}.safetensors" for name in ("alignment", "decoder", "discriminator", "encoder")]
    inputs = read_yaml(out / "config.yaml")["inputs"]
    assert len(inputs["loss.logits.network"]) == len(inputs["loss.alignment.network"]) == 64
    run_script(main, *options[:2], "--out", plain)
    assert exported(out).keys() == exported(plain).keys()
    assert not equal(exported(out), exported(plain))


def test_a_run_that_stops_ends_with_the_same_weights_to_the_bit(run_instrumented, options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    how = ["--schedule.epoch_samples", 20, "--run.accumulation", 2]
    run_instrumented(train, *options, *how, "--out", whole, record=tmp_path / "record")
    with pytest.raises(Stopped):
        run_instrumented(train, *options, *how, "--out", parts, record=tmp_path / "other", signal_at=36)
    run_instrumented(train, *options, *how, "--out", parts, record=tmp_path / "other")
    assert equal(exported(whole), exported(parts))


def test_two_ranks_are_one_of_the_double_batch(run_instrumented, run_two_ranks, options, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    options += ["--loss.alignment.form", "vf"]
    run_instrumented(train, *options, "--out", alone, record=tmp_path / "a")
    code, error = run_two_ranks("tokenizer", *options, "--out", shared, record=tmp_path / "b")
    assert code == 0, error
    for a, b in zip(metrics(alone)[:4], metrics(shared)[:4], strict=True):
        for name in ("logits", "alignment", "alignment_weight", "l1", "loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=3e-3), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--quantizer.name", "lfq", "--nsvq.pull", "null"],
            "lfq has no table of codes to draw from; set perturbation",
        ),
        (["--perturbation.delta", "65"], r"perturbation\.delta = 65 must be at most the number of codes, 64"),
        (
            ["--loss.alignment.form", "vf", "--model.compile"],
            "compiled networks do not give twice; set model.compile: false",
        ),
        (["--loss.alignment.form", "vf", "--run.mixed_precision", "fp16"], r"set run\.mixed_precision: bf16"),
        (["--loss.logits.network", "resnet18"], "must be resnet50, convnext_small or a Python file"),
        (["--loss.alignment.layer", "null"], "layer is needed for a Python file"),
        (["--loss.alignment.layer", "tail"], r"the network net has no part tail; it has stem, classify"),
        (["--nsvq.freeze.latest", "0", "--init_from", "x"], r"no encoder that could be aligned; set loss\.alignment"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_remedy(run_script, options, tmp_path, arguments, message):
    if "lfq" in arguments:  # which has no codebook_size
        text = TINY.replace("quantizer: {name: vq, codebook_size: 64}\n", "")
        (tmp_path / "tiny.yaml").write_text(text)
    kept = list(options)
    for key in arguments[::2]:  # given twice is an error of its own
        if key in kept:
            at = kept.index(key)
            del kept[at : at + 2]
    with pytest.raises(UsageError, match=message) as caught:
        run_script(main, *kept, *arguments, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
