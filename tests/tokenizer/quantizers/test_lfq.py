import pytest
import torch


def dense(z, tau):
    """E[H(p)] and H(E[p]) of the softmax over all 2^d codes, float64."""
    d = z.shape[1]
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d).double()
    p = torch.softmax(2 * z @ corners.T / tau, 1)
    mean = p.mean(0)
    return -torch.special.xlogy(p, p).sum(1).mean(), -torch.special.xlogy(mean, mean).sum()


@pytest.mark.parametrize(("dim", "tau"), [(5, 0.5), (6, 2.0), (2, 0.1)])
def test_factorised_entropies_and_gradient_equal_the_softmax_over_all_codes(make, dim, tau):
    quantizer = make("lfq", dim=dim, temperature=tau)
    z = (0.3 * torch.randn(2, dim, 4, 4)).requires_grad_()
    out = quantizer(z)
    out.losses["entropy"].backward()
    exact = z.detach().double().requires_grad_()
    of_tokens, of_mean = dense(exact.permute(0, 2, 3, 1).reshape(-1, dim), tau)
    (of_tokens - of_mean).backward()
    assert float(out.stats["token_entropy"].detach()) == pytest.approx(float(of_tokens.detach()), rel=1e-4, abs=1e-6)
    assert float(out.stats["mean_entropy"].detach()) == pytest.approx(float(of_mean.detach()), rel=1e-4)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_codes_are_signs_with_a_gradient_straight_through(make):
    quantizer = make("lfq")
    z = torch.randn(2, 6, 5, 5, requires_grad=True)
    out, upstream = quantizer(z), torch.randn(2, 6, 5, 5)
    assert torch.equal(out.z_q, z.sign())
    bits = (z.detach() > 0).long()
    assert torch.equal(out.indices, sum(bits[:, i] << i for i in range(6)))
    (out.z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert float(out.losses["commitment"].detach()) == pytest.approx(
        float((z - z.sign()).square().mean().detach()), rel=1e-5
    )


def test_the_gradient_is_finite_at_the_published_temperature_and_eighteen_bits(make):
    quantizer = make("lfq", dim=18, temperature=0.01)
    z = torch.randn(1, 18, 16, 16, requires_grad=True)
    out = quantizer(z)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantizer(z)
    assert max(kept) <= 2**18  # and not 256 x 2^18
    out.losses["entropy"].backward()
    assert z.grad.isfinite().all()


def test_too_many_bits_are_refused(make):
    with pytest.raises(ValueError, match="at most 2\\^20"):
        make("lfq", dim=21)
