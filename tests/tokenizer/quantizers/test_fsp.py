import math

import pytest
import torch

from nsvq.tokenizer.quantizers.fsp import ACTIVATIONS


def uniform_tokens(count, dim):
    """Latents that g = normal turns into U[0, 1]: standard normal ones."""
    return torch.randn(1, dim, count // 100, 100)


def test_acceptance_of_uniform_latents_is_one_minus_a_quarter_bin(make):
    quantizer = make("fsp", levels=[8, 8, 8], dim=3, quantize_rate=0.0)
    rates = [float(quantizer(uniform_tokens(100_000, 3)).stats["acceptance"]) for _ in range(2)]
    assert rates == pytest.approx([1 - 1 / 32] * 2, abs=1e-3)
    for levels, expected in ((5, 0.95), (4, 0.9375)):
        quantizer = make("fsp", levels=[levels], dim=1, quantize_rate=0.0)
        assert float(quantizer(uniform_tokens(300_000, 1)).stats["acceptance"]) == pytest.approx(expected, abs=2e-3)


def test_codes_are_centres_of_equal_bins_with_the_known_variance_and_error(make):
    quantizer = make("fsp", levels=[8, 5], dim=2).eval()
    codes = quantizer.codebook()
    torch.testing.assert_close(codes.var(0, unbiased=False), torch.tensor([1 - 1 / 64, 1 - 1 / 25]))
    out = quantizer(uniform_tokens(200_000, 2))
    # Rounding U[0, 1] to L centres errs by 1/(12 L^2), times 12 in the decoder's units.
    assert float(out.losses["commitment"]) == pytest.approx((1 / 64 + 1 / 25) / 2, rel=0.01)


def test_noise_is_as_wide_as_a_bin_and_half_of_the_elements_are_rounded(make):
    quantizer = make("fsp", levels=[5], dim=1)
    z = uniform_tokens(200_000, 1)
    offset = ((quantizer(z).z_q - quantizer.prepare(z.view(-1, 1)).view(z.shape)) / math.sqrt(12)).flatten()
    rounded = torch.isclose(quantizer(z).z_q.view(-1, 1), quantizer.codebook().view(1, -1), atol=1e-6).any(1)
    assert float(rounded.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(offset.abs().max()) <= 0.1 + 1e-6
    pure = make("fsp", levels=[5], dim=1, quantize_rate=0.0)
    offset = ((pure(z).z_q - pure.prepare(z.view(-1, 1)).view(z.shape)) / math.sqrt(12)).flatten()
    moved = offset[offset.abs() > 1e-6]
    assert float(moved.var()) == pytest.approx(0.2**2 / 12, rel=0.05)
    z_q = pure(z).z_q
    assert float(z_q.abs().max()) <= math.sqrt(3) + 1e-6


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_matching_gaussian_fills_the_bins_evenly_and_leaves_the_regulariser_at_rest(make, name):
    quantizer = make("fsp", levels=[8], dim=1, activation=name)
    _, variance = ACTIVATIONS[name]
    z = math.sqrt(variance) * torch.randn(1, 1, 1000, 300)
    out = quantizer.eval()(z)
    p = torch.bincount(out.indices.flatten(), minlength=8) / out.indices.numel()
    expected = {"normal": 1.0, "tanh": 0.995, "sigmoid": 0.995, "laplace": 0.965}[name]
    assert float(torch.exp(-(p * p.log()).sum())) / 8 == pytest.approx(expected, abs=0.004)
    losses = quantizer.train()(z).losses
    assert float(losses["latent_mean"]) < 1e-3
    assert float(losses["latent_variance"]) < 1e-3 * variance**2
    shifted = quantizer(1.5 * z + 0.3)
    assert float(shifted.losses["latent_mean"]) == pytest.approx(0.09, rel=0.1)
    assert float(shifted.losses["latent_variance"]) == pytest.approx((1.25 * variance) ** 2, rel=0.03)


def test_the_gradient_is_that_of_g_whatever_was_drawn(make):
    quantizer = make("fsp", levels=[6, 6], dim=2, activation="tanh")
    z = torch.randn(1, 2, 9, 9, requires_grad=True)
    upstream = torch.randn_like(z)
    (quantizer(z).z_q * upstream).sum().backward()
    expected = upstream * math.sqrt(12) / 2 * (1 - torch.tanh(z.detach()) ** 2)
    torch.testing.assert_close(z.grad, expected)


def test_training_draws_anew_each_time_and_evaluation_the_same(make):
    draws, tokens = make("fsp").draws, torch.zeros(50, 2)
    one, two = (draws.uniform(draws.generator(), tokens, 2) for _ in range(2))
    assert not torch.equal(one, two)
    draws.eval()
    three, four = (draws.uniform(draws.generator(), tokens, 2) for _ in range(2))
    assert torch.equal(three, four)
    assert not torch.equal(three, two)
