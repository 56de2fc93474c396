import torch


def step(quantizer, z):
    out = quantizer(z)
    quantizer.end_step(True)
    return out


def test_codes_follow_the_formula_over_several_steps(make):
    quantizer = make("ema", decay=0.8, eps=1e-3)
    code = quantizer.weight.double()
    count, total = torch.ones(40).double(), code.clone()
    for _ in range(4):
        z = torch.randn(2, 6, 7, 7)
        out = step(quantizer, z)
        flat, indices = z.permute(0, 2, 3, 1).reshape(-1, 6).double(), out.indices.flatten()
        assert torch.equal(indices, torch.cdist(flat, code).argmin(1))
        choice = torch.nn.functional.one_hot(indices, 40).double()
        count = 0.8 * count + 0.2 * choice.sum(0)
        total = 0.8 * total + 0.2 * choice.T @ flat
        smoothed = (count + 1e-3) / (count.sum() + 40 * 1e-3) * count.sum()
        code = total / smoothed[:, None]
        torch.testing.assert_close(quantizer.weight.double(), code, rtol=1e-5, atol=1e-6)
    assert not list(quantizer.parameters())
    assert quantizer.terms == ("commitment",)


def test_the_ns_loss_moves_codes_to_the_fixed_point_of_its_gradient(make):
    """Without memory a step lands where codebook loss + alpha NS loss has no gradient, the weights held."""
    quantizer = make("ema", decay=0.0, eps=1e-9)
    quantizer.nonstationary_weight = alpha = 0.3
    before, z = quantizer.weight.double().clone(), torch.randn(2, 6, 7, 7)
    quantizer(z, 2.0)
    quantizer.end_step(True)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 6).double()
    distances = torch.cdist(flat, before).square()
    winner = torch.nn.functional.one_hot(distances.argmin(1), 40).double()
    weights = winner + alpha * torch.softmax(-distances / 2.0, 1) * (1 - winner)  # (N, K)
    code = quantizer.weight.double().clone().requires_grad_(True)
    (weights * torch.cdist(flat, code).square()).sum().backward()
    assert float(code.grad.abs().max()) < 1e-3
    torch.testing.assert_close(code, (weights.T @ flat) / weights.sum(0)[:, None], rtol=1e-4, atol=1e-5)


def test_micro_batches_make_one_update_and_evaluation_none(make):
    torch.manual_seed(1)
    one = make("ema")
    torch.manual_seed(1)
    two = make("ema")
    z = torch.randn(4, 6, 5, 5)
    step(one, z)
    for part in z.split(1):
        two(part)
    two.end_step(True)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-6)
    before = two.weight.clone()
    two.eval()(10 * z)
    two.train().end_step(True)
    torch.testing.assert_close(two.counts, 0.99 * one.counts)  # an empty step: counts fade, codes stay
    torch.testing.assert_close(two.weight, before, rtol=1e-3, atol=1e-5)


def test_revival_moves_exactly_the_rare_codes_onto_latents_of_the_step(make):
    quantizer = make("ema", revive_below=0.5, decay=0.5)
    with torch.no_grad():
        quantizer.weight[:10] += 50  # out of reach
    z = torch.randn(8, 6, 8, 8)
    for _ in range(3):
        counts = quantizer.counts.clone()
        out = step(quantizer, z)
        hits = torch.bincount(out.indices.flatten(), minlength=40)
        counts = 0.5 * counts + 0.5 * hits
        alive = counts >= 0.5 * counts.sum() / 40
        assert not alive.all()
        latents = z.permute(0, 2, 3, 1).reshape(-1, 6)
        is_latent = (quantizer.weight[:, None] == latents).all(-1).any(1)
        assert torch.equal(is_latent, ~alive)
        torch.testing.assert_close(quantizer.counts[alive], counts[alive])
    assert float(quantizer.weight.abs().max()) < 20
