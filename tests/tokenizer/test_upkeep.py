"""What a run does to its codebook, on a table of a few codes."""

from types import SimpleNamespace

import pytest
import torch

from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.schedule import Schedule, ScheduleConfig
from nsvq.tokenizer.upkeep import CodebookUpkeep

K, D = 6, 4


@pytest.fixture
def upkeep(make):
    """upkeep(**nsvq): that of a plain table whose every value has Adam moments and an averaged copy."""

    def build(name="vq", **nsvq):
        quantizer = make(name, codebook_size=K, dim=D)
        sections = {"replace": {"after": 1}, "freeze": {"latest": 5, "warmup": 1}, "revive": None}
        nsvq = NSVQConfig(
            **{key: (value or {}) | nsvq.get(key, {}) if value else nsvq.get(key) for key, value in sections.items()}
        )
        schedule = Schedule(ScheduleConfig(epochs=9), nsvq, 10)
        table = quantizer.table()
        average = torch.zeros(K, D)
        state = {table: {"step": torch.tensor(3.0), "exp_avg": torch.ones(K, D), "exp_avg_sq": torch.ones(K, D)}}
        found = CodebookUpkeep(
            quantizer, nsvq, schedule, SimpleNamespace(state=state), averages=lambda asked: [average], seed=0
        )
        return found, table, average, state[table]

    return build


def test_dead_codes_are_replaced_only_between_the_first_epochs_and_the_freeze(upkeep):
    keeper, table, *_ = upkeep(replace={"noise": 0})
    counts, errors = torch.tensor([5, 0, 0, 2, 0, 1]), torch.zeros(K)
    replaced = []
    for _ in range(7):
        keeper.schedule.end_epoch(commitment=1.0 / (1 + keeper.schedule.epoch))
        replaced.append(keeper.replace(counts, errors))
    assert replaced == [0, 3, 3, 3, 0, 0, 0]  # after epoch 1, until the freeze at the end of epoch 5
    used = {tuple(row) for row in table[counts > 0].tolist()}
    assert {tuple(row) for row in table[counts == 0].tolist()} <= used


def test_a_replaced_code_takes_its_average_along_and_loses_its_moments(upkeep):
    keeper, table, average, moments = upkeep()
    before = table.detach().clone()
    keeper.schedule.epoch = 2
    assert keeper.replace(torch.tensor([5, 0, 1, 2, 0, 1]), torch.zeros(K)) == 2
    dead = torch.tensor([1, 4])
    assert torch.equal(average[dead], table[dead])
    assert torch.equal(moments["exp_avg"].sum(1), D * (torch.arange(K)[:, None] != dead).all(1).float())
    alive = torch.tensor([0, 2, 3, 5])
    assert torch.equal(table[alive], before[alive])
    assert not average[alive].any()


def test_a_method_may_revive_until_replacement_sets_in(upkeep):
    keeper, *_ = upkeep("ema", revive=5)
    allowed = []
    for _ in range(4):
        keeper.begin_step()
        allowed.append(keeper.quantizer.revive_after)
        keeper.schedule.end_epoch(commitment=1.0)
    assert allowed == [5, 5, None, None]


def test_averages_forget_as_slowly_as_asked_once_the_encoder_is_frozen(upkeep):
    keeper, *_ = upkeep("ema", freeze={"decay": 0.5})
    counts = []
    for _ in range(7):
        keeper.begin_step()
        keeper.quantizer.counts.fill_(1)
        keeper.quantizer.end_step(True)  # nothing was won
        counts.append(round(float(keeper.quantizer.counts[0]), 2))
        keeper.schedule.end_epoch(commitment=1.0 / (1 + keeper.schedule.epoch))
    assert counts == [0.99] * 5 + [0.5] * 2


def test_consolidation_is_lloyds_fixed_point_and_off_by_default(upkeep):
    points = torch.cat([torch.eye(D)[:2] * 9 + 0.01 * torch.randn(2, D) for _ in range(50)] + [torch.randn(200, D)])
    keeper, table, *_ = upkeep()
    before = table.detach().clone()
    keeper.consolidate(lambda images: pytest.fail("no latents are needed"))
    assert torch.equal(table, before)
    keeper, table, average, moments = upkeep(freeze={"consolidate": 500, "consolidate_images": 77})
    asked = []
    keeper.consolidate(lambda images: asked.append(images) or [points[:120], points[120:]])
    assert asked == [77]
    nearest = torch.cdist(points.double(), table.detach().double()).argmin(1)
    means = torch.stack([points[nearest == j].double().mean(0) for j in range(K)])
    torch.testing.assert_close(table.detach().double(), means, atol=5e-3, rtol=0)
    assert torch.equal(average, table)
    assert not moments["exp_avg"].any()


def test_codes_start_from_as_many_latents_as_the_method_wants(upkeep):
    keeper, table, *_ = upkeep()
    latents = torch.randn(K, D)
    keeper.start(lambda count: latents[:count])
    assert torch.equal(table.detach(), latents)
