"""Each original network is rebuilt here in float64, from its paper and its tensors' names, and makes its own random
state dict on the way: `Original` draws a tensor when a layer first asks for it."""

import argparse
import re
import shlex
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DiTPipeline, VQModel
from safetensors.torch import save_file

from nsvq.diffusion.dit import DiT
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.errors import UsageError, UserError
from nsvq.eval.samples import load_pipeline
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.tokenizer.convert import main
from nsvq.tokenizer.magvit import MagvitVQModel
from nsvq.tokenizer.pretrained import Tokenizer

WIDTHS, D, Z, K = (32, 64, 64), 6, 12, 60  # levels from the image; d, z_channels, codes
IMAGE = 16


class Original(dict):
    def tensor(self, name, *shape, scale=1.0, mean=0.0):
        if name not in self:
            self[name] = mean + scale * torch.randn(shape)
        return self[name].double()

    def conv(self, name, x, out, kernel, bias=True, **options):
        fan_in = x.shape[1] * kernel**2
        weight = self.tensor(f"{name}.weight", out, x.shape[1], kernel, kernel, scale=fan_in**-0.5)
        return F.conv2d(x, weight, self.tensor(f"{name}.bias", out, scale=0.3) if bias else None, **options)

    def linear(self, name, x, out):
        weight = self.tensor(f"{name}.weight", out, x.shape[-1], scale=x.shape[-1] ** -0.5)
        return x @ weight.T + self.tensor(f"{name}.bias", out, scale=0.3)

    def norm(self, name, x):
        scale = self.tensor(f"{name}.weight", x.shape[1], scale=0.3, mean=1)
        return F.group_norm(x, 32, scale, self.tensor(f"{name}.bias", x.shape[1], scale=0.3), 1e-6)

    def block(self, name, x, out, bias=True):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out, 3, bias, padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out, 3, bias, padding=1)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1, bias))

    def attention(self, name, x):
        h, width = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")  # (B, C, N)
        weights = (torch.einsum("bci,bcj->bij", q, k) * width**-0.5).softmax(2)
        mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", mixed, width, 1)

    def table(self, name, z, center=True):
        """Codes at random latents [N, d], so that many are in use."""
        if name not in self:
            self[name] = (z[torch.randperm(len(z))[:K]] - (0 if center else z.mean(0))).float()
            self[name] *= torch.rand(K, 1) + 0.5
        return self[name].double()


def vqgan(names, attended, middle_attends=True):
    """(encoder, decoder) of VQGAN under two sets of names; `attended` levels have attention after every block."""
    if names == "taming":
        middle, down, up, block = ("block_1", "attn_1", "block_2"), "down.{}", "up.{}", "block"
    else:
        middle, down, up, block = ("0", "1", "2"), "conv_blocks.{}", "conv_blocks.{}", "res"

    def mid(o, side, h):
        h = o.block(f"{side}.mid.{middle[0]}", h, h.shape[1])
        h = o.attention(f"{side}.mid.{middle[1]}", h) if middle_attends else h
        return o.block(f"{side}.mid.{middle[2]}", h, h.shape[1])

    def level(o, name, h, width, blocks, attend):
        for i in range(blocks):
            h = o.block(f"{name}.{block}.{i}", h, width)
            h = o.attention(f"{name}.attn.{i}", h) if attend else h
        return h

    def encoder(o, x):
        h = o.conv("encoder.conv_in", x, WIDTHS[0], 3, padding=1)
        for i, width in enumerate(WIDTHS):
            name = "encoder." + down.format(i)
            h = level(o, name, h, width, 2, i in attended)
            if i < len(WIDTHS) - 1:  # a zero right and below
                h = o.conv(f"{name}.downsample.conv", F.pad(h, (0, 1, 0, 1)), width, 3, stride=2)
        h = mid(o, "encoder", h)
        h = o.conv("encoder.conv_out", F.silu(o.norm("encoder.norm_out", h)), Z, 3, padding=1)
        return o.conv("quant_conv", h, D, 1)

    def decoder(o, z_q):
        h = o.conv("post_quant_conv", z_q, Z, 1)
        h = mid(o, "decoder", o.conv("decoder.conv_in", h, WIDTHS[-1], 3, padding=1))
        for place, i in enumerate(reversed(range(len(WIDTHS)))):  # LlamaGen numbers places, taming levels
            name = "decoder." + up.format(i if names == "taming" else place)
            h = level(o, name, h, WIDTHS[i], 3, i in attended)
            if i:
                doubled = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = o.conv(f"{name}.upsample.conv", doubled, WIDTHS[i], 3, padding=1)
        return o.conv("decoder.conv_out", F.silu(o.norm("decoder.norm_out", h)), 3, 3, padding=1)

    return encoder, decoder


