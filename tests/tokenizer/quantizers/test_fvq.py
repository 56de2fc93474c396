import math

import pytest
import torch
from pydantic import ValidationError

from nsvq.tokenizer.config import OptimConfig
from nsvq.tokenizer.health import usage
from nsvq.tokenizer.quantizers import QUANTIZERS, make_quantizer


def reference(q, heads):
    """The bridge with explicit attention, float64."""
    state = {name: value.double() for name, value in q.state_dict().items()}

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = linear(state["weight"].reshape(len(state["weight"]) // q.group, -1), "compress")
    for i in range(2):
        q_, k, v = linear(norm(x), f"blocks.{i}.qkv").chunk(3, dim=1)
        parts = zip(q_.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
        heard = [torch.softmax(a @ b.T / math.sqrt(a.shape[1]), 1) @ c for a, b, c in parts]
        x = x + linear(torch.cat(heard, 1), f"blocks.{i}.output")
        h = linear(norm(x), f"blocks.{i}.mlp.0")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.2")
    return linear(norm(x), "recover").reshape(state["weight"].shape)


def test_codes_equal_the_bridge_in_float64(make):
    quantizer = make("fvq", heads=2)
    torch.testing.assert_close(quantizer.codebook().double(), reference(quantizer, 2), rtol=1e-4, atol=1e-5)


def test_every_code_is_zero_at_the_start_and_all_of_them_leave_it_together():
    options = QUANTIZERS["fvq"].Config(name="fvq", codebook_size=64, group=4, width=16)
    quantizer = make_quantizer(options, 6)
    assert not quantizer.codebook().any()
    quantizer(torch.randn(1, 6, 4, 4)).losses["codebook"].backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= parameter.grad
    assert quantizer.codebook()[1:].any(1).sum() >= 15  # codes share their group's place: one of each group moves


def test_groups_of_a_thousandth_of_the_codebook_unless_told():
    config = QUANTIZERS["fvq"].Config
    assert [config(name="fvq", codebook_size=k).codes_in_group() for k in (256, 1024, 16384, 65536)] == [1, 1, 16, 64]
    with pytest.raises(ValidationError, match="group = 3 must divide"):
        config(name="fvq", codebook_size=64, group=3)


def test_learning_rates_rise_hold_and_fall_as_the_paper_has_them():
    optim = OptimConfig(lr_warmup=4, lr_hold=0.3, lr_decay="linear")
    factor = [optim.lr_factor(epoch / 40, 40) for epoch in (0, 2, 4, 4 + 0.29 * 36, 4 + 0.65 * 36, 40)]
    assert factor == pytest.approx([0.01, 0.505, 1, 1, 0.01 + 0.99 * 0.35 / 0.7, 0.01])
    cosine = OptimConfig(lr_decay="cosine", lr_floor=0)
    assert [cosine.lr_factor(t, 7) for t in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert OptimConfig().lr_factor(0.9, 7) == 1


@pytest.mark.slow
def test_toy_regression_of_the_specification():
    """Static non-Gaussian latents, codebook loss alone: the bridge uses all codes where a free table uses few."""
    torch.manual_seed(0)
    mix = torch.randn(8, 16)

    def latents():
        u = torch.randn(512, 8)
        return (torch.tanh(2 * u) @ mix + 0.1 * torch.randn(512, 16)) / 3

    used, errors = {}, {}
    for name in ("vq", "fvq"):
        options = {"init": "uniform"} if name == "vq" else {"group": 4, "width": 64}
        quantizer = make_quantizer(QUANTIZERS[name].Config(name=name, codebook_size=256, **options), 16)
        optimizer = torch.optim.Adam(quantizer.parameters(), 1e-3)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 300)
            out = quantizer(latents().T.reshape(1, 16, 16, 32))
            optimizer.zero_grad()
            out.losses["codebook"].backward()
            optimizer.step()
        z = torch.cat([latents() for _ in range(16)])
        indices = quantizer.lookup(z)
        used[name] = usage(torch.bincount(indices, minlength=256))["utilization"]
        errors[name] = float((z - quantizer.codes(indices).detach()).square().mean())
    assert used["fvq"] > 0.95
    assert used["vq"] < 0.5 * used["fvq"]
    assert errors["fvq"] < 0.8 * errors["vq"]
