import pytest
import torch
from scipy.spatial import cKDTree

from nsvq.tokenizer import ranks


def unfitted(make, **options):
    quantizer = make("vp", **options)
    quantizer.fitted.fill_(False)
    return quantizer


def image(tokens):
    return tokens.T.reshape(1, tokens.shape[1], -1, 100)


# The specification's table (eta = 1, k = 8, M = 16 d), computed there independently: acceptance and mean radius.
@pytest.mark.parametrize(("k", "d", "acceptance", "radius"), [(256, 3, 0.665, 0.431), (1024, 4, 0.620, 0.505)])
@pytest.mark.slow
def test_acceptance_and_radius_of_gaussian_latents_are_those_of_the_specification(make, k, d, acceptance, radius):
    quantizer = unfitted(make, codebook_size=k, dim=d, noise=1.0, push=0.01)
    stats = quantizer(torch.randn(1, d, 100, 200)).stats
    assert float(stats["acceptance"]) == pytest.approx(acceptance, abs=0.015)
    assert float(stats["radius"]) == pytest.approx(radius, rel=0.02)


@pytest.mark.slow
def test_the_step_keeps_the_variance_of_the_latents(make):
    quantizer = unfitted(make, codebook_size=256, dim=4)
    z = torch.randn(1, 4, 200, 200)
    assert float(quantizer(z).z_q.var() / z.var()) == pytest.approx(1, abs=0.01)  # always accepting: above 1.05


def test_each_step_is_the_formula_of_the_paper(make):
    """Distances by a KD-tree of the whole queue in float64; the same draws."""
    quantizer = unfitted(make, codebook_size=64, dim=3, noise=1.3)
    tokens, d, eta = torch.randn(500, 3), 3, 1.3
    quantizer.draws.eval()
    out = quantizer.eval()(image(tokens))
    draws = quantizer.draws
    generator = draws.generator()
    v = draws.normal(generator, tokens, 3).double()
    rho, u = draws.uniform(generator, tokens).double(), draws.uniform(generator, tokens).double()
    tree = cKDTree(quantizer.queue.double().numpy())

    def distances(x):
        found = tree.query(x.numpy(), k=48)[0]  # M = 16 d
        return torch.from_numpy(found[:, 7]), torch.from_numpy(found[:, 47])

    z = tokens.double()
    near, far = distances(z)
    step = v / v.norm(dim=1, keepdim=True) * (eta * far * rho ** (1 / d))[:, None]
    near_there, far_there = distances(z + step)
    alpha = (near * far / (near_there * far_there)) ** d
    accepted = (u < alpha) & (step.norm(dim=1) <= eta * far_there)
    expected = z + accepted[:, None] * step
    moved = out.z_q.permute(0, 2, 3, 1).reshape(-1, 3).double()
    wrong = (moved - expected).abs().amax(1) > 1e-4  # a draw on the edge may fall to either side
    assert int(wrong.sum()) <= 1
    assert float(out.stats["acceptance"]) == pytest.approx(float(accepted.double().mean()), abs=0.004)


def test_the_gradient_is_the_identity_and_the_regulariser_the_formula(make):
    quantizer = unfitted(make)
    z = (torch.randn(2, 3, 6, 6) * 2 + 1).requires_grad_()
    out, upstream = quantizer(z), torch.randn(2, 3, 6, 6)
    (out.z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    z.grad = None
    (3 * out.losses["latent_mean"] + 5 * out.losses["latent_variance"]).backward()
    exact = z.detach().double().requires_grad_()
    flat = exact.permute(0, 2, 3, 1).reshape(-1, 3)
    mean, variance = flat.mean(0).square().mean(), (flat.var(0) - 1).square().mean()
    (3 * mean + 5 * variance).backward()
    assert float(out.losses["latent_mean"].detach()) == pytest.approx(float(mean.detach()), rel=1e-4)
    assert float(out.losses["latent_variance"].detach()) == pytest.approx(float(variance.detach()), rel=1e-4)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_queue_takes_the_drawn_share_in_order_and_evaluation_takes_none(make):
    quantizer = unfitted(make, codebook_size=20, push=0.25, refresh=2)
    size, before = len(quantizer.queue), quantizer.queue.clone()
    tokens = 7 + torch.randn(400, 3)
    quantizer.eval()(image(tokens))
    quantizer.end_step(True)
    assert torch.equal(quantizer.queue, before)
    quantizer.train()(image(tokens))
    quantizer.end_step(True)
    count = int(quantizer.position)
    assert 60 <= count <= 140
    pushed = quantizer.queue[:count]
    assert all((tokens == row).all(1).any() for row in pushed)
    assert torch.equal(quantizer.queue[count:], before[count:])
    assert torch.equal(quantizer.searched, before)  # the tree is built again after `refresh` micro-batches
    quantizer(image(tokens))
    quantizer.end_step(True)
    assert torch.equal(quantizer.searched, quantizer.queue)
    for _ in range(20):
        quantizer(image(tokens))
        quantizer.end_step(True)
    assert len(quantizer.queue) == size
    assert (quantizer.queue > 1).all()


def test_equal_latents_give_no_nan(make):
    quantizer = unfitted(make)
    quantizer.searched.zero_()
    assert quantizer(torch.zeros(1, 3, 4, 4)).z_q.isfinite().all()


def test_after_the_fit_it_is_a_plain_nearest_neighbour_lookup(make):
    quantizer = make("vp")
    assert quantizer.has_codes
    z = torch.randn(1, 3, 8, 8)
    out = quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(out.indices.flatten(), torch.cdist(flat.double(), quantizer.weight.double()).argmin(1))
    quantizer.fitted.fill_(False)
    with pytest.raises(RuntimeError, match="no codes before"):
        quantizer.codebook()


def test_rows_of_one_rank_are_its_own():
    tokens = torch.randn(10, 3)
    assert torch.equal(ranks.rows(tokens, torch.tensor([7, 2])), tokens[[7, 2]])
