import pytest
import torch

from tokenizer.codebook import nonstationary_loss
from tokenizer.quantizers import QUANTIZERS, VQ, SimVQ


def make(name):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name](40, 6)
    if quantizer.table() is not None:
        quantizer.initialize(torch.randn(40, 6))
    return quantizer


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_output_is_the_nearest_code_of_the_effective_codebook(name):
    quantizer = make(name)
    z = torch.randn(2, 6, 5, 3)
    out = quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 6).double()
    nearest = torch.cdist(flat, quantizer.codebook().detach().double()).argmin(1)
    assert torch.equal(out.indices, nearest.view(2, 5, 3))
    codes = quantizer.codebook()[nearest].view(2, 5, 3, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(out.z_q, codes)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_losses_are_means_over_elements_and_pull_one_side_each(name):
    quantizer = make(name)
    z = torch.randn(2, 6, 5, 3, requires_grad=True)
    out = quantizer(z)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 6)
    expected = (flat.double() - quantizer.codebook().detach()[out.indices.flatten()].double()).square().mean()
    for term in ("codebook", "commitment"):
        assert float(out.losses[term]) == pytest.approx(float(expected), rel=1e-5)
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None
    assert all(parameter.grad is not None for parameter in quantizer.parameters())
    quantizer.zero_grad()
    out.losses["commitment"].backward(retain_graph=True)
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_gradient_passes_straight_through_to_the_encoder_and_not_to_the_codes():
    quantizer = make("vq")
    z = torch.randn(1, 6, 4, 4, requires_grad=True)
    upstream = torch.randn(1, 6, 4, 4)
    (quantizer(z).z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert quantizer.weight.grad is None


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_ns_loss_composes_with_every_quantizer(name):
    quantizer = make(name)
    z = torch.randn(2, 6, 5, 3)
    assert "nonstationary" not in quantizer(z).losses
    out = quantizer(z, temperature=0.7)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 6)
    alone = nonstationary_loss(flat, quantizer.codebook(), out.indices.flatten(), 0.7)
    assert float(out.losses["nonstationary"]) == pytest.approx(float(alone.loss), rel=1e-6)
    assert float(out.stats["winner_mass"]) == pytest.approx(float(alone.winner_mass), rel=1e-6)
    out.losses["nonstationary"].backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_simvq_trains_one_linear_map_over_a_frozen_base_of_variance_one_over_d():
    quantizer = SimVQ(5000, 16)
    assert {name for name, _ in quantizer.named_parameters()} == {"linear.weight", "linear.bias"}
    assert float(quantizer.base.var() * 16) == pytest.approx(1, rel=0.02)
    expected = quantizer.base @ quantizer.linear.weight.T + quantizer.linear.bias
    torch.testing.assert_close(quantizer.codebook(), expected)


def test_vq_starts_uniform_in_one_over_k():
    weight = VQ(200, 32).weight
    assert float(weight.abs().max()) <= 1 / 200
    assert float(weight.std() * 200) == pytest.approx(3**-0.5, rel=0.05)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_quantization_is_float32_under_autocast(name):
    quantizer = make(name)
    z = torch.randn(1, 6, 8, 8)
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.indices, expected.indices)
    assert torch.equal(out.z_q, expected.z_q)
