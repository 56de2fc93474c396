import torch


def test_lookup_losses_and_gradients_are_those_of_the_unit_sphere(make):
    quantizer = make("fc_l2")
    z = torch.randn(2, 6, 5, 3, requires_grad=True)
    out, upstream = quantizer(z), torch.randn(2, 6, 5, 3)
    ((out.z_q * upstream).sum() + 3 * out.losses["codebook"] + 5 * out.losses["commitment"]).backward()

    w = quantizer.weight.detach().double().requires_grad_()
    flat = z.detach().double().requires_grad_()
    unit = flat / flat.norm(dim=1, keepdim=True)
    codes = w / w.norm(dim=1, keepdim=True)
    cosine = torch.einsum("bdhw,kd->bhwk", unit, codes)
    assert torch.equal(cosine.argmax(-1), out.indices)
    chosen = codes[out.indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(out.z_q.double(), chosen)
    loss = (unit * upstream).sum()
    loss += 3 * (unit.detach() - chosen).square().mean() + 5 * (unit - chosen.detach()).square().mean()
    loss.backward()
    torch.testing.assert_close(z.grad.double(), flat.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.weight.grad.double(), w.grad, rtol=1e-5, atol=1e-7)
