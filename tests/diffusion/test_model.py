import math

import pytest
import torch

from nsvq.diffusion import cpu_attention
from nsvq.diffusion.dit import DiT, rotary_angles, rotate
from nsvq.diffusion.model import SIZES, DiTConfig, UNetConfig, make_model
from nsvq.diffusion.unet import make_unet


def random_dit(**options):
    """A DiT whose weights are all random: at initialisation its output is zero."""
    model = DiT(**{"sample_size": 4, "in_channels": 3, "num_classes": 5, "depth": 2, "width": 32, "heads": 2} | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_model(variant):
    """A small network whose weights are all random."""
    if variant != "unet":
        return random_dit(variant=variant)
    model = make_unet((3, 4, 4), 5, width=32, multipliers=(1,), layers=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model, count=3):
    side, channels = model.config.sample_size, model.config.in_channels
    labels = torch.arange(count) % (model.null_class + 1)
    return torch.randn(count, channels, side, side), torch.linspace(0, 999, count), labels


VARIANTS = pytest.mark.parametrize("variant", ["dit", "modern"])


@VARIANTS
def test_network_predicts_zero_and_its_blocks_are_the_identity_before_training(variant):
    model = DiT(sample_size=4, in_channels=3, num_classes=5, depth=2, width=32, heads=2, variant=variant)
    changes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: changes.append((output - inputs[0]).abs().max().item()))
    assert torch.equal(model(*inputs(model)), torch.zeros(3, 3, 4, 4))
    assert changes == [0.0, 0.0]


@VARIANTS
def test_a_condition_computed_before_gives_the_same_and_nothing_of_it_is_computed_again(variant):
    model = random_dit(depth=4, variant=variant)
    x, time, labels = inputs(model)
    expected, condition = model(x, time, labels), model.condition(time, labels)
    assert condition.shape == (3, 4 * 6 + 2, 32)
    calls = []
    for module in (model.time_embed, model.class_embed, model.modulation):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    assert torch.equal(model(x, time, labels, condition), expected)
    assert calls == []
    model(x, time, labels)
    assert sorted(calls) == ["Embedding", "Linear", "TimestepEmbedding"]  # once for all blocks


