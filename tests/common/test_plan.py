"""The counts of common/plan.py against the ones that were made by other means, and what is computed of them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, ViTConfig

from nsvq.autoregressive import config as autoregressive
from nsvq.common import counting, plan
from nsvq.common.config import read_config, validate
from nsvq.diffusion import config as diffusion
from nsvq.errors import UsageError, UserError
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.discriminator import make_discriminator

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "imagenet128"
SMALL = ["--model.channels", "32", "--data.image_size", "32"]


def read(name, *words):
    return plan.read(CONFIGS / f"{name}.yaml", list(words))


def counted(name, *words):
    return counting.count(read(name, *words).make)


@pytest.fixture(scope="module")
def nsvq():
    made = read("nsvq")
    return made, counting.count(made.make)


@pytest.mark.slow
def test_the_default_tokenizer_is_counted_as_a_dispatch_mode_and_a_formula_count_it(nsvq):
    """456 MiB an image, 1.34 GiB and 546 GFLOP, counted storage by storage and operator by operator on paper."""
    _, found = nsvq
    assert found.saved / 2**20 == pytest.approx(456, rel=0.1)
    assert found.fixed / 2**30 == pytest.approx(1.34, rel=0.1)
    assert found.flops / 1e9 == pytest.approx(546, rel=0.1)
    assert found.flops_tf32 / 1e9 == pytest.approx(30, rel=0.1)  # VGG forward on two images, backward on one
    assert found.flops_codebook == 3 * 2 * 256 * 65_536 * 128


@pytest.mark.slow
def test_a_dit_takes_the_flops_of_its_matrices_and_of_attention():
    small = ("--model.depth", "3", "--model.width", "384", "--model.heads", "6")
    found = counted("dit-b", *small)
    model = plan.make_model(read("dit-b", *small).config.model, (128, 16, 16), 1000)
    tokens, conditioning = 256, ("adaLN", "time", "modulation", "label", "embed")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    once = [m for name, m in linears.items() if any(word in name.lower() for word in conditioning)]
    of_tokens = sum(m.weight.numel() for m in linears.values() if m not in once)
    attention = 3 * 2 * tokens * 384  # multiply-adds a token: q k^T and weights times v
    assert found.flops == pytest.approx(
        6 * (tokens * (of_tokens + attention) + sum(m.weight.numel() for m in once)), rel=0.1
    )
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_activations_are_those_that_a_real_step_keeps():
    """Against real tensors: a small network on the CPU, without autocast in both."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    sizes = {}

    def step(device):
        accelerator = counting.CountingAccelerator(device)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        run = lambda images: accelerator.backward(model(torch.rand(images, 3, 16, 16)).square().mean())  # noqa: E731
        return counting.Step(run, [model], [model], [], accelerator)

    found = counting.count(step)

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.rand(4, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network(x).square().mean()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert 4 * found.saved + found.saved_once == sum(size for at, size in sizes.items() if at not in own)
    weights = sum(p.numel() for p in network.parameters())
    assert (found.parameters, found.fixed, found.checkpoint) == (weights, 20 * weights, 16 * weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit-b", "ar-b"])
def test_checkpointed_layers_keep_their_inputs_and_what_one_of_them_keeps(name):
    width = ("--model.width", "128", "--model.heads", "4")
    saved = {
        (depth, on): counted(name, *width, "--model.depth", str(depth), "--model.gradient_checkpointing", str(on)).saved
        for depth in (1, 2, 3)
        for on in (False, True)
    }
    inputs, layer = saved[3, True] - saved[2, True], saved[2, False] - saved[1, False]
    assert inputs == pytest.approx(256 * 128 * 4, rel=0.02)  # float32, and the modulation
    assert saved[1, True] == pytest.approx(saved[1, False], rel=0.02)  # which is computed again as a whole
    assert saved[3, True] == pytest.approx(saved[3, False] - 2 * (layer - inputs), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bsq", "fsp", "ibq", "ar-b", "ldm"])
def test_every_kind_of_config_can_be_planned(name):
    words = SMALL if "tokenizer" not in read_config(CONFIGS / f"{name}.yaml") else []
    words = ["--model.depth", "2"] if name == "ar-b" else ["--model.width", "128"] if name == "ldm" else words
    found = counted(name, *words)
    assert min(found.parameters, found.saved, found.flops, found.checkpoint) > 0


@pytest.mark.slow
def test_discriminators_are_counted_by_what_trains_and_what_is_frozen(tmp_path):
    """A frozen ViT takes memory and FLOPs, and has neither gradients nor a place in checkpoints."""
    vit = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64)
    vit.save_pretrained(tmp_path)  # its architecture is enough
    words = [
        *SMALL,
        "--model.channel_multipliers",
        "1",
        "2",
        "--model.layers_per_block",
        "1",
        "--loss.perceptual",
        "none",
    ]
    words += ["--quantizer.codebook_size", "64", "--discriminator.name"]
    plus = counted("nsvq", *words, "plus", "--discriminator.channels", "8")
    options = {"vit": str(tmp_path), "depths": [0, 1], "name": "dino"}
    (tmp_path / "dino.yaml").write_text(f"base: {CONFIGS / 'nsvq.yaml'}\ndiscriminator: {options}")
    dino = counting.count(plan.read(tmp_path / "dino.yaml", [*words, "dino"]).make)
    sizes = {}
    for name, found in (("plus", {"channels": 8}), ("dino", options)):
        config = validate(TrainConfig, {"discriminator": found | {"name": name}}).discriminator
        sizes[name] = [sum(p.numel() for p in m.parameters()) for m in make_discriminator(config, 0, weights=False)]
    trained, frozen = sizes["dino"][1] - sizes["plus"][1], sizes["dino"][0]
    assert dino.parameters - plus.parameters == trained
    assert dino.fixed - plus.fixed == pytest.approx(16 * trained + 4 * frozen, rel=0.01)
    assert dino.checkpoint - plus.checkpoint == pytest.approx(12 * trained, rel=0.01)


@pytest.mark.slow
def test_frozen_networks_of_losses_are_counted(tmp_path):
    plain, logits = counted("nsvq", *SMALL), counted("nsvq", *SMALL, "--loss.logits.network", "resnet50")
    # ResNet-50's 4.09 G multiply-adds: forward on two images, backward to one of them.
    assert logits.flops - plain.flops == pytest.approx(3 * 2 * 4.09e9, rel=0.05)
    assert logits.flops_tf32 - plain.flops_tf32 == pytest.approx(logits.flops - plain.flops, rel=0.05)
    assert logits.fixed - plain.fixed == pytest.approx(4 * 25.6e6, rel=0.02)
    assert logits.checkpoint == plain.checkpoint
    half = counted("nsvq", *SMALL, "--loss.logits.network", "resnet50", "--loss.logits.precision", "bf16")
    assert half.flops_tf32 == plain.flops_tf32
    assert half.flops == logits.flops
    assert half.saved < logits.saved
    lpips = counted("nsvq", *SMALL, "--loss.perceptual_precision", "bf16")
    assert lpips.flops_tf32 == 0
    assert lpips.saved < plain.saved
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    vision.save_pretrained(tmp_path)
    aligned = counted("nsvq", *SMALL, "--loss.alignment.network", str(tmp_path))
    teacher = 2 * 32 * (256 * 3 * 14**2 + 257 * 12 * 32 + 2 * 257**2)  # patches, a block's matrices, attention
    assert aligned.flops_tf32 - plain.flops_tf32 == pytest.approx(teacher, rel=0.02)
    vf = counted("nsvq", *SMALL, "--loss.alignment.network", str(tmp_path), "--loss.alignment.form", "vf")
    assert vf.parameters - plain.parameters == 128 * 32  # W
    assert vf.flops > 1.2 * plain.flops  # a second backward pass through the decoder
    plus = counted("nsvq-plus", *SMALL, "--loss.alignment.network", str(tmp_path))  # all in bfloat16 but LPIPS
    assert plus.flops_tf32 == plain.flops_tf32
    assert counted("ns-vq", *SMALL).flops > 0
    with pytest.raises(UserError, match=r"a plan cannot count net\.py .*: plan with --loss\.logits null"):
        counted("nsvq", *SMALL, "--loss.logits.network", "net.py")


def test_a_generator_is_planned_on_the_tokenizer_that_it_looks_for():
    evidence = CONFIGS.parent / "evidence"
    for name, trained_by in (("ar64", autoregressive), ("dit64", diffusion)):
        found = plan.read(evidence / f"{name}.yaml", [], evidence / "ratio64.yaml")
        assert isinstance(found.config, trained_by.TrainConfig)
        with pytest.raises(UsageError, match="images of 64 pixels, its tokenizer of 128"):
            plan.read(evidence / f"{name}.yaml", [])
    with pytest.raises(UsageError, match=r"no config of .* makes elsewhere: give its config as --tokenizer_config"):
        read("dit-b", "--tokenizer", "elsewhere")
    found = plan.read(CONFIGS.parent / "imagenet256" / "ar-l.yaml", [])
    assert found.latents == 2 * 16**2 * 1_281_167 * (2 if found.config.data.flip else 1) * found.config.cache_crops
    unet, dit = (plan.outcome(read(name), GIVEN, "H100", 1) for name in ("ldm", "dit-b"))
    assert unet.images_per_second / dit.images_per_second == pytest.approx(0.21 / 0.4)  # convolutions


@pytest.mark.slow
def test_a_method_whose_step_looks_at_values_is_refused_in_a_line():
    with pytest.raises(UserError, match="looks at values"):
        counted("vp", *SMALL, "--quantizer.codebook_size", "16")


GIVEN = counting.Counted(64e6, 1.34 * 2**30, 456 * 2**20, 0.12 * 2**30, 545e9, 30e9, 12.9e9, 1e9)


@pytest.mark.parametrize(
    ("gpu", "gpus", "accumulation"), [("H100", 1, 1), ("A10", 1, 4), ("A10", 4, 1), ("L40S", 1, 2), ("B200", 1, 1)]
)
def test_auto_takes_the_fewest_micro_batches_whose_peak_a_gpu_holds(gpu, gpus, accumulation):
    made = read("nsvq")
    found = plan.outcome(made, GIVEN, gpu, gpus)
    assert found.accumulation == accumulation
    assert found.micro_batch == 128 // gpus // accumulation
    assert found.memory <= plan.MEMORY[gpu] * 2**30
    made.config.run.accumulation = accumulation
    assert plan.outcome(made, GIVEN, gpu, gpus) == found


def test_speed_is_the_peak_times_its_share_over_the_work():
    """606 images/s of an H100 at 40 %: bfloat16, and TF32 for LPIPS and three times for the codebook."""
    found = plan.outcome(read("nsvq"), GIVEN, "H100", 1, utilization=0.4)
    assert found.images_per_second == pytest.approx(606, rel=0.01)
    assert found.hours == pytest.approx(70 * 1_281_167 / 606 / 3600, rel=0.01)


def test_what_cannot_run_is_said():
    made = read("nsvq")
    with pytest.raises(UsageError, match="multiple of 3 GPUs"):
        plan.outcome(made, GIVEN, "H100", 3)
    large = plan.outcome(made, replace(GIVEN, saved=2**37), "H100", 1)
    assert large.accumulation is None
    assert "not one image fits" in "\n".join(plan.report(made, replace(GIVEN, saved=2**37), ["H100"], 1, None))


@pytest.mark.slow
def test_readme_s_hardware_table_is_what_the_plan_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--table"])
    plan.main()
    assert capsys.readouterr().out.strip() in (ROOT / "README.md").read_text()


def test_every_recipe_at_256_pixels_has_a_plan_and_generators_have_256_tokens():
    files = sorted((CONFIGS.parent / "imagenet256").glob("*.yaml"))
    generators = {"dit-b", "dit-l", "dit-xl", "ar-b", "ar-l", "ar-xl"}
    assert generators < {file.stem for file in files}
    for file in files:
        found = plan.read(file, [])
        assert found.config.data.image_size == 256
        assert str(found.config.out).endswith(f"imagenet256-{file.stem}")
        if file.stem in generators:
            latents = found.latents / plan.IMAGENET_IMAGES / 2  # of an image, with and without a flip
            assert latents == 256 * 2 * (128 if "dit" in file.stem else 1)


def test_the_published_generator_has_a_plan_on_its_tokenizers_recipe():
    file = CONFIGS.parent / "papers" / "llamagen-b.yaml"
    with pytest.raises(UsageError, match=r"makes tokenizers/llamagen: give its config as --tokenizer_config"):
        plan.read(file, [])
    found = plan.read(file, [], CONFIGS.parent / "papers" / "fc_l2.yaml")
    assert found.samples == 300 * (plan.IMAGENET_IMAGES // 256) * 256
    assert found.latents == 10 * 256 * 2 * plan.IMAGENET_IMAGES
