"""What the codebook sends to other ranks in a step (docs/watching.md, Several GPUs)."""

import pytest
import torch
import torch.distributed as dist

from nsvq.tokenizer import ranks

K, D = 40, 6


@pytest.fixture
def sent(monkeypatch):
    """Shapes that are all-reduced, with a second rank that has the same numbers."""
    shapes = []
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: (shapes.append(tuple(tensor.shape)), tensor.mul_(2)))
    return shapes


def step(quantizer):
    quantizer.train()
    quantized = quantizer(torch.randn(2, D, 4, 4), 0.35 if quantizer.learns_codes else None)
    quantizer.end_step(True)
    return quantized


def test_moving_averages_send_their_sums_and_counts_once_a_step(make, sent):
    """(K d + K) float32, 34 MB for K = 65,536 and d = 128; with revival the counts again, and a latent for
    each code, since the host does not wait to learn which are dead."""
    quantizer = make("ema")
    step(quantizer)
    assert sorted(sent) == [(K,), (K, D)]
    sent.clear()
    quantizer.revive_after = 1e9  # none is dead
    step(quantizer)
    assert (sent.count((K, D)), sent.count((K,))) == (2, 2)


def test_a_mean_without_a_gradient_is_the_same_to_the_bit_on_every_rank(monkeypatch):
    """Or a run that resumes, for which all ranks read what the first one wrote, would not be the one that went on."""
    values = torch.randn(2, 1000) * torch.tensor([[1.0], [30.0]])
    found = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, rank=rank: tensor.add_(values[1 - rank]))
        found.append(ranks.mean(values[rank]))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], values.mean(0))


@pytest.mark.parametrize("name", ["vq", "simvq", "fsq"])
def test_methods_that_train_by_gradients_send_nothing_of_their_own(make, sent, name):
    quantizer = make(name, dim=D) if name != "fsq" else make(name)
    quantizer.train()
    quantizer(torch.randn(2, quantizer.dim, 4, 4), 0.35 if quantizer.learns_codes else None)
    quantizer.end_step(True)
    assert sent == []


def test_a_rank_that_is_alone_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert ranks.world() == (1, 2)
    with ranks.alone():
        assert ranks.world() == (0, 1)
        assert ranks.total(torch.ones(3)).tolist() == [1, 1, 1]  # an all-reduce would raise here
    assert ranks.world() == (1, 2)
