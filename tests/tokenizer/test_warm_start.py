import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from nsvq.common.config import read_yaml
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.tokenizer import train
from nsvq.tokenizer.export import latent_statistics, save, to_vqmodel
from nsvq.tokenizer.magvit import MagvitVQModel
from nsvq.tokenizer.model import ModelConfig, QuantizedDecoder, make_encoder
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.train import main
from nsvq.tokenizer.upkeep import CodebookUpkeep
from nsvq.tokenizer.warm_start import warm_start

ROOT = Path(__file__).parents[2]
ATTENDING = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def stock(folder, kind=VQModel, latents=6, codes=6, **options):
    """A `VQModel` of 40 random codes as others make them: attention, biases in both 1x1 convolutions."""
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", ATTENDING[0]),
        "up_block_types": (ATTENDING[1], "UpDecoderBlock2D"),
        "norm_num_groups": 4,
        "num_vq_embeddings": 40,
        "sample_size": 16,
    } | options
    model = kind(latent_channels=latents, vq_embed_dim=codes, **options)
    for layer in (model.quant_conv, model.post_quant_conv):
        torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(folder)
    return model.eval()


MODEL = ModelConfig(
    channels=8,
    channel_multipliers=[1, 2],
    layers_per_block=1,
    latent_channels=6,
    norm_groups=4,
    mid_attention=True,
    attention_levels=[1],
)


def start(source, quantizer, config=MODEL, take_codes=True):
    """(encoder, decoder, what was taken), where only what was taken can be right."""
    encoder, decoder = make_encoder(config), QuantizedDecoder(config, quantizer)
    return encoder.eval(), decoder.eval(), warm_start(str(source), config, encoder, decoder, take_codes)


@torch.no_grad()
def test_a_stock_model_starts_a_run_with_its_codes_and_images(make, tmp_path):
    stock(tmp_path)
    encoder, decoder, taken = start(tmp_path, make("vq"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    count = sum(name.startswith(("encoder.", "decoder.")) for name in tokenizer.model.state_dict())
    assert taken.text == f"init_from {tmp_path}: {count} tensors of encoder and decoder, and 40 codes"
    assert taken.fingerprint == tokenizer.fingerprint()
    output, quantized = decoder(encoder(IMAGES))
    assert torch.equal(quantized.indices, tokenizer.encode(IMAGES))
    assert len(quantized.indices.unique()) > 1
    torch.testing.assert_close(output, tokenizer.decode(quantized.indices), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_a_tokenizer_of_ours_starts_a_run_of_its_method_where_it_ended(make, tmp_path, name):
    quantizer = make(name)
    config = MODEL.model_copy(update={"latent_channels": quantizer.dim})
    encoder, decoder = make_encoder(config).eval(), QuantizedDecoder(config, quantizer).eval()
    encoder.conv_out.bias += torch.linspace(-1, 1, quantizer.dim)  # latents with a mean
    mean, std = latent_statistics(encoder, [IMAGES], Accelerator())
    save(to_vqmodel(config, 16, encoder, decoder, mean, std), tmp_path / "tokenizer", {})
    expected, quantized = decoder(encoder(IMAGES))

    again, other, taken = start(tmp_path / "tokenizer", make(name), config)
    torch.testing.assert_close(again(IMAGES), encoder(IMAGES), atol=1e-5, rtol=1e-5)
    output = other.decoder(quantized.z_q)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # Codes come back where they are what the method learns, and not, as SimVQ's, what it makes of other weights.
    assert taken.has_codes == (name in ("vq", "ema", "ns-vq", "fc_l2", "ibq", "fsq", "fsp"))
    if taken.has_codes:
        torch.testing.assert_close(other.quantizer.codebook(), quantizer.codebook(), atol=1e-5, rtol=1e-5)
        assert torch.equal(other(again(IMAGES))[1].indices, quantized.indices)


@torch.no_grad()
def test_unit_codes_of_wide_models_are_taken_for_cosines_and_what_is_off_is_said(make, tmp_path):
    """LlamaGen's form: fewer channels of codes than the decoder reads, so that no latent holds the decoder's bias."""
    model = stock(tmp_path, latents=16)
    codes = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
    model.quantize.embedding.weight.copy_(codes)
    model.save_pretrained(tmp_path)
    encoder, decoder, taken = start(tmp_path, make("fc_l2"))
    assert taken.text.endswith("no latent holds the bias of post_quant_conv")
    torch.testing.assert_close(decoder.quantizer.codebook(), codes)
    torch.testing.assert_close(encoder(IMAGES), model.encode(IMAGES).latents, atol=1e-5, rtol=1e-5)
    z_q = torch.randn(2, 6, 8, 8)
    ours, theirs = decoder.decoder.conv_in(z_q), model.decoder.conv_in(model.post_quant_conv(z_q))
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-5)
    assert (ours - theirs).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vq", {"codebook_size": 50}, "they are 40, and here quantizer.codebook_size = 50"),
        ("ema", {"codebook_size": 50}, "they are 40, and here quantizer.codebook_size = 50"),
        ("simvq", {}, "those of simvq are not a table that may be written"),
        ("fc_l2", {}, "fc_l2 would look them up in another way"),
        ("ibq", {}, "ibq would look them up in another way"),
        ("vq", {"take_codes": False}, "init_codes is false"),
    ],
)
def test_codes_that_stay_behind_are_left_with_the_reason(make, tmp_path, name, options, reason):
    stock(tmp_path)
    take = options.pop("take_codes", True)
    quantizer = make(name, **options)
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    taken = start(tmp_path, quantizer, take_codes=take)[2]
    assert taken.text.endswith(f"no codes ({reason})")
    assert not taken.has_codes
    assert all(torch.equal(before[key], tensor) for key, tensor in quantizer.state_dict().items())


