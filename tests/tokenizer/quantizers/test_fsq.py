import math

import pytest
import torch

from nsvq.tokenizer.config import TrainConfig


def reference(z, levels):
    """Bounded values, codes and levels of one token, number by number."""
    bounded, codes, digits = [], [], []
    for value, count in zip(z, levels, strict=True):
        half = (count - 1) * 1.001 / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        b = math.tanh(value + math.atanh(offset / half)) * half - offset
        bounded.append(b / (count // 2))
        codes.append(round(b) / (count // 2))
        digits.append(round(b) + count // 2)
    return bounded, codes, digits


def test_codes_indices_and_gradients_follow_the_formula(make):
    levels = [8, 5, 3, 2]
    quantizer = make("fsq")
    z = (2 * torch.randn(2, 4, 6, 6)).requires_grad_()
    out = quantizer(z)
    upstream = torch.randn_like(z)
    (out.z_q * upstream).sum().backward()
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    for i, token in enumerate(flat.double().tolist()):
        _, codes, digits = reference(token, levels)
        index = sum(d * math.prod(levels[:j]) for j, d in enumerate(digits))
        assert int(out.indices.flatten()[i]) == index
        assert out.z_q.permute(0, 2, 3, 1).reshape(-1, 4)[i].tolist() == pytest.approx(codes, abs=1e-6)
    # Straight through the rounding, not through the bound.
    exact = z.detach().double().requires_grad_()
    tokens = exact.permute(0, 2, 3, 1)
    half = (torch.tensor(levels).double() - 1) * 1.001 / 2
    shift = torch.atanh(torch.tensor([0.5, 0, 0, 0.5]) / half)
    bounded = torch.tanh(tokens + shift) * half / torch.tensor([4, 2, 1, 1])
    (bounded * upstream.permute(0, 2, 3, 1)).sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_every_level_is_reached_and_there_is_no_loss_or_parameter(make):
    quantizer = make("fsq", levels=[8, 5], dim=2)
    z = torch.cartesian_prod(torch.linspace(-9, 9, 2001), torch.linspace(-9, 9, 201))
    assert len(quantizer.lookup(z).unique()) == 40
    assert quantizer.terms == ()
    assert quantizer.loss_weights() == {}
    assert not list(quantizer.parameters())
    assert torch.equal(quantizer.codebook().amax(0), torch.tensor([0.75, 1.0]))
    assert torch.equal(quantizer.codebook().amin(0), torch.tensor([-1.0, -1.0]))


def test_saturated_channels_of_many_levels_have_the_outermost_codes(make):
    quantizer = make("fsq", levels=[1024, 3], dim=2)
    z = torch.tensor([[-30.0, -30.0], [30.0, 30.0], [0.0, torch.nan]])
    indices = quantizer.lookup(z)
    assert indices.tolist()[:2] == [0, 3071]
    assert 0 <= int(indices[2]) < 3072
    assert quantizer.codes(indices[:2]).sign().tolist() == [[-1, -1], [1, 1]]


@pytest.mark.parametrize(("levels", "message"), [([8, 5], "number of quantizer.levels, 2"), ([8, 5, 1], "2 or more")])
def test_levels_that_do_not_fit_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(
            model={"latent_channels": 3},
            quantizer={"name": "fsq", "levels": levels},
            nsvq=None,
        )
