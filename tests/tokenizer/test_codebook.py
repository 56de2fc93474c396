from itertools import product

import pytest
import torch

from nsvq.tokenizer import codebook_tiles
from nsvq.tokenizer.codebook import (
    nearest_code,
    nearest_neighbor_distance,
    nonstationary_loss,
    search_with_nonstationary_loss,
)


def dense_reference(z, codebook, indices, temperature, own=False):
    """Loss, gradient, winner mass and effective codes of eq. 8-10 from N x K x d float64 tensors and autograd. `own`:
    the temperature is in units of a latent's distance to its nearest code."""
    z, codebook = z.double(), codebook.detach().double().requires_grad_()
    distances = (z[:, None] - codebook[None]).square().sum(-1)  # (N, K)
    tau = temperature * distances.amin(1, keepdim=True) if own else temperature
    p = torch.softmax(-distances / tau, 1).detach()
    winner = torch.nn.functional.one_hot(indices, len(codebook)).bool()
    loss = (p * distances).masked_fill(winner, 0).sum() / z.numel()
    loss.backward()
    entropy = -torch.special.xlogy(p, p).sum(1).mean()
    return loss.detach(), codebook.grad, p[winner].mean(), entropy.exp()


def relative(a, b):
    return float((a.detach().double() - b).norm() / b.norm())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(300, 500, 8), (1, 7, 3), (65, 1, 4), (129, 64, 128), (1300, 2500, 8)])
def test_nearest_code_is_the_float64_argmin(shape, offset):
    n, k, d = shape
    z, codes = torch.randn(n, d) + offset, torch.randn(k, d) + offset
    distances = torch.cdist(z.double(), codes.double())
    found = nearest_code(z, codes)
    # Where the choice differs, the two distances agree to float32 rounding.
    picked, best = distances.gather(1, found[:, None]).flatten(), distances.amin(1)
    torch.testing.assert_close(picked, best, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lower_index():
    codes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    z = torch.tensor([[0.9, 0.1], [-0.9, 0.1]])
    assert nearest_code(z, codes).tolist() == [0, 2]
    codes = torch.randn(1500, 16).repeat(2, 1)  # twins in other blocks and other tiles
    z = torch.randn(700, 16)
    assert nearest_code(z, codes).max() < 1500
    assert search_with_nonstationary_loss(z, codes, 1.0)[0].max() < 1500


@pytest.mark.parametrize(("temperature", "own"), [*product([0.01, 0.35, 10.0], [False]), *product([0.05, 2.0], [True])])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(203, 97, 16), (150, 300, 128), (1, 40, 8), (30, 1, 8)])
@pytest.mark.parametrize("sparse", [False, True])
def test_nonstationary_loss_and_gradient_equal_a_dense_float64_reference(
    monkeypatch, sparse, shape, offset, temperature, own
):
    monkeypatch.setattr(codebook_tiles, "_WEIGHTS", 64 * 100)  # several uneven tiles
    monkeypatch.setattr(codebook_tiles, "_PAIRS", 64 * 6)
    monkeypatch.setattr(codebook_tiles, "_SPARSE_FROM", 1 if sparse else 1000)
    monkeypatch.setattr(codebook_tiles, "_SPARSE_SHARE", 1)
    n, k, d = shape
    z, codes = 0.1 * torch.randn(n, d) + offset, 0.1 * torch.randn(k, d) + offset
    if k > 5:
        codes[5] = codes[3]  # a duplicate
    codes.requires_grad_()
    found, fused = search_with_nonstationary_loss(z, codes, temperature, own)
    others = torch.randint(k, (n,))  # winners that a caller chose, not the nearest
    for indices, ns in ((found, fused), (others, nonstationary_loss(z, codes, others, temperature, own))):
        loss, gradient, mass, effective = dense_reference(z, codes, indices, temperature, own)
        codes.grad = None
        (3 * ns.loss).backward()
        if k == 1:
            assert ns.loss.abs() < 1e-9
            assert codes.grad.abs().max() < 1e-6
        else:
            assert relative(ns.loss, loss) < 1e-5
            assert relative(codes.grad, 3 * gradient) < 1e-5
        assert float(ns.winner_mass) == pytest.approx(float(mass), rel=1e-5)
        assert float(ns.effective_codes) == pytest.approx(float(effective), rel=1e-4)
    assert torch.equal(found, nearest_code(z, codes))


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, "_add_near"), (10.0, "_add_all")])
@pytest.mark.slow
def test_blocks_of_negligible_weight_are_passed_over_where_they_are_many(monkeypatch, temperature, expected):
    called = set()
    for name in ("_add_near", "_add_all"):
        way = getattr(codebook_tiles, name)
        monkeypatch.setattr(codebook_tiles, name, lambda *a, way=way, name=name: called.add(name) or way(*a))
    z, codes = torch.randn(600, 128), torch.randn(2000, 128, requires_grad=True)
    indices, ns = search_with_nonstationary_loss(z, codes, temperature)
    assert called == {expected}
    ns.loss.backward()
    loss, gradient, _, _ = dense_reference(z, codes, indices, temperature)
    assert relative(ns.loss, loss) < 5e-4  # what float32 distances allow here, see below
    assert relative(codes.grad, gradient) < 5e-4


@pytest.mark.parametrize("count", [30, 600])
def test_a_latent_that_is_not_a_number_makes_the_loss_none(count):
    z = torch.randn(count, 128)
    z[3, 2] = torch.nan
    assert search_with_nonstationary_loss(z, torch.randn(2000, 128), 0.1)[1].loss.isnan()