def test_another_architecture_is_refused_with_the_values_that_fit(make, tmp_path):
    stock(tmp_path)
    with pytest.raises(UsageError) as refused:
        start(tmp_path, make("vq"), ModelConfig(latent_channels=6))
    given = str(refused.value).partition(": give ")[2]
    assert given == (
        "--model.channels 8 --model.channel_multipliers 1 2 --model.layers_per_block 1 --model.norm_groups 4 "
        "--model.mid_attention true --model.attention_levels 1"
    )
    # The same widths in other words are the same.
    start(tmp_path, make("vq"), MODEL.model_copy(update={"channels": 4, "channel_multipliers": [2, 4]}))


def test_what_no_network_of_ours_has_is_refused_by_name(make, tmp_path):
    stock(tmp_path / "magvit", MagvitVQModel, adaptive_norm=False)
    with pytest.raises(UserError, match="no model of ours has the layers of a MagvitVQModel"):
        start(tmp_path / "magvit", make("vq"))
    stock(tmp_path / "norm", norm_type="spatial", block_out_channels=(32, 32))
    with pytest.raises(UserError, match="no model of ours has norm_type = spatial"):
        start(tmp_path / "norm", make("vq"))
    stock(tmp_path / "uneven", up_block_types=("UpDecoderBlock2D",) * 2)
    with pytest.raises(UserError, match="attention on other levels"):
        start(tmp_path / "uneven", make("vq"))
    model = stock(tmp_path / "gumbel")
    with torch.no_grad():
        model.post_quant_conv.weight[:, :2] = 0
    model.save_pretrained(tmp_path / "gumbel")
    with pytest.raises(UserError, match="its decoder reads other channels than its encoder writes"):
        start(tmp_path / "gumbel", make("vq"))
    file = tmp_path / "gumbel" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["encoder.conv_in.weight"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"lacks 1 tensors of its VQModel: encoder.conv_in.weight"):
        start(tmp_path / "gumbel", make("vq"))
    save_file(state | {"encoder.conv_in.weight": torch.zeros(8, 3, 5, 5)}, file)
    with pytest.raises(UserError, match=r"encoder.conv_in.weight expected shape"):
        start(tmp_path / "gumbel", make("vq"))


# Runs