def dense_modern(model, x, time, labels):
    """The "modern" network, block by block from its formulas, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    depth, width, heads = model.config.depth, model.config.width, model.config.heads
    side, dim = model.config.sample_size, model.config.width // model.config.heads
    rows = model.condition(time, labels).double()
    gate, shift, scale = rows[:, : 2 * depth], rows[:, 2 * depth : 4 * depth + 1], rows[:, 4 * depth + 1 :]
    turns = torch.zeros(side, side, dim // 2, dtype=torch.complex128)
    for row in range(side):
        for column in range(side):
            for i in range(dim // 4):
                frequency = 10_000.0 ** (-i / (dim // 4))
                turns[row, column, i] = complex(math.cos(row * frequency), math.sin(row * frequency))
                turns[row, column, dim // 4 + i] = complex(math.cos(column * frequency), math.sin(column * frequency))
    turns = turns.flatten(0, 1)

    def rotated(x):  # (N, D) as D / 2 complex numbers
        turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * turns
        return torch.cat([turned.real, turned.imag], dim=1)

    outputs = []
    for sample, tokens in enumerate(model.patch_embed(x).double()):
        for i in range(depth):
            name, a, m = f"blocks.{i}", 2 * i, 2 * i + 1
            h = rms(tokens) * (1 + scale[sample, a]) + shift[sample, a]
            q, k, v = linear(h, f"{name}.attention.qkv").split(width, dim=1)
            mixed = []
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                query = rotated(rms(q[:, part]) * weights[f"{name}.attention.norm_q.weight"])
                key = rotated(rms(k[:, part]) * weights[f"{name}.attention.norm_k.weight"])
                mixed.append((query @ key.T / math.sqrt(dim)).softmax(1) @ v[:, part])
            tokens = tokens + gate[sample, a] * linear(torch.cat(mixed, dim=1), f"{name}.attention.out")
            h = linear(rms(tokens) * (1 + scale[sample, m]) + shift[sample, m], f"{name}.mlp.fc_in")
            left, right = h.chunk(2, dim=1)
            tokens = tokens + gate[sample, m] * linear(left * left.sigmoid() * right, f"{name}.mlp.fc_out")
        out = linear(rms(tokens) * (1 + scale[sample, -1]) + shift[sample, -1], "proj_out")
        outputs.append(out.T.unflatten(1, (side, side)))
    return torch.stack(outputs)


def test_modern_is_rmsnorm_qk_norm_rotary_attention_and_swiglu():
    model = random_dit(variant="modern")
    arguments = inputs(model)
    with torch.no_grad():
        expected = dense_modern(model, *arguments)
        assert expected.std() > 0.05
        torch.testing.assert_close(model(*arguments).double(), expected, rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_on_the_offset_of_two_places_only():
    rotation = rotary_angles(8, 16)
    q, k = torch.randn(2, 32)
    rotated = lambda x: rotate(x.expand(1, 1, 64, 32), rotation)[0, 0].unflatten(0, (8, 8))  # noqa: E731
    q, k = rotated(q), rotated(k)
    scores = torch.einsum("abd,cfd->abcf", q, k)
    torch.testing.assert_close(scores[1, 2, 4, 3], scores[3, 6, 6, 7])
    torch.testing.assert_close(scores[5, 5, 2, 6], scores[3, 0, 0, 1])
    assert (scores[1, 2, 4, 3] - scores[1, 2, 3, 4]).abs() > 1e-3


@VARIANTS
def test_each_sample_depends_on_its_own_time_class_and_latents_only(variant):
    model = random_dit(variant=variant)
    x, time, labels = inputs(model)
    alone = torch.cat([model(x[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, time, labels), alone)
    for other in [(x, time + 1, labels), (x, time, (labels + 1) % 6), (x + 0.1, time, labels)]:
        assert (model(*other) - alone).flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("variant", ["dit", "modern", "unet"])
def test_gradient_checkpointing_changes_no_gradient(variant):
    model = random_model(variant)
    arguments = inputs(model)
    gradients = []
    for enable in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(*arguments).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("variant", "checkpointing"), [("dit", False), ("modern", True), ("unet", False)])
@pytest.mark.slow
def test_networks_compile_into_one_graph_with_the_same_gradients(variant, checkpointing):
    torch._dynamo.reset()
    model = random_model(variant)
    if checkpointing:
        model.enable_gradient_checkpointing()
    arguments = inputs(model)
    gradients = []
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        network(*arguments).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for compiled, own in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads_at_once", [1, 4, 100])
def test_attention_in_bfloat16_on_the_cpu_agrees_with_the_dense_formula(monkeypatch, heads_at_once):
    monkeypatch.setattr(cpu_attention, "SCRATCH_BYTES", heads_at_once * 16 * 16 * 2)  # of 2 x 3 heads
    qkv, weight = torch.randn(3, 2, 3, 16, 8).bfloat16().requires_grad_(), torch.randn(2, 3, 16, 8)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact
    expected = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v
    actual = cpu_attention.attend(qkv)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad((o * weight).sum(), x) for o, x in ((actual, qkv), (expected, exact))
    )
    for a, b in zip((actual, *gradient), (expected, *expected_gradient), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()
    with torch.no_grad():
        assert torch.equal(cpu_attention.attend(qkv), actual)
        torch.testing.assert_close(cpu_attention.attend(qkv.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_only_bfloat16_on_the_cpu_goes_around_the_kernel_and_weights_keep_their_names(monkeypatch):
    plain = random_dit()
    model = make_model(DiTConfig(depth=2, width=32, heads=2), (3, 4, 4), 5)
    model.load_state_dict(plain.state_dict())
    arguments, calls, kernel = inputs(plain), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *qkv: calls.append(qkv[0].dtype) or kernel(*qkv)
    )
    assert torch.equal(model(*arguments), plain(*arguments))
    assert calls == [torch.float32] * 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*arguments)
        assert len(calls) == 4
        plain(*arguments)
    assert calls[4:] == [torch.bfloat16] * 2


@pytest.mark.slow
def test_a_network_in_bfloat16_compiles_into_one_graph_on_the_cpu():
    torch._dynamo.reset()
    model = random_dit()
    cpu_attention.use_cpu_attention(model)
    compiled, arguments = torch.compile(model, backend="aot_eager", fullgraph=True), inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = model(*arguments), compiled(*arguments)
    assert (actual - expected).norm() < 0.02 * expected.norm()
    actual.square().mean().backward()


def test_output_and_embeddings_are_float32_under_autocast():
    model = random_dit()
    arguments = inputs(model)
    dtypes = {}
    for name in ("patch_embed", "time_embed", "blocks.0.attention.qkv", "blocks.1", "proj_out"):
        keep = lambda module, _, output, name=name: dtypes.__setitem__(name, output.dtype)  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*arguments)
    assert output.dtype == torch.float32
    assert dtypes.pop("blocks.0.attention.qkv") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


@VARIANTS
@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_parameter_counts(size, millions, variant):
    # DiT, arXiv 2212.09748, table 1, and diffusion on 128 channels adds less than one million.
    with torch.device("meta"):
        model = make_model(DiTConfig(size=size, variant=variant), (128, 16, 16), 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_a_model_that_does_not_fit_the_latents_is_refused():
    assert SIZES["tiny"][1] == 192
    with pytest.raises(ValueError, match="192 is less than the 256 values of a token, 1 x 1 latents of 256 channels"):
        make_model(DiTConfig(size="tiny"), (256, 16, 16), 10)
    with pytest.raises(ValueError, match="192 is less than the 256 values of a token, 2 x 2 latents of 64 channels"):
        make_model(DiTConfig(size="tiny", patch_size=2), (64, 16, 16), 10)
    with pytest.raises(ValueError, match="side 15 do not divide into patches of side 2"):
        make_model(DiTConfig(size="tiny", patch_size=2), (8, 15, 15), 10)
    with pytest.raises(ValueError, match="square"):
        make_model(DiTConfig(size="tiny"), (8, 16, 8), 10)
    with pytest.raises(ValueError, match="multiple of heads"):
        DiTConfig(width=100, heads=3)
    with pytest.raises(ValueError, match=r"modern: the channels of a head, 48 / 8"):
        DiTConfig(variant="modern", width=48, heads=8)
    with pytest.raises(ValueError, match="side 6 cannot be halved 2 times"):
        make_model(UNetConfig(), (8, 6, 6), 10)


def test_the_papers_unet_has_its_appendixs_sizes():
    # NSVQ, arXiv 2606.11363, D.5: 128 channels in and out, base 256, multipliers 1, 2, 4, two residual blocks a level,
    # attention at 16, 8 and 4.
    with torch.device("meta"):
        model = make_model(UNetConfig(), (128, 16, 16), 1000)
        unconditional = make_model(UNetConfig(conditional=False), (128, 16, 16), 1000)
    assert (model.conv_in.in_channels, model.conv_in.out_channels, model.conv_out.out_channels) == (128, 256, 128)
    assert [block.resnets[-1].out_channels for block in model.down_blocks] == [256, 512, 1024]
    assert [len(block.resnets) for block in (*model.down_blocks, *model.up_blocks)] == [2, 2, 2, 3, 3, 3]
    assert all(len(block.attentions) == len(block.resnets) for block in (*model.down_blocks, *model.up_blocks))
    assert model.class_embedding.weight.shape == (1001, 1024)
    assert (model.null_class, unconditional.null_class) == (1000, 0)
    assert unconditional.class_embedding is None


@pytest.mark.parametrize("variant", ["dit", "modern", "unet"])
def test_an_unconditional_model_knows_no_class_but_the_null_class(variant):
    if variant == "unet":
        config = UNetConfig(width=32, multipliers=(1, 2), conditional=False)
    else:
        config = DiTConfig(variant=variant, size="tiny", depth=1, conditional=False)
    model = make_model(config, (3, 4, 4), 10)
    assert model.null_class == 0
    assert config.label_dropout() == 1
    assert model(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64)).shape == (2, 3, 4, 4)
