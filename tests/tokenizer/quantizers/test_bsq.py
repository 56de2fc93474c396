import pytest
import torch


def test_codes_entropies_and_gradients_equal_the_formula(make):
    quantizer = make("bsq", dim=5, temperature=0.2)
    z = torch.randn(2, 5, 4, 4, requires_grad=True)
    out, upstream = quantizer(z), torch.randn(2, 5, 4, 4)
    ((out.z_q * upstream).sum() + 3 * out.losses["entropy"]).backward()

    exact = z.detach().double().requires_grad_()
    v = exact / exact.norm(dim=1, keepdim=True)
    p = torch.sigmoid(4 * v / (5**0.5 * 0.2))
    mean = p.mean((0, 2, 3))

    def entropy(p):
        return -(p * p.log() + (1 - p) * (1 - p).log())

    of_tokens, of_mean = entropy(p).sum(1).mean(), entropy(mean).sum()
    ((v * upstream).sum() + 3 * (of_tokens - of_mean)).backward()
    assert float(out.losses["entropy"].detach()) == pytest.approx(float((of_tokens - of_mean).detach()), rel=1e-4)
    torch.testing.assert_close(out.z_q.double(), v.sign() / 5**0.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_bits_of_one_channel_follow_the_two_point_softmax(make):
    """p is the softmax over the two codes of a channel of -distance^2 / tau, as the paper's soft quantization is."""
    quantizer = make("bsq", dim=3, temperature=0.3)
    v = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    corner = 3**-0.5
    logits = torch.stack([-((v + corner) ** 2), -((v - corner) ** 2)]) / 0.3
    p = torch.softmax(logits.double(), 0)
    of_tokens, _ = quantizer.entropies(v)
    assert float(of_tokens) == pytest.approx(float(-(p * p.log()).sum((0, 2)).mean()), rel=1e-4)


def test_codes_lie_on_the_unit_sphere(make):
    torch.testing.assert_close(make("bsq").codebook().norm(dim=1), torch.ones(64))
