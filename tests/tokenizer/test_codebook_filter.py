"""The bfloat16 filter of the search on a CPU, forced on: where there is no matrix unit for it, it is merely slow."""

import pytest
import torch

from nsvq.tokenizer import codebook_tiles as engine
from nsvq.tokenizer.codebook import _centered, nearest_code, nearest_neighbor_distance


@pytest.fixture
def answers(monkeypatch):
    """Whether each tile was answered by the filter (True) or left to the plain search."""
    answers = []
    filtered_search = engine._filtered_search

    def spy(*args):
        found = filtered_search(*args)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(engine, "_filter_pays", lambda z, codebook: True)
    monkeypatch.setattr(engine, "_filtered_search", spy)
    monkeypatch.setattr(engine, "_LATENTS_PER_THREAD", 64)  # several tiles
    return answers


def plain(z, codes, exclude_self=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_filter_pays", lambda z, codebook: False)
        return torch.ops.nsvq.nearest_code(z, codes, exclude_self)


def along(direction, count):
    """Vectors of one direction, where the bound of |z - z'||c| is reached."""
    return (1 + torch.rand(count, 1)) * direction


def bounded(kind):
    if kind == "gaussian":
        return torch.randn(200, 128), torch.randn(500, 128)
    if kind == "offset":
        return torch.randn(200, 32) + 1000, torch.randn(500, 32) + 1000
    if kind == "one channel":
        return torch.randn(200, 1), torch.randn(500, 1)
    if kind == "scales":
        return torch.randn(200, 64) * torch.logspace(-9, 3, 200)[:, None], torch.randn(500, 64) * torch.logspace(
            -9, 3, 500
        )[:, None]
    if kind == "parallel":
        return along(torch.ones(128), 200), along(torch.ones(128), 500)
    if kind == "opposite":
        return along(torch.ones(128), 200), along(-torch.ones(128), 500)
    if kind == "rounded latents":
        return along(torch.ones(128), 200).bfloat16().float(), along(torch.ones(128), 500)
    if kind == "rounded codes":
        return along(torch.ones(128), 200), along(torch.ones(128), 500).bfloat16().float()
    if kind == "small":
        return 1e-6 * torch.randn(200, 16), 1e-6 * torch.randn(500, 16)
    return 1e16 * torch.randn(200, 16), 1e16 * torch.randn(500, 16)


KINDS = ["gaussian", "offset", "one channel", "scales", "parallel", "opposite", "rounded latents", "rounded codes"]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "small", "large"])
def test_no_bound_is_above_its_distance(kind, centered):
    z, codes = bounded(kind)
    z, codes = _centered(z, codes) if centered else (z, codes)
    keys, queries, squares = engine._lower_bounds(z, codes)
    distances = torch.cdist(codes.double(), z.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert (keys[: len(codes)].double() @ queries.double().T <= distances).all()
    assert (keys @ queries.T)[: len(codes)].le(distances.float().bfloat16()).all()  # as the search has them
    assert (keys @ queries.T)[len(codes) :].eq(torch.inf).all()  # what fills the last block never wins
    torch.testing.assert_close(squares, z.square().sum(1))


def test_bounds_are_close_to_the_distances():
    z, codes = torch.randn(200, 128), torch.randn(512, 128)
    keys, queries, _ = engine._lower_bounds(z, codes)
    distances = torch.cdist(codes, z).square()
    assert (distances - keys.float() @ queries.float().T).max() < 0.01 * distances.max()


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(300, 500, 8), (1, 300, 3), (65, 1, 4), (129, 64, 128), (700, 2500, 64), (9, 99, 1)])
def test_filtered_search_is_the_float64_argmin(answers, shape, offset):
    n, k, d = shape
    z, codes = torch.randn(n, d) + offset, torch.randn(k, d) + offset
    distances = torch.cdist(z.double(), codes.double())
    picked = distances.gather(1, nearest_code(z, codes)[:, None]).flatten()
    torch.testing.assert_close(picked, distances.amin(1), rtol=1e-6, atol=1e-6)
    assert all(answers)
    assert answers


