import pytest
import torch

from tokenizer import codebook as engine
from tokenizer.codebook import nearest_code, nearest_neighbor_distance, nonstationary_loss


def dense_reference(z, codebook, indices, temperature):
    """Loss, gradient, winner mass and effective codes of eq. 8-10 from N x K x d float64 tensors and autograd."""
    z, codebook = z.double(), codebook.detach().double().requires_grad_()
    distances = (z[:, None] - codebook[None]).square().sum(-1)  # (N, K)
    p = torch.softmax(-distances / temperature, 1).detach()
    winner = torch.nn.functional.one_hot(indices, len(codebook)).bool()
    loss = (p * distances).masked_fill(winner, 0).sum() / z.numel()
    loss.backward()
    entropy = -torch.special.xlogy(p, p).sum(1).mean()
    return loss.detach(), codebook.grad, p[winner].mean(), entropy.exp()


def relative(a, b):
    return float((a.detach().double() - b).norm() / b.norm())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(300, 500, 8), (1, 7, 3), (65, 1, 4), (129, 64, 128)])
def test_nearest_code_is_the_float64_argmin(shape, offset):
    n, k, d = shape
    z, codes = torch.randn(n, d) + offset, torch.randn(k, d) + offset
    distances = torch.cdist(z.double(), codes.double())
    found = nearest_code(z, codes)
    # Where the choice differs, the two distances agree to float32 rounding.
    picked, best = distances.gather(1, found[:, None]).flatten(), distances.amin(1)
    torch.testing.assert_close(picked, best, rtol=1e-6, atol=1e-6 * max(offset, 1))


def test_ties_go_to_the_lower_index():
    codes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    z = torch.tensor([[0.9, 0.1], [-0.9, 0.1]])
    assert nearest_code(z, codes).tolist() == [0, 2]


@pytest.mark.parametrize("temperature", [0.05, 0.35, 10.0])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_nonstationary_loss_and_gradient_equal_a_dense_float64_reference(monkeypatch, temperature, offset):
    monkeypatch.setattr(engine, "_TILE_ELEMENTS", 700)  # several uneven tiles
    z, codes = 0.5 * torch.randn(203, 16) + offset, (0.5 * torch.randn(97, 16) + offset).requires_grad_()
    with torch.no_grad():
        codes[5] = codes[3]  # a duplicate
    indices = nearest_code(z, codes)
    loss, gradient, mass, effective = dense_reference(z, codes, indices, temperature)
    ns = nonstationary_loss(z, codes, indices, temperature)
    (3 * ns.loss).backward()
    tolerance = 1e-5 if offset == 0 else 1e-4  # float32 inputs at 20 hold 2e-6 of themselves
    assert relative(ns.loss, loss) < tolerance
    assert relative(codes.grad, 3 * gradient) < tolerance
    assert float(ns.winner_mass) == pytest.approx(float(mass), rel=1e-4)
    assert float(ns.effective_codes) == pytest.approx(float(effective), rel=1e-3)


def test_nonstationary_loss_reaches_the_codebook_alone():
    z, codes = torch.randn(40, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nonstationary_loss(z, codes, nearest_code(z, codes), 1.0).loss.backward()
    assert z.grad is None
    assert codes.grad.abs().sum() > 0


def test_one_code_has_no_losers_to_pull():
    z, codes = torch.randn(10, 4), torch.randn(1, 4, requires_grad=True)
    ns = nonstationary_loss(z, codes, nearest_code(z, codes), 0.35)
    ns.loss.backward()
    assert ns.loss == 0
    assert codes.grad.abs().max() < 1e-6


def test_distances_are_float32_under_autocast():
    z, codes = torch.randn(64, 32) + 100, torch.randn(256, 32) + 100
    indices = nearest_code(z, codes)
    expected = dense_reference(z, codes, indices, 0.35)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, codes), indices)
        assert relative(nonstationary_loss(z, codes, indices, 0.35).loss, expected) < 1e-3


def test_no_tensor_of_latents_times_codes_is_kept(monkeypatch):
    """The graph of the loss holds no more than tensors of the codebook's size."""
    monkeypatch.setattr(engine, "_TILE_ELEMENTS", 1000)
    codes = torch.randn(50, 4, requires_grad=True)
    z = torch.randn(1000, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nonstationary_loss(z, codes, nearest_code(z, codes), 0.35)
    assert max(kept) <= codes.numel()


def test_nearest_neighbor_distance_finds_a_clone(monkeypatch):
    monkeypatch.setattr(engine, "_TILE_ELEMENTS", 64)
    codes = torch.randn(30, 6) + 5
    codes[17] = codes[4] + 0.001
    expected = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close(nearest_neighbor_distance(codes).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("z", "codes"), [((4, 3), (5, 2)), ((4,), (5, 4)), ((4, 3), (0, 3))])
def test_wrong_shapes_are_refused(z, codes):
    with pytest.raises(ValueError, match="expected z"):
        nearest_code(torch.zeros(z), torch.zeros(codes))