def magvit(adaptive):
    """(encoder, decoder) of Open-MAGVIT2, or of SimVQ, which has no adaptive norm."""

    def encoder(o, x):
        h = o.conv("encoder.conv_in", x, WIDTHS[0], 3, bias=False, padding=1)
        for i, width in enumerate(WIDTHS):
            for j in range(3):
                h = o.block(f"encoder.down.{i}.block.{j}", h, width, bias=False)
            if i < len(WIDTHS) - 1:
                h = o.conv(f"encoder.down.{i}.downsample", h, width, 3, stride=2, padding=1)
        for j in range(3):
            h = o.block(f"encoder.mid_block.{j}", h, WIDTHS[-1], bias=False)
        return o.conv("encoder.conv_out", F.silu(o.norm("encoder.norm_out", h)), D, 1)

    def decoder(o, z_q):
        h = o.conv("decoder.conv_in", z_q, WIDTHS[-1], 3, padding=1)
        for j in range(3):
            h = o.block(f"decoder.mid_block.{j}", h, WIDTHS[-1], bias=False)
        for i in reversed(range(len(WIDTHS))):
            if adaptive:
                deviation, mean = (z_q.flatten(2).var(2) + 1e-6).sqrt(), z_q.flatten(2).mean(2)
                gamma = o.linear(f"decoder.adaptive.{i}.gamma", deviation, h.shape[1])
                beta = o.linear(f"decoder.adaptive.{i}.beta", mean, h.shape[1])
                h = F.group_norm(h, 32, eps=1e-6) * gamma[:, :, None, None] + beta[:, :, None, None]
            for j in range(3):
                h = o.block(f"decoder.up.{i}.block.{j}", h, WIDTHS[i], bias=False)
            if i:
                h = o.conv(f"decoder.up.{i}.upsample.conv1", h, 4 * WIDTHS[i], 3, padding=1)
                b, c, y, x = h.shape
                h = h.view(b, 2, 2, c // 4, y, x).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * y, 2 * x)
        return o.conv("decoder.conv_out", F.silu(o.norm("decoder.norm_out", h)), 3, 3, padding=1)

    return encoder, decoder


def nearest(z, codes):
    return (z[:, None] - codes).square().sum(2).argmin(1)


# z [N, d] -> (indices [N], codes [N, d])


def quantize_taming(o, z):
    codes = o.table("quantize.embedding.weight", z)
    return (i := nearest(z, codes)), codes[i]


def quantize_gumbel(o, z):
    scores = z @ o.tensor("quantize.proj.weight", K, D, 1, 1).flatten(1).T
    i = (scores + o.tensor("quantize.proj.bias", K)).argmax(1)
    return i, o.tensor("quantize.embed.weight", K, D)[i]


def quantize_llamagen(o, z):
    o.setdefault("quantize.codebook_used", torch.zeros(65536))
    codes = F.normalize(o.table("quantize.embedding.weight", z), dim=1)
    return (i := nearest(F.normalize(z, dim=1), codes)), codes[i]


def quantize_simvq(o, z):
    base = o.tensor("quantize.embedding.weight", K, D)
    weight = o.tensor("quantize.embedding_proj.weight", D, D, scale=z.std().item() * D**-0.5)
    codes = base @ weight.T + o.tensor("quantize.embedding_proj.bias", D, scale=0.1)
    return (i := nearest(z, codes)), codes[i]


def quantize_magvit2(o, z):
    return (z > 0).long() @ 2 ** torch.arange(D), torch.where(z > 0, 1.0, -1.0).double()


def quantize_ibq(o, z):
    codes = o.table("quantize.embedding.weight", z, center=False)
    return (i := (z @ codes.T).argmax(1)), codes[i]


def quantize_lc(o, z):
    hidden = o.tensor("tok_embeddings.weight", K, 9)
    codes = o.linear("codebook_projection", hidden, D)
    return (i := nearest(z, codes)), codes[i]


def quantize_lc_mlp(o, z):
    hidden = o.linear("codebook_projection.0", o.tensor("tok_embeddings.weight", K, 9), 16)
    codes = o.linear("codebook_projection.2", hidden.clamp(min=0), D)
    return (i := nearest(z, codes)), codes[i]


def quantize_lc_ema(o, z):
    o.setdefault("cluster_size", torch.ones(K))
    codes = o.table("tok_embeddings.weight", z)
    o.setdefault("embed_avg", o["tok_embeddings.weight"].clone())
    return (i := nearest(z, codes)), codes[i]


SYSTEMS = {  # source, (encoder, decoder), lookup
    "taming": ("taming", vqgan("taming", {1}), quantize_taming),
    "ldm-f4": ("taming", vqgan("taming", set()), quantize_taming),
    "ldm-f4-noattn": ("taming", vqgan("taming", set(), False), quantize_taming),
    "ldm-f8": ("taming", vqgan("taming", {2}), quantize_taming),  # and f16
    "gumbel": ("taming", vqgan("taming", set()), quantize_gumbel),
    "llamagen": ("llamagen", vqgan("llamagen", {2}), quantize_llamagen),
    "simvq": ("simvq", magvit(False), quantize_simvq),
    "magvit2": ("magvit2", magvit(True), quantize_magvit2),
    "ibq": ("ibq", vqgan("taming", {2}), quantize_ibq),
    "lc": ("vqgan-lc", vqgan("taming", {2}), quantize_lc),
    "lc-mlp": ("vqgan-lc", vqgan("taming", {2}), quantize_lc_mlp),
    "lc-ema": ("vqgan-lc", vqgan("taming", {2}), quantize_lc_ema),
}


def originals(name, images):
    """(state dict, latents [B, d, h, w], indices [B, h, w], images) of a random tokenizer of that layout."""
    _, (encoder, decoder), quantize = SYSTEMS[name]
    o = Original()
    z = encoder(o, images)
    indices, codes = quantize(o, z.permute(0, 2, 3, 1).flatten(0, 2))
    z_q = codes.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    decoded = decoder(o, z_q)
    return dict(o), z, indices.view(len(z), *z.shape[2:]), decoded


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(4, 3, IMAGE, IMAGE, dtype=torch.float64) * 2 - 1


def state_of(name, images):
    return originals(name, images)[0]


def with_averages(state):
    """As SEED-Voken and SimVQ save it: raw weights, and the averages by names without dots. Frozen ones have none."""
    averages = {"model_ema." + name.replace(".", ""): tensor for name, tensor in state.items()}
    averages.pop("model_ema.quantizeembeddingweight", None) if "quantize.embedding_proj.weight" in state else None
    raw = {name: tensor + torch.randn_like(tensor) for name, tensor in state.items()}
    if "quantize.embedding_proj.weight" in state:
        raw["quantize.embedding.weight"] = state["quantize.embedding.weight"]
    return raw | averages | {"model_ema.decay": torch.tensor(0.999), "loss.discriminator.weight": torch.ones(2)}


def save_as_original(name, state, folder):
    """The file that the original repository writes."""
    if name == "llamagen":  # with options, raw weights and averages
        raw = {key: tensor + 1 for key, tensor in state.items()}
        torch.save({"model": raw, "ema": state, "args": argparse.Namespace(lr=1e-4)}, folder / "vq.pt")
        return folder / "vq.pt"
    if name in ("simvq", "magvit2"):
        torch.save(
            {"state_dict": with_averages(state), "epoch": 3, "callbacks": {"a": {"path": "b"}}}, folder / "vq.ckpt"
        )
        return folder / "vq.ckpt"
    if name == "ibq":
        save_file(with_averages(state), folder / "vq.safetensors")
        return folder / "vq.safetensors"
    training = {"loss.perceptual_loss.lin0.weight": torch.ones(2)}
    if name.startswith("lc"):
        training = {"discriminator.main.0.weight": torch.ones(2), "perceptual_loss.lin0.weight": torch.ones(2)}
    torch.save({"state_dict": state | training, "args": argparse.Namespace(stage=1)}, folder / "vq.pt")
    return folder / "vq.pt"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_converted_tokenizer_has_the_latents_codes_and_images_of_the_original(name, images, run_script, tmp_path):
    state, z, indices, decoded = originals(name, images)
    path = save_as_original(name, state, tmp_path)
    run_script(main, "--from", SYSTEMS[name][0], path, "--output", tmp_path / "vq", "--image_size", IMAGE)

    stock = name not in ("simvq", "magvit2")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vq").double()
    assert type(tokenizer.model) is (VQModel if stock else MagvitVQModel)
    assert tokenizer.model.config.scaling_factor == 1
    assert (tokenizer.image_size, tokenizer.downsampling) == (IMAGE, 4)

    latents = tokenizer.latents(images)
    torch.testing.assert_close(latents[:, :D], z, atol=1e-9, rtol=1e-9)
    assert not latents[:, D:].any()
    assert len(indices.unique()) > 8
    assert torch.equal(tokenizer.encode(images), indices)
    scale = decoded.abs().max().item()
    torch.testing.assert_close(tokenizer.decode(indices), decoded, atol=2e-6 * scale, rtol=0)
    torch.testing.assert_close(tokenizer.model(images).sample, decoded, atol=2e-6 * scale, rtol=0)


def test_a_pipeline_with_magvits_network_loads_in_stock_diffusers(images, run_script, tmp_path):
    save_file(state_of("magvit2", images), tmp_path / "vq.safetensors")
    run_script(main, "--from", "magvit2", tmp_path / "vq.safetensors", "--output", tmp_path / "vq")
    model = Tokenizer.from_pretrained(tmp_path / "vq").model
    dit = DiT(sample_size=4, in_channels=D, num_classes=2, depth=1, width=16, heads=2)
    save_pipeline(tmp_path / "pipeline", to_stock(dit), model, flow_scheduler(1.0), {0: "a", 1: "b"})
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert (type(stock), type(stock.vae)) == (DiTPipeline, MagvitVQModel)
    assert type(load_pipeline(str(tmp_path / "pipeline")).vae) is MagvitVQModel
    torch.testing.assert_close(stock.vae(images.float()).sample, model(images.float()).sample)


def test_llamagen_without_l2_norm_keeps_its_codes(images, run_script, tmp_path):
    state = state_of("llamagen", images)
    torch.save({"model": state}, tmp_path / "vq.pt")
    run_script(
        main, "--from", "llamagen", tmp_path / "vq.pt", "--output", tmp_path / "vq", "--codebook_l2_norm", "false"
    )
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "vq").codebook, state["quantize.embedding.weight"])