def test_winners_that_bfloat16_cannot_tell_apart_are_found(answers):
    codes = torch.randn(1000, 128)
    codes = torch.cat([codes, codes + 0.005 * torch.randn(1000, 128)])  # twins in other blocks
    z = codes[torch.randint(2000, (600,))] + 0.05 * torch.randn(600, 128)
    z, codes = _centered(z, codes)
    distances = torch.cdist(z.double(), codes.double()).square()
    best, rounding = distances.amin(1), 1e-4  # about 2^-20 |z||c|
    picked = distances.gather(1, nearest_code(z, codes)[:, None]).flatten()
    assert (picked - best).max() < rounding
    in_bfloat16 = torch.cdist(z.bfloat16().double(), codes.bfloat16().double()).argmin(1)
    assert (distances.gather(1, in_bfloat16[:, None]).flatten() - best > 10 * rounding).sum() > 20
    assert all(answers)


@pytest.mark.parametrize("dim", [16, 128])
def test_ties_go_to_the_lower_index(answers, dim):
    codes = torch.randn(1500, dim).repeat(2, 1)  # twins in other blocks and other tiles
    z = torch.randn(700, dim)
    found = nearest_code(z, codes)
    assert found.max() < 1500
    assert torch.equal(found, plain(z, codes))
    assert all(answers)


def test_a_twin_alone_in_the_recheck_ties(answers):
    """Its score must round as the first one's did, among others."""
    for _ in range(30):
        codes = torch.randn(100, 128)
        codes[90] = codes[3]
        assert nearest_code(codes[3:6] + 0.3 * torch.randn(3, 128), codes).tolist() == [3, 4, 5]
    assert all(answers)


@pytest.mark.parametrize("count", [2, 30, 65, 1100])
def test_a_code_is_not_its_own_neighbor(answers, count):
    codes = torch.randn(count, 6) + 5
    codes[count // 2] = codes[0] + 0.001
    expected = torch.cdist(codes.double(), codes.double()).fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close(nearest_neighbor_distance(codes).double(), expected, rtol=1e-4, atol=1e-6)
    assert all(answers)


@pytest.mark.parametrize("kind", ["duplicates", "tiny spread"])
def test_where_too_many_blocks_stay_open_the_plain_search_answers(answers, kind):
    z = torch.randn(300, 32)
    codes = torch.randn(70, 32).repeat(20, 1) if kind == "duplicates" else 1e-4 * torch.randn(1400, 32)
    assert torch.equal(nearest_code(z, codes), plain(z, codes))
    assert answers == [False]  # and the filter is not tried again
    assert torch.equal(torch.ops.nsvq.nearest_code(codes, codes, True), plain(codes, codes, True))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e-5, 1e5, 1e15, 1e18, 1e25, 1e38])
def test_magnitudes_at_the_edge_of_float32_give_what_the_plain_search_gives(answers, scale):
    z, codes = scale * torch.randn(150, 8), scale * torch.randn(300, 8)
    assert torch.equal(nearest_code(z, codes), plain(z, codes))
    assert bool(answers) == (1e-6 < scale < 1e17)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["latent", "code"])
def test_numbers_that_are_not_finite_give_what_the_plain_search_gives(answers, value, where):
    z, codes = torch.randn(150, 8), torch.randn(300, 8)
    (z if where == "latent" else codes)[3, 2] = value
    assert torch.equal(nearest_code(z, codes), plain(z, codes))
    assert not answers


def test_no_latents_have_no_codes(answers):
    assert nearest_code(torch.zeros(0, 4), torch.randn(9, 4)).shape == (0,)


@pytest.mark.skipif(not engine._has_fast_bfloat16(), reason="needs a CPU that multiplies bfloat16 numbers faster")
def test_the_filter_is_used_where_it_pays():
    channels, latents, codes = engine._FILTER_FROM
    z, codebook = torch.zeros(latents, channels), torch.zeros(codes, channels)
    assert engine._filter_pays(z, codebook)
    assert not engine._filter_pays(z[:, 1:], codebook[:, 1:])
    assert not engine._filter_pays(z[1:], codebook)
    assert not engine._filter_pays(z, codebook[1:])
