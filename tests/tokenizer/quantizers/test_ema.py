import pytest
import torch

from nsvq.tokenizer.quantizers.ema import decay_of_step


def step(quantizer, z):
    out = quantizer(z)
    quantizer.end_step(True)
    return out


def test_codes_follow_the_formula_over_several_steps(make):
    quantizer = make("ema", decay=0.8, eps=1e-3)
    code = quantizer.weight.double()
    count, total = torch.full((40,), 0.2).double(), 0.2 * code
    for _ in range(4):
        z = torch.randn(2, 6, 7, 7)
        out = step(quantizer, z)
        flat, indices = z.permute(0, 2, 3, 1).reshape(-1, 6).double(), out.indices.flatten()
        assert torch.equal(indices, torch.cdist(flat, code).argmin(1))
        choice = torch.nn.functional.one_hot(indices, 40).double()
        count = 0.8 * count + 0.2 * choice.sum(0)
        total = 0.8 * total + 0.2 * choice.T @ flat
        code = torch.where(count[:, None] >= 1e-3, total / count[:, None], code)
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


def test_a_code_that_wins_nothing_stays_where_it_is_and_follows_its_first_latent(make):
    quantizer = make("ema", decay=0.9)
    with torch.no_grad():
        quantizer.weight[:5] += 50  # out of reach
    quantizer._start_averages()
    far = quantizer.weight[:5].clone()
    for _ in range(1500):  # counts leave the range of float32
        step(quantizer, torch.randn(1, 6, 4, 4))
    torch.testing.assert_close(quantizer.weight[:5], far, rtol=1e-4, atol=0)
    z = (far[0] + 1)[None, :, None, None]
    step(quantizer, z)
    torch.testing.assert_close(quantizer.weight[0], z.flatten())
    torch.testing.assert_close(quantizer.weight[1:5], far[1:], rtol=1e-4, atol=0)


def test_codes_that_win_nothing_for_long_enough_move_onto_latents_of_the_step(make):
    quantizer = make("ema")
    quantizer.revive_after = 10
    with torch.no_grad():
        quantizer.weight[:30] += 50  # out of reach
    quantizer._start_averages()
    waited, revived = torch.zeros(40), []
    for _ in range(25):
        z = torch.randn(1, 6, 8, 8)  # 64 tokens: 1.6 a code
        wins = torch.bincount(step(quantizer, z).indices.flatten(), minlength=40)
        waited = torch.where(wins > 0, 0, waited + 1.6)
        dead = waited > 10
        waited[dead] = 0
        is_latent = (quantizer.weight[:, None] == z.permute(0, 2, 3, 1).reshape(-1, 6)).all(-1)
        assert torch.equal(is_latent.any(1), dead)
        assert int(is_latent.sum(0).max()) <= 1  # of two codes on one latent, one would never win
        revived.append(int(dead.sum()))
    assert revived[:6] == [0] * 6  # 6 x 1.6 < 10
    assert revived[6] >= 30
    assert float(quantizer.weight.abs().max()) < 20


def test_where_the_dead_outnumber_the_latents_the_rest_moves_in_later_steps(make):
    quantizer = make("ema")
    quantizer.revive_after = 0.2
    with torch.no_grad():
        quantizer.weight[:39] += 50
    quantizer._start_averages()
    left = []
    for _ in range(5):
        step(quantizer, 0.01 * torch.randn(1, 6, 2, 5))  # 10 tokens
        left.append(int((quantizer.weight.abs().amax(1) > 20).sum()))
    assert left == [29, 19, 9, 0, 0]


@pytest.mark.parametrize(("tokens", "codes"), [(32_768, 65_536), (2_048, 4_096), (64, 40), (1, 1000)])
def test_at_the_decay_of_a_step_a_code_of_mean_use_is_an_average_of_25_tokens(tokens, codes):
    count = 0.0
    for _ in range(int(200 * max(1, 25 * codes / tokens))):
        decay = decay_of_step(tokens, codes)
        count = decay * count + tokens / codes  # of all tokens that a code has won, by their weight now
    assert count == pytest.approx(25, rel=1e-3)


def test_the_decay_of_a_large_step_keeps_something_of_those_before():
    assert decay_of_step(32_768, 65_536) == 0.98
    assert decay_of_step(10**6, 1024) == 0.8