def test_a_sharp_softmax_is_as_exact_as_float32_distances_allow():
    """A distance is known to about |z||c| 2^-24, and a weight to that over the temperature."""
    z, codes = torch.randn(200, 64), torch.randn(400, 64, requires_grad=True)
    for temperature in (0.01, 0.35):
        indices, ns = search_with_nonstationary_loss(z, codes, temperature)
        loss, gradient, _, _ = dense_reference(z, codes, indices, temperature)
        codes.grad = None
        ns.loss.backward()
        tolerance = 1e-5 + 2**-24 * float(z.norm(dim=1).max() * codes.detach().norm(dim=1).max()) / temperature
        assert relative(ns.loss, loss) < tolerance
        assert relative(codes.grad, gradient) < tolerance


def test_a_temperature_of_each_latents_own_knows_no_scale_and_bears_latents_on_their_codes():
    z, codes = torch.randn(200, 16), torch.randn(300, 16)
    expected = search_with_nonstationary_loss(z, codes, 0.3, True)[1]
    for scale in (1e-3, 1e3):
        ns = search_with_nonstationary_loss(scale * z, scale * codes, 0.3, True)[1]
        torch.testing.assert_close(ns.weight_sums, expected.weight_sums, rtol=1e-3, atol=1e-5)
    codes[:100], codes[200:] = z[:100], codes[100:200]  # on a code, and twins
    ns = search_with_nonstationary_loss(z, codes, 0.3, True)[1]
    assert ns.loss.isfinite()
    assert ns.gradient.isfinite().all()
    alone = search_with_nonstationary_loss(z[:100], codes[:200], 0.3, True)[1]
    assert float(alone.winner_mass) == pytest.approx(1, abs=1e-6)  # such a latent pulls nothing
    assert search_with_nonstationary_loss(torch.zeros(3, 4), torch.zeros(5, 4), 0.3, True)[1].loss == 0


@pytest.mark.parametrize("temperature", [1e-9, 1e-6, 1e-3])
def test_a_temperature_below_rounding_leaves_latents_to_their_winners(temperature):
    codes = torch.randn(256, 32)
    z = codes[torch.randint(256, (512,))] + 1e-6 * torch.randn(512, 32)
    _, ns = search_with_nonstationary_loss(z, codes, temperature)
    assert float(ns.winner_mass) == pytest.approx(1, abs=1e-6)
    assert float(ns.loss) == pytest.approx(0, abs=1e-6)
    assert float(ns.effective_codes) == pytest.approx(1, abs=1e-3)
    z = torch.randn(512, 32)
    indices, ns = search_with_nonstationary_loss(z, codes, temperature)
    _, _, mass, _ = dense_reference(z, codes, indices, temperature)
    assert float(ns.winner_mass) == pytest.approx(float(mass), abs=2e-2)


def test_nonstationary_loss_reaches_the_codebook_alone():
    z, codes = torch.randn(40, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nonstationary_loss(z, codes, nearest_code(z, codes), 1.0).loss.backward()
    assert z.grad is None
    assert codes.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_distances_are_float32_under_autocast_and_reduced_matmul_precision(precision):
    z, codes = torch.randn(64, 32) + 100, torch.randn(256, 32) + 100
    indices, expected = search_with_nonstationary_loss(z, codes, 0.35)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(z, codes), indices)
            assert torch.equal(nonstationary_loss(z, codes, indices, 0.35).loss, expected.loss)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_compile_keeps_one_graph_and_its_gradient():
    z, codes = torch.randn(50, 8), torch.randn(70, 8, requires_grad=True)

    def step(z, codes):
        indices, ns = search_with_nonstationary_loss(z, codes, 0.35)
        return (z - codes[nearest_code(z, codes)]).square().mean() + ns.loss + codes[indices].mean()

    (expected,) = torch.autograd.grad(step(z, codes), codes)
    (found,) = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(z, codes), codes)
    torch.testing.assert_close(found, expected)
    torch.library.opcheck(torch.ops.nsvq.nearest_code.default, (z, codes.detach(), False))
    torch.library.opcheck(torch.ops.nsvq.nonstationary.default, (z, codes.detach(), None, 0.35, False))
    torch.library.opcheck(torch.ops.nsvq.nonstationary.default, (z, codes.detach(), torch.arange(50), 0.35, True))


def test_no_tensor_of_latents_times_codes_is_kept():
    """The graph of the loss holds no more than tensors of the codebook's size."""
    codes = torch.randn(50, 4, requires_grad=True)
    z = torch.randn(1000, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nonstationary_loss(z, codes, nearest_code(z, codes), 0.35)
    assert max(kept) <= codes.numel()


@pytest.mark.parametrize("count", [2, 30, 1100])
def test_nearest_neighbor_distance_finds_a_clone(count):
    codes = torch.randn(count, 6) + 5
    codes[count // 2] = codes[0] + 0.001
    expected = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close(nearest_neighbor_distance(codes).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("z", "codes"), [((4, 3), (5, 2)), ((4,), (5, 4)), ((4, 3), (0, 3))])
def test_wrong_shapes_are_refused(z, codes):
    with pytest.raises(ValueError, match="expected z"):
        nearest_code(torch.zeros(z), torch.zeros(codes))


def test_what_has_no_answer_is_refused():
    codes = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="no neighbor"):
        nearest_neighbor_distance(codes[:1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        search_with_nonstationary_loss(codes, codes, 0.0)
    with pytest.raises(ValueError, match="there are none"):
        search_with_nonstationary_loss(codes[:0], codes, 1.0)
    assert nearest_code(codes[:0], codes).shape == (0,)