TINY = """
data: {source: synthetic, image_size: 16}
model: {channels: 8, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 6, norm_groups: 4,
        mid_attention: true, attention_levels: [1]}
quantizer: {name: ema, codebook_size: 64}
nsvq: {revive: 5, replace: {after: 1}, freeze: null}
loss: {perceptual: none}
discriminator: {channels: 8, layers: 1}
schedule: {epoch_samples: 16, epochs: 6}
optim: {lr: 1.0e-3, ema_decay: 0.5, clip_grad_norm: 1.0}
validation: {every: 2, images: 8, probe_images: 4, statistics_images: 32}
run: {batch_size: 8, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 1, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture
def tiny(tmp_path):
    stock(tmp_path / "given")
    (tmp_path / "tiny.yaml").write_text(TINY + f"init_from: {tmp_path / 'given'}\n")
    return tmp_path / "tiny.yaml"


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def moved(out, start, end):
    """Which networks changed between two checkpoints."""

    def weights(step, name):
        return load_file(out / "checkpoints" / f"step-{step}" / f"{name}.safetensors")

    found = []
    for name in ("encoder", "decoder", "discriminator"):
        a, b = weights(start, name), weights(end, name)
        if any(not torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    return found


def test_the_discriminator_alone_trains_first(run_script, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--schedule.discriminator_first", 1.5, "--nsvq.replace.after", 0, "--nsvq.freeze.latest", 4]
    run_script(main, "--config", tiny, "--out", out, *options, "--nsvq.freeze.warmup", 1)
    assert "and 64 codes" not in (said := capsys.readouterr().out)
    assert "no codes (they are 40, and here quantizer.codebook_size = 64)" in said
    rows = metrics(out)
    assert [row["phase"] for row in rows] == ["discriminator"] * 3 + ["stage1"] * 5 + ["warmup"] * 2 + ["stage2"] * 2
    assert moved(out, 1, 3) == ["discriminator"]
    assert moved(out, 3, 4) == ["encoder", "decoder", "discriminator"]
    assert {"l1", "commitment", "discriminator", "discriminator_grad_norm"} <= rows[0].keys()
    assert "grad_norm" not in rows[0]
    assert next(row["replaced_codes"] for row in rows if "replaced_codes" in row) == 0  # the start stands still
    # The first epoch in which the encoder trains is the second one's half: nothing was learnt before it.
    state = torch.load(out / "checkpoints" / "step-8" / "state.pt", weights_only=True)
    assert len(state["schedule"]["commitments"]) == 3


def test_an_encoder_frozen_from_the_start_never_moves_and_the_rest_refines(run_script, tiny, tmp_path, monkeypatch):
    out, fitted, real = tmp_path / "out", [], CodebookUpkeep.consolidate

    def consolidate(upkeep, latents):
        before = upkeep.quantizer.codebook().clone()
        real(upkeep, latents)
        fitted.append(not torch.equal(before, upkeep.quantizer.codebook()))

    monkeypatch.setattr(CodebookUpkeep, "consolidate", consolidate)
    options = ["--nsvq.freeze.latest", 0, "--nsvq.freeze.warmup", 2, "--nsvq.freeze.ramp", 1]
    options += ["--nsvq.freeze.consolidate", 2, "--nsvq.freeze.consolidate_images", 32]
    run_script(main, "--config", tiny, "--out", out, *options)
    assert fitted == [True]  # before the first step
    rows = metrics(out)
    assert [row["phase"] for row in rows] == ["warmup"] * 4 + ["stage2"] * 8
    assert all(row.get("drift_rms", 0) == 0 for row in rows)
    assert moved(out, 1, 4) == ["decoder"]
    assert moved(out, 4, 12) == ["decoder", "discriminator"]
    given, kept = Tokenizer.from_pretrained(tmp_path / "given"), Tokenizer.from_pretrained(out / "tokenizer")
    a, b = (t.latents(IMAGES) / t.model.config.scaling_factor for t in (given, kept))
    torch.testing.assert_close(a - a.mean((0, 2, 3), True), b - b.mean((0, 2, 3), True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [["--schedule.discriminator_first", 1], ["--nsvq.freeze.latest", 0]])
def test_a_run_goes_on_to_the_bit_without_the_folder_that_it_started_from(
    run_script, run_instrumented, tiny, tmp_path, options
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script(main, "--config", tiny, "--out", whole, *options)
    fingerprint = Tokenizer.from_pretrained(tmp_path / "given").fingerprint()
    with pytest.raises(Stopped):
        run_instrumented(train, "--config", tiny, "--out", parts, *options, record=tmp_path / "record", signal_at=12)
    shutil.rmtree(tmp_path / "given")
    run_script(main, "--config", tiny, "--out", parts, *options)
    a, b = (load_file(out / "tokenizer" / "diffusion_pytorch_model.safetensors") for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    newest = json.loads((parts / "checkpoints" / "step-12" / "manifest.json").read_text())
    assert newest["inputs"]["init_from"] == read_yaml(parts / "config.yaml")["inputs"]["init_from"] == fingerprint


def test_averages_start_from_the_loaded_weights(run_script, tiny, tmp_path):
    out = tmp_path / "out"
    run_script(main, "--config", tiny, "--out", out, "--optim.lr", 1e-12, "--quantizer.codebook_size", 40)
    given, kept = Tokenizer.from_pretrained(tmp_path / "given"), Tokenizer.from_pretrained(out / "tokenizer")
    torch.testing.assert_close(kept.model.decoder.conv_out.weight, given.model.decoder.conv_out.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init_from", "null", "--nsvq.freeze.latest", 0], "freezes an encoder that never trained; give init_from"),
        (["--init_from", "null", "--schedule.discriminator_first", 1], "= 1 needs init_from, a GAN"),
        (["--schedule.discriminator_first", 1, "--loss.adversarial_weight", 0], "= 1 needs init_from, a GAN"),
        (["--schedule.discriminator_first", 2, "--nsvq.freeze.latest", 2], "= 2 leaves the encoder no epoch"),
        (["--schedule.discriminator_first", 6], "= 6 leaves the encoder no epoch"),
        (["--init_from", "no/where/at/all"], "no tokenizer at no/where/at/all"),
        (["--model.layers_per_block", 2], "give --model.layers_per_block 1"),
        (["--model.attention_levels", 2], r"attention_levels = \[2\]: the levels of channel_multipliers are 0 to 1"),
    ],
)
def test_impossible_starts_end_at_once_and_leave_nothing(run_script, tiny, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run_script(main, "--config", tiny, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_another_quantizer_is_where_a_new_training_ends_in_a_third_of_its_steps(run_script, tmp_path):
    """Issue 23, done-when 0: from a finished `vq` to `ema` with twice the codes."""
    config = read_yaml(ROOT / "configs/quickstart/nsvq.yaml")
    config["data"]["image_size"] = 16
    config["model"] |= {"channels": 8, "channel_multipliers": [1, 2]}
    config["quantizer"]["codebook_size"] = 64
    config["schedule"]["epoch_samples"] = 160
    config["optim"]["ema_decay"] = 0.95
    config["validation"] |= {"every": 100, "images": 64, "statistics_images": 64}
    (tmp_path / "nsvq.yaml").write_text(json.dumps(config))
    shutil.copy(ROOT / "configs/quickstart/warm.yaml", tmp_path)
    other = ["--quantizer.name", "ema", "--quantizer.codebook_size", "128", "--nsvq.revive", "5"]
    fast = ["--run.mixed_precision", "no"]
    run_script(main, "--config", tmp_path / "nsvq.yaml", "--out", tmp_path / "old", *fast)
    run_script(main, "--config", tmp_path / "nsvq.yaml", "--out", tmp_path / "new", *fast, *other)
    source = ["--init_from", tmp_path / "old" / "tokenizer"]
    run_script(main, "--config", tmp_path / "warm.yaml", "--out", tmp_path / "warm", *fast, *other, *source)
    new, warm = metrics(tmp_path / "new")[-1], metrics(tmp_path / "warm")[-1]
    assert warm["step"] <= new["step"] / 3
    assert warm["utilization"] >= 0.99
    assert warm["val_psnr"] >= new["val_psnr"]