def without(name):
    return lambda state: state.pop(name)


def wide_shortcut(state):
    state["encoder.down.1.block.0.conv_shortcut.weight"] = torch.randn(64, 32, 3, 3)
    state["encoder.down.1.block.0.conv_shortcut.bias"] = state.pop("encoder.down.1.block.0.nin_shortcut.bias")
    del state["encoder.down.1.block.0.nin_shortcut.weight"]


def normalised_latents(state):
    state["quant_conv.weight"], state["quant_conv.bias"] = torch.randn(768, Z, 1, 1), torch.randn(768)


@pytest.mark.parametrize(
    ("source", "name", "change", "said"),
    [
        ("taming", "taming", without("encoder.mid.attn_1.q.bias"), "encoder.mid_block.attentions.0.to_q.bias"),
        ("taming", "taming", without("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        ("taming", "taming", without("decoder.conv_out.weight"), "decoder.conv_out.weight is missing"),
        ("taming", "taming", lambda s: s.update({"quantize.used": torch.ones(3)}), "1 tensors .* quantize.used"),
        ("taming", "taming", lambda s: s.update({"encoder.time.weight": torch.ones(3)}), "no place for encoder.time"),
        ("taming", "taming", wide_shortcut, r"down.1.block.0.conv_shortcut.weight \[64, 32, 3, 3\]"),
        ("vqgan-lc", "lc", normalised_latents, "768 channels by their length"),
        ("taming", "llamagen", lambda s: None, "no tokenizer of taming .* encoder.mid.block_1"),
        ("taming", "lc", lambda s: None, "quantize.embedding.weight is missing"),
        ("magvit2", "simvq", lambda s: None, "3 tensors .* quantize.embedding.weight"),
        ("magvit2", "magvit2", without("encoder.norm_out.bias"), "encoder.conv_norm_out.bias"),
        (
            "magvit2",
            "magvit2",
            lambda s: s.update({"encoder.conv_out.weight": torch.ones(24, 64, 1, 1)}),
            "24 channels",
        ),
    ],
)
def test_what_the_model_cannot_hold_is_named(source, name, change, said, images, run_script, tmp_path):
    state = state_of(name, images)
    change(state)
    save_file(state, tmp_path / "vq.safetensors")
    with pytest.raises(UserError, match=said):
        run_script(main, "--from", source, tmp_path / "vq.safetensors", "--output", tmp_path / "vq")
    assert not (tmp_path / "vq").exists()


def test_a_file_with_code_is_refused_and_the_command_given_makes_it_safe(images, run_script, tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state_of("taming", images), "callbacks": {Fraction: 1}}, path)
    with pytest.raises(UserError, match="would run code") as error:
        run_script(main, "--from", "taming", path, "--output", tmp_path / "vq")
    command = re.search(r"run python (.*) where", str(error.value))[1]
    subprocess.run([sys.executable, *shlex.split(command)], check=True, timeout=120)
    run_script(main, "--from", "taming", tmp_path / "last-weights.pt", "--output", tmp_path / "vq")
    Tokenizer.from_pretrained(tmp_path / "vq")


def test_wrong_arguments_end_at_once(run_script, tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for arguments, said in (
        (("taming", tmp_path / "none.ckpt"), "cannot read"),
        (("taming", tmp_path / "text.ckpt"), "text.ckpt"),
        (("vqvae", tmp_path / "text.ckpt"), "taming.*llamagen"),
        (("taming",), "--from taming last.ckpt"),
    ):
        with pytest.raises(UserError, match=said):
            run_script(main, "--from", *arguments, "--output", tmp_path / "vq")
    with pytest.raises(UsageError, match="there already"):
        run_script(main, "--from", "taming", tmp_path / "text.ckpt", "--output", tmp_path)
