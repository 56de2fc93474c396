import pytest
import torch

from nsvq.tokenizer.quantizers import ibq


def dense(z, codes, tau):
    """z_q and the losses with N x K tensors and autograd."""
    logits = z @ codes.T
    s = torch.softmax(logits, 1)
    hard = torch.nn.functional.one_hot(logits.argmax(1), len(codes)).to(s)
    z_q, z_h = (hard + s - s.detach()) @ codes, hard @ codes
    p = torch.softmax(logits / tau, 1)
    mean = p.mean(0)
    entropy = -torch.special.xlogy(p, p).sum(1).mean() + torch.special.xlogy(mean, mean).sum()
    losses = {
        "joint": (z_q - z).square().mean(),
        "codebook": (z.detach() - z_h).square().mean(),
        "commitment": (z - z_h.detach()).square().mean(),
        "entropy": entropy,
    }
    return z_q, losses


@pytest.mark.parametrize("name", ["z_q", "joint", "codebook", "commitment", "entropy"])
def test_values_and_both_gradients_equal_dense_float64(make, monkeypatch, name):
    monkeypatch.setattr(ibq, "rows_in_tile", lambda codes: 7)  # several uneven tiles
    quantizer = make("ibq")
    z = torch.randn(2, 6, 5, 5, requires_grad=True)
    out, upstream = quantizer(z), torch.randn(50, 6)
    value = (out.z_q.permute(0, 2, 3, 1).reshape(-1, 6) * upstream).sum() if name == "z_q" else out.losses[name]
    value.backward()

    exact, codes = z.detach().double().requires_grad_(), quantizer.weight.detach().double().requires_grad_()
    z_q, losses = dense(exact.permute(0, 2, 3, 1).reshape(-1, 6), codes, 0.5)
    expected = (z_q * upstream).sum() if name == "z_q" else losses[name]
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for ours, theirs in ((z.grad, exact.grad), (quantizer.weight.grad, codes.grad)):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


def test_every_code_gets_a_gradient_from_the_output_alone(make):
    quantizer = make("ibq")
    out = quantizer(torch.randn(1, 6, 2, 2))
    out.z_q.square().sum().backward()
    assert len(out.indices.unique()) <= 4
    assert (quantizer.weight.grad.abs().sum(1) > 0).all()


def test_no_tensor_of_latents_times_codes_is_kept(make):
    quantizer = make("ibq", codebook_size=300)
    z, kept = torch.randn(1, 6, 20, 20, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantizer(z)
    assert max(kept) <= 400 * 6
