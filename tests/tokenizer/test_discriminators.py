"""Discriminators, DiffAugment, LeCAM and the adaptive weight against formulas written out here, and in training."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from nsvq.common.config import validate
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.tokenizer import train
from nsvq.tokenizer.adaptive_weight import AdaptiveWeight
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.diffaugment import diffaugment, uniform_numbers, window
from nsvq.tokenizer.dino_discriminator import DinoHeads, ViTFeatures, load_vit
from nsvq.tokenizer.discriminator import make_discriminator
from nsvq.tokenizer.lecam import LeCam
from nsvq.tokenizer.plus_discriminator import BlurPool, PlusDiscriminator

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder of a tiny ViT with random weights."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(intermediate_size=32, **SMALL)).save_pretrained(folder)
    return folder


def make(name, vit):
    """(features, discriminator) of a form in float64, at a small size."""
    options = {"patchgan": {"channels": 8, "layers": 2}, "plus": {"channels": 8, "stages": 2}}
    options["dino"] = {"vit": str(vit), "depths": [0, 2]}
    config = validate(TrainConfig, {"discriminator": {"name": name, **options[name]}}).discriminator
    return tuple(module.double() for module in make_discriminator(config, seed=3))


# Networks


@pytest.mark.parametrize("name", ["patchgan", "plus", "dino"])
def test_an_images_logits_depend_on_its_position_in_the_run_alone(name, vit):
    features, discriminator = make(name, vit)
    images, positions = torch.rand(5, 3, 36, 36, dtype=torch.float64) * 2 - 1, [7, 8, 9, 20, 21]
    together = discriminator(features(images, positions))
    alone = [discriminator(features(x[None], [p])) for x, p in zip(images, positions, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    if name == "dino":  # which augments
        assert not torch.allclose(together, discriminator(features(images, [1, 2, 3, 4, 5])))


def test_patchgan_takes_widths_that_32_groups_do_not_divide():
    _, discriminator = make_discriminator(
        validate(TrainConfig, {"discriminator": {"channels": 20}}).discriminator, seed=0
    )
    assert discriminator(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_blur_pool_is_the_convolution_with_the_outer_product_of_one_three_three_one():
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    dense = torch.einsum("ij,kl->ijkl", torch.eye(3, dtype=torch.float64), kernel.outer(kernel) / 64)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1)), dense)[:, :, ::2, ::2]
    torch.testing.assert_close(BlurPool().double()(x), blurred)


def test_vqgan_plus_is_its_layers_written_out():
    network, images = PlusDiscriminator(8, 2).double(), torch.randn(2, 3, 80, 80, dtype=torch.float64)
    weights = list(network.parameters())
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    x = F.leaky_relu(F.conv2d(images, weights[0], weights[1], padding=2), 0.1)
    for w, b, scale, shift in (weights[2:6], weights[6:10]):
        x = F.conv2d(x, w, b, padding=1)
        kernel = row.outer(row).expand(x.shape[1], 1, 4, 4)
        x = F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
        x = F.leaky_relu(F.group_norm(x, x.shape[1], scale, shift), 0.1)
    assert x.shape == (2, 16, 20, 20)
    x = F.leaky_relu(F.conv2d(F.adaptive_max_pool2d(x, 16), weights[10], weights[11]), 0.1)
    torch.testing.assert_close(network(images), F.conv2d(x, weights[12], weights[13], padding=2))
    assert [w.shape[-1] for w in weights if w.ndim == 4] == [5, 3, 3, 1, 5]
    assert network(images[..., :32, :32]).shape == (2, 1, 8, 8)  # no larger than what is there


def test_features_are_what_transformers_says_of_the_normalised_image_and_gradients_pass(vit):
    model = load_vit(str(vit)).double()
    features = ViTFeatures(model, [-1, 0, 2], augment=0.0, cutout=0.0, seed=0).double()
    images = (torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1).requires_grad_()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hidden = model((images / 2 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    found = features(images, [0, 1])
    for x, depth in zip(found, (-1, 0, 2), strict=True):
        expected = hidden[depth + 1][:, 1:] + hidden[depth + 1][:, :1]
        torch.testing.assert_close(x, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    sum(x.square().sum() for x in found).backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in features.parameters())


def test_images_of_other_sizes_come_to_the_vit_by_a_window_or_bilinear(vit, monkeypatch):
    features = ViTFeatures(load_vit(str(vit)), [0], augment=0.0, cutout=0.0, seed=0)
    seen = []
    mean, std = features.normalize.mean, features.normalize.std
    monkeypatch.setattr(features.vit, "forward", lambda x: seen.append((x * std + mean) * 2 - 1))
    large, small = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 16, 16)
    features(large, [4, 5])
    for x, image, (v, h) in zip(seen[0], large, uniform_numbers(0, [4, 5])[:, -2:].tolist(), strict=True):
        torch.testing.assert_close(x, image[:, int(v * 9) : int(v * 9) + 32, int(h * 9) : int(h * 9) + 32])
    features(small, [4, 5])
    torch.testing.assert_close(seen[1], F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False))


def test_heads_are_their_layers_written_out_with_weights_over_the_largest_singular_value():
    heads, x = DinoHeads(16, 2, kernel=5).double(), torch.randn(3, 16, 9, dtype=torch.float64)
    for _ in range(300):
        heads.begin_step()

    def conv(layer, x):
        weight = layer.parametrizations.weight.original
        weight = weight / torch.linalg.svdvals(weight.flatten(1))[0]
        side = weight.shape[2] // 2
        return F.conv1d(torch.cat([x[..., x.shape[2] - side :], x, x[..., :side]], 2), weight, layer.bias)

    def block(layers, x):
        return F.leaky_relu(F.group_norm(conv(layers[0], x), 16, layers[1].weight, layers[1].bias), 0.2)

    logits = []
    for head in heads.heads:
        y = block(head.point, x)
        logits.append(conv(head.logit, (y + block(head.wide, y)) / 2**0.5))
    torch.testing.assert_close(heads([x, x]), torch.cat(logits, 1), atol=1e-8, rtol=1e-6)


def test_spectral_norms_iterate_once_a_step_and_not_in_forward_passes():
    heads, x = DinoHeads(16, 1), torch.randn(2, 16, 9)
    layer = heads.heads[0].wide[0].parametrizations.weight
    before, v = heads.state_dict()["heads.0.wide.0.parametrizations.weight.0._u"].clone(), layer[0]._v.clone()
    heads([x])
    assert torch.equal(layer[0]._u, before)
    heads.begin_step()
    matrix = layer.original.detach().flatten(1)
    torch.testing.assert_close(layer[0]._u, F.normalize(matrix @ v, dim=0), atol=1e-5, rtol=1e-4)
    assert not torch.equal(layer[0]._u, before)


def test_what_is_no_vit_is_refused_in_a_line(vit, tmp_path):
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    model = ViTModel(ViTConfig(intermediate_size=32, **SMALL))
    kept = {name: value for name, value in model.state_dict().items() if "layernorm.weight" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=kept)
    for folder, message in [("bert", "it must be a ViT"), ("absent", "no vision model at"), ("part", "lacks weights")]:
        with pytest.raises(UserError, match=message) as caught:
            load_vit(str(tmp_path / folder))
        assert "\n" not in str(caught.value)
    config = validate(TrainConfig, {"discriminator": {"name": "dino", "vit": str(vit)}}).discriminator
    with pytest.raises(UserError, match="has layers 0 to 2"):
        make_discriminator(config, seed=0)


def test_dinov2_with_its_own_layout_serves_too(tmp_path):
    Dinov2Model(Dinov2Config(mlp_ratio=2, **SMALL)).save_pretrained(tmp_path / "vit")
    features = ViTFeatures(load_vit(str(tmp_path / "vit")), [-1, 0, 2], augment=1.0, cutout=0.2, seed=0)
    assert [x.shape for x in features(torch.rand(2, 3, 32, 32), [0, 1])] == [(2, 16, 16)] * 3


# DiffAugment


def augmented(image, u, cutout):
    """One image [3, S, S] by loops over its pixels, in NumPy."""
    size, u = image.shape[1], u.tolist()
    x = image.double().numpy() + u[0] - 0.5
    grey = x.mean(0)
    x = grey + 2 * u[1] * (x - grey)
    x = x.mean() + (u[2] + 0.5) * (x - x.mean())
    most, side = round(size / 8), round(size * cutout)
    shift = [int(n * (2 * most + 1)) - most for n in u[3:5]]
    corner = [int(n * (size + 1 - side % 2)) - side // 2 for n in u[5:7]]
    out = np.zeros_like(x)
    for row in range(size):
        for column in range(size):
            r, c = row + shift[0], column + shift[1]
            hole = corner[0] <= row < corner[0] + side and corner[1] <= column < corner[1] + side
            if 0 <= r < size and 0 <= c < size and not hole:
                out[:, row, column] = x[:, r, c]
    return torch.from_numpy(out)


@pytest.mark.parametrize("cutout", [0.2, 0.5])
def test_diffaugment_is_its_formula_pixel_by_pixel(cutout):
    images, u = torch.rand(6, 3, 16, 16) * 2 - 1, uniform_numbers(0, range(6))
    expected = torch.stack([augmented(image, numbers, cutout) for image, numbers in zip(images, u, strict=True)])
    torch.testing.assert_close(diffaugment(images, u, 1.0, cutout).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(diffaugment(images, u, 0.0, cutout), images)


def test_each_change_has_its_own_probability():
    u = uniform_numbers(5, range(4000))
    images = torch.rand(1, 3, 8, 8).expand(4000, -1, -1, -1)
    does = u[:, 7:10] < 0.3
    none = diffaugment(images, u, 0.3, 0.5).eq(images).flatten(1).all(1)
    assert torch.equal(none | does.any(1), torch.ones(4000, dtype=torch.bool))
    assert does.float().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.03)
    assert float(none.float().mean()) == pytest.approx(0.7**3, abs=0.06)  # a shift may be by no pixel
    assert torch.equal(u[1000:1003], uniform_numbers(5, range(1000, 1003)))
    assert not torch.equal(u[:3], uniform_numbers(6, range(3)))


def test_a_gradient_comes_back_to_the_pixels_that_stay():
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    top, left = torch.tensor([1, 4]), torch.tensor([0, 6])
    window(images, top, left, 10).sum().backward()
    for gradient, v, h in zip(images.grad, top, left, strict=True):
        assert gradient[:, v : v + 10, h : h + 10].eq(1).all()
        assert gradient.sum() == 300


# LeCAM and the adaptive weight


def test_lecam_is_its_formula_and_its_averages_move_by_the_mean_of_a_steps_micro_batches():
    lecam = LeCam(torch.device("cpu"))
    lecam.load_state_dict({"averages": torch.tensor([0.6, -0.4])})
    logits = torch.randn(2, 2, 4, 1, 3, 3, requires_grad=True)  # micro-batches, real and fake, images
    total = sum(lecam(real, fake) for real, fake in logits)
    total.backward()
    real, fake = logits.detach().double().unbind(1)  # (2, 4, 1, 3, 3) each
    rise, fall = (real + 0.4).clamp(min=0), (0.6 - fake).clamp(min=0)
    torch.testing.assert_close(total.detach().double(), (rise.square() + fall.square()).sum() / (4 * 9))
    expected = torch.stack([2 * rise, -2 * fall], 1) / (4 * 9)
    torch.testing.assert_close(logits.grad.double(), expected, atol=1e-6, rtol=1e-5)
    lecam.end_step(stepped=True)
    moved = 0.999 * torch.tensor([0.6, -0.4]) + 0.001 * torch.stack([real.mean(), fake.mean()]).float()
    torch.testing.assert_close(lecam.state_dict()["averages"], moved)
    lecam(*logits[0])
    lecam.end_step(stepped=False)
    torch.testing.assert_close(lecam.state_dict()["averages"], moved)


def test_the_adaptive_factor_is_the_ratio_of_gradient_norms_of_the_whole_batch():
    layer, body = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 1, 3)
    x, y = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8, 8)
    adaptive = AdaptiveWeight(layer.weight, 1e4)
    assert adaptive.factor == 0
    for part in (slice(0, 2), slice(2, 4)):
        output = layer(x[part])
        adaptive.observe((output - y[part]).abs().mean(), F.softplus(-body(output).flatten(1).mean(1)).mean())
    adaptive.end_step(stepped=True)
    # By hand: d loss / d output, then the layer's gradient as a sum over places.
    output = layer(x).detach()
    mean = body(output).flatten(1).mean(1)
    of_l1 = (output - y).sign() / output.numel()
    spread = F.conv_transpose2d(torch.ones(4, 1, 6, 6) / 36, body.weight)
    of_gan = -torch.sigmoid(-mean)[:, None, None, None] / 4 * spread
    patches = F.unfold(x, 3, padding=1)  # (4, 36, 64)
    norms = [torch.einsum("bop,bip->oi", g.flatten(2), patches).norm() for g in (of_l1, of_gan)]
    torch.testing.assert_close(adaptive.factor, (norms[0] / norms[1]).detach(), rtol=1e-4, atol=0)
    capped = AdaptiveWeight(layer.weight, 0.5 * float(adaptive.factor))
    output = layer(x)
    capped.observe((output - y).abs().mean(), F.softplus(-body(output).flatten(1).mean(1)).mean())
    capped.end_step(stepped=True)
    assert float(capped.factor) == pytest.approx(0.5 * float(adaptive.factor))


# Training

CONFIG = """
data: {{source: synthetic, image_size: 16}}
model: {{channels: 8, channel_multipliers: [1, 2], layers_per_block: 1, latent_channels: 4, norm_groups: 4}}
quantizer: {{name: vq, codebook_size: 64}}
nsvq: null
loss: {{perceptual: none, adversarial_cap: 1.0e4, lecam_weight: 1.0}}
discriminator: {{name: dino, vit: {vit}, depths: [0, 2]}}
schedule: {{epoch_samples: 16, epochs: 3}}
optim: {{lr: 1.0e-3, ema_decay: 0.5, discriminator_lr: 5.0e-4}}
validation: {{every: 4, images: 8, probe_images: 4, statistics_images: 32}}
run: {{batch_size: 8, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 1, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}}
"""


@pytest.fixture
def tiny(tmp_path, vit):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(vit=vit))
    return path


def state(out, step):
    return torch.load(out / "checkpoints" / f"step-{step}" / "state.pt")


def weights(out, step, name):
    return load_file(out / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


def metrics(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in rows]


def check_equal(one, two):
    """Two runs that cut batches in other ways: but for rounding they are one."""
    losses = ("loss", "discriminator", "lecam", "real_logits", "fake_logits", "adversarial", "adversarial_weight")
    for a, b in zip(metrics(one)[:4], metrics(two)[:4], strict=True):
        assert {k: a[k] for k in losses} == pytest.approx({k: b[k] for k in losses}, rel=2e-3, abs=1e-5)
    for name in ("lecam", "adaptive_adversarial"):
        for value, other in zip(state(one, 2)[name].values(), state(two, 2)[name].values(), strict=True):
            torch.testing.assert_close(value, other, atol=1e-7, rtol=2e-3)
    for module in ("encoder", "decoder", "discriminator"):
        a, b = weights(one, 1, module), weights(two, 1, module)
        for name in a:
            # Biases before a norm of single channels, and the last ones, on which real and fake images agree, have
            # gradients that cancel to rounding: Adam takes a step of lr in either direction.
            if module != "discriminator" or not name.endswith((".0.bias", "logit.bias")):
                torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_micro_batches_are_one_batch_also_for_augmentation_lecam_and_the_adaptive_weight(
    run_script, tiny, tmp_path
):
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        run_script(train.main, "--config", tiny, "--out", out, "--run.accumulation", accumulation)
    check_equal(tmp_path / "1", tmp_path / "2")
    weight = [row["adversarial_weight"] for row in metrics(tmp_path / "1")]
    assert weight[0] == 0
    assert min(weight[1:]) > 0.01
    for step in (1, 2):  # the gradients of a step make the factor of the next one
        factor = state(tmp_path / "1", step)["adaptive_adversarial"]["factor"]
        assert weight[step] == pytest.approx(0.1 * float(factor))


def test_two_ranks_are_one_also_for_augmentation_lecam_and_the_adaptive_weight(
    run_script, run_two_ranks, tiny, tmp_path
):
    run_script(train.main, "--config", tiny, "--out", tmp_path / "alone")
    arguments = ["--config", tiny, "--out", tmp_path / "shared"]
    code, error = run_two_ranks("tokenizer", *arguments, record=tmp_path / "record")
    assert code == 0, error
    check_equal(tmp_path / "alone", tmp_path / "shared")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run_instrumented, tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cut = ["--run.accumulation", 2]
    run_instrumented(train, "--config", tiny, "--out", whole, *cut, record=tmp_path / "whole-record")
    with pytest.raises(Stopped, match="at step 3"):
        run_instrumented(train, "--config", tiny, "--out", parts, *cut, record=tmp_path / "parts-record", signal_at=18)
    run_instrumented(train, "--config", tiny, "--out", parts, *cut, record=tmp_path / "parts-record")
    assert metrics(whole) == metrics(parts)
    for module in ("encoder", "decoder", "discriminator"):
        a, b = weights(whole, 6, module), weights(parts, 6, module)
        assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("lecam", "adaptive_adversarial"):
        for value, other in zip(state(whole, 6)[name].values(), state(parts, 6)[name].values(), strict=True):
            assert torch.equal(value, other)


def test_a_checkpoint_holds_the_heads_alone(run_script, tiny, vit, tmp_path):
    out = tmp_path / "out"
    run_script(train.main, "--config", tiny, "--out", out, "--schedule.epochs", 1)
    assert not [name for name in weights(out, 2, "discriminator") if "vit" in name]
    assert {name.split(".")[1] for name in weights(out, 2, "discriminator")} == {"0", "1"}
    assert [g["lr"] for g in state(out, 2)["optimizers"]["discriminator"]["param_groups"]] == [5e-4]
    moved = shutil.copytree(vit, tmp_path / "moved")  # the same network, elsewhere: the run goes on
    run_script(train.main, "--config", tiny, "--out", out, "--schedule.epochs", 1, "--discriminator.vit", moved)


def test_the_gan_starts_after_epochs_or_steps_whichever_is_later(run_script, tiny, tmp_path):
    for epochs, steps, first in ((1, 4, 4), (2, 3, 4)):
        out = tmp_path / str(steps)
        options = ["--schedule.adversarial_after", epochs, "--schedule.adversarial_after_steps", steps]
        run_script(train.main, "--config", tiny, "--out", out, *options)
        assert ["discriminator" in row for row in metrics(out)] == [step >= first for step in range(6)]


def test_weight_decay_is_the_discriminators_alone_and_decoupled(run_script, tiny, tmp_path):
    moved = {}
    for decay in (0.0, 0.5):
        out = tmp_path / str(decay)
        run_script(
            train.main,
            "--config",
            tiny,
            "--out",
            out,
            "--schedule.epochs",
            1,
            "--optim.discriminator_weight_decay",
            decay,
        )
        moved[decay] = [weights(out, 1, name) for name in ("decoder", "discriminator")]
    assert all(torch.equal(value, moved[0.5][0][name]) for name, value in moved[0.0][0].items())
    name = "heads.0.point.1.weight"  # starts at 1
    torch.testing.assert_close(moved[0.0][1][name] - moved[0.5][1][name], torch.full((16,), 5e-4 * 0.5))


def test_a_gan_that_never_starts_is_refused(run_script, tiny, tmp_path):
    with pytest.raises(UsageError, match=r"leaves no GAN in the 6 steps of this run; lower it"):
        run_script(train.main, "--config", tiny, "--out", tmp_path, "--schedule.adversarial_after_steps", 6)


@pytest.mark.parametrize(
    ("config", "size"), [({"layers": 2}, 12), ({"layers": 3}, 24), ({"name": "plus", "stages": 2}, 8)]
)
def test_the_least_size_is_one_that_the_discriminator_takes(config, size):
    config = validate(TrainConfig, {"discriminator": {"channels": 8} | config}).discriminator
    assert config.least_size == size
    _, network = make_discriminator(config, seed=0)
    assert network(torch.zeros(1, 3, size, size)).shape[2] >= 1
    if config.name == "patchgan":
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.zeros(1, 3, size - 1, size - 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"adversarial_cap": 1e4}, "model": {"compile": True}}, "set model.compile: false"),
        ({"loss": {"adversarial_cap": 1e4}, "run": {"mixed_precision": "fp16"}}, "set run.mixed_precision: bf16"),
        ({"loss": {"adversarial_cap": 1e4, "adversarial_weight": 0}}, "adversarial_cap needs a GAN"),
        ({"loss": {"lecam_weight": 0.1, "adversarial_weight": 0}}, "lecam_weight needs a GAN"),
        ({"schedule": {"adversarial_after": 70}}, "leaves no GAN in schedule.epochs = 70"),
        ({"data": {"image_size": 16}}, "this discriminator needs 24 pixels, data.image_size is 16; lower"),
        ({"data": {"image_size": 8}, "discriminator": {"name": "plus"}}, "needs 16 pixels"),
        ({"loss": {"discriminator_layers": 2}}, "it is now discriminator.layers"),
        ({"discriminator": {"name": "plus", "layers": 2}}, "discriminator.layers is a key of another choice"),
        ({"discriminator": {"name": "dino", "kernel": 8}}, "kernel = 8 must be odd"),
        ({"discriminator": {"name": "dino", "depths": [1, 1]}}, "each once"),
    ],
)
def test_impossible_discriminators_are_refused_with_the_key(changes, message):
    with pytest.raises(UsageError, match=message):
        validate(TrainConfig, changes)


def test_trying_micro_batches_leaves_lecam_and_the_adaptive_weight_as_they_were(run_instrumented, tiny, tmp_path):
    """A try of 8 images runs out of memory, and one of 4 does not: the run is that of two micro-batches."""
    auto, two = (["--config", tiny, "--out", tmp_path / name, "--run.accumulation"] for name in ("auto", "two"))
    run_instrumented(train, *auto, "auto", record=tmp_path / "auto-record", fits=[4])
    run_instrumented(train, *two, 2, record=tmp_path / "two-record")
    for module in ("encoder", "decoder", "discriminator"):
        a, b = weights(tmp_path / "auto", 6, module), weights(tmp_path / "two", 6, module)
        assert all(torch.equal(a[name], b[name]) for name in a)
