import pytest
import torch

from diffusion.model import SIZES, DiT, ModelConfig, make_model


def random_dit(**options):
    """A DiT whose weights are all random: at initialisation its output is zero."""
    model = DiT(**{"sample_size": 4, "in_channels": 3, "num_classes": 5, "depth": 2, "width": 32, "heads": 2} | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model, count=3):
    side, channels = model.config.sample_size, model.config.in_channels
    labels = torch.arange(count) % (model.config.num_classes + 1)
    return torch.randn(count, channels, side, side), torch.linspace(0, 999, count), labels


def test_network_predicts_zero_and_its_blocks_are_the_identity_before_training():
    model = DiT(sample_size=4, in_channels=3, num_classes=5, depth=2, width=32, heads=2)
    assert torch.equal(model(*inputs(model)), torch.zeros(3, 3, 4, 4))
    x, condition = torch.randn(3, 16, 32), torch.randn(3, 32)
    assert all(torch.equal(block(x, condition), x) for block in model.blocks)


def test_time_and_class_are_embedded_once_for_all_blocks():
    model, calls = random_dit(depth=4), []
    for module in (model.time_embed, model.class_embed):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    model(*inputs(model))
    assert sorted(calls) == ["Embedding", "TimestepEmbedding"]


def test_each_sample_depends_on_its_own_time_class_and_latents_only():
    model = random_dit()
    x, time, labels = inputs(model)
    alone = torch.cat([model(x[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, time, labels), alone)
    for other in [(x, time + 1, labels), (x, time, (labels + 1) % 6), (x + 0.1, time, labels)]:
        assert (model(*other) - alone).flatten(1).norm(dim=1).min() > 1e-3


def test_gradient_checkpointing_changes_no_gradient():
    model = random_dit()
    arguments = inputs(model)
    gradients = []
    for enable in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(*arguments).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_network_compiles_into_one_graph():
    model = random_dit()
    arguments = inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_output_and_embeddings_are_float32_under_autocast():
    model = random_dit()
    arguments = inputs(model)
    dtypes = {}
    for name in ("patch_embed", "time_embed", "blocks.0.qkv", "blocks.1", "proj_out"):
        keep = lambda module, _, output, name=name: dtypes.__setitem__(name, output.dtype)  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*arguments)
    assert output.dtype == torch.float32
    assert dtypes.pop("blocks.0.qkv") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_parameter_counts(size, millions):
    # DiT, arXiv 2212.09748, table 1, and diffusion on 128 channels adds less than one million.
    with torch.device("meta"):
        model = make_model(ModelConfig(size=size), (128, 16, 16), 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_a_model_that_does_not_fit_the_latents_is_refused():
    assert SIZES["tiny"][1] == 192
    with pytest.raises(ValueError, match="192 is less than the latents' 256 channels"):
        make_model(ModelConfig(size="tiny"), (256, 16, 16), 10)
    with pytest.raises(ValueError, match="side 15 do not divide into patches of side 2"):
        make_model(ModelConfig(size="tiny", patch_size=2), (8, 15, 15), 10)
    with pytest.raises(ValueError, match="square"):
        make_model(ModelConfig(size="tiny"), (8, 16, 8), 10)
    with pytest.raises(ValueError, match="multiple of heads"):
        ModelConfig(width=100, heads=3)
