import pytest

from nsvq.common.config import validate
from nsvq.errors import UsageError
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.losses import LossConfig, phase_weights
from nsvq.tokenizer.nsvq_config import NSVQConfig, PullConfig
from nsvq.tokenizer.schedule import Schedule, ScheduleConfig, plateaued

# A recorded commitment curve in the shape of the paper's Fig. 5: it falls, rises a little, falls slowly, and stays.
CURVE = [
    0.9,
    0.4,
    0.2,
    0.1,
    0.06,
    0.05,
    0.045,
    0.046,
    0.047,
    0.044,
    0.0436,
    0.0435,
    0.0437,
    0.0436,
    0.0438,
    0.0435,
    0.0437,
    0.0436,
    0.0439,
    0.0438,
    0.0437,
    0.0436,
    0.0435,
    0.0434,
]


def freeze_epoch_by_eq_57(losses, patience):
    """The first t (counting from 1) with min_{s=t-p+1..t} l_s >= min_{u<=t-p} l_u."""
    for t in range(1, len(losses) + 1):
        recent = [losses[s - 1] for s in range(t - patience + 1, t + 1) if s >= 1]
        before = [losses[u - 1] for u in range(1, t - patience + 1)]
        if before and min(recent) >= min(before):
            return t
    return None


def make_schedule(epochs=100, **parts):
    return Schedule(ScheduleConfig(epochs=epochs), NSVQConfig(**parts), epoch_samples=100)


def run(schedule, losses):
    phases = []
    for loss in losses:
        schedule.end_epoch(loss)
        phases.append(schedule.phase)
    return schedule, phases


@pytest.mark.parametrize("patience", [1, 3, 5, 10])
def test_encoder_freezes_at_the_plateau_of_equation_57(patience):
    expected = freeze_epoch_by_eq_57(CURVE, patience)
    assert expected is not None
    _, phases = run(make_schedule(freeze={"patience": patience, "latest": 60, "warmup": 3}), CURVE)
    assert phases.index("warmup") + 1 == expected


def test_steadily_falling_loss_never_counts_as_a_plateau():
    losses = [1 / (t + 1) for t in range(60)]
    assert freeze_epoch_by_eq_57(losses, 10) is None
    assert not any(plateaued(losses[:t], 10) for t in range(len(losses)))


def test_encoder_freezes_at_the_latest_epoch_without_a_plateau():
    freeze = {"patience": 10, "latest": 50, "warmup": 3}
    _, phases = run(make_schedule(freeze=freeze), [1 / (t + 1) for t in range(70)])
    assert phases.count("stage1") == 49  # after 49 epoch ends it is still stage1, after the 50th it is not
    assert phases[49:52] == ["warmup"] * 3
    assert set(phases[52:]) == {"stage2"}


def test_without_freezing_the_run_stays_in_stage1():
    _, phases = run(make_schedule(freeze=None), CURVE)
    assert set(phases) == {"stage1"}


def test_gan_is_full_in_stage1_off_in_warmup_and_ramps_linearly_in_stage2():
    schedule = make_schedule(freeze={"latest": 4, "warmup": 2, "ramp": 2})
    factors = {}
    for epoch in range(10):
        for part in (0, 50):
            factors[epoch + part / 100] = schedule.adversarial_factor(epoch * 100 + part)
        schedule.end_epoch(1 / (epoch + 1))
    assert all(factors[t] == 1 for t in factors if t < 4)
    assert all(factors[t] == 0 for t in factors if 4 <= t < 6)
    assert [factors[t] for t in (6, 6.5, 7, 7.5, 8, 9.5)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_replacement_starts_after_its_delay_and_ends_with_stage1():
    schedule = make_schedule(freeze={"latest": 9, "warmup": 2}, replace={"after": 5})
    replaced = []
    for epoch in range(1, 15):
        schedule.end_epoch(1 / epoch)
        if schedule.replaces_codes():
            replaced.append(epoch)
    assert replaced == [6, 7, 8]


def test_no_code_is_replaced_without_an_epoch_left_to_train_it():
    schedule = make_schedule(freeze=None, replace={"after": 0})
    last = 0
    while schedule.epoch < schedule.config.epochs:
        schedule.end_epoch(0.1)
        last = schedule.epoch if schedule.replaces_codes() else last
    assert last == schedule.config.epochs - 1


def test_codes_are_revived_until_an_epochs_end_first_replaces_them():
    for after in (0, 2):
        schedule = make_schedule(freeze=None, replace={"after": after}, revive=5)
        for _ in range(5):
            assert schedule.revive_after() == 5  # in the epoch whose end comes now
            schedule.end_epoch(0.1)
            if schedule.replaces_codes():
                break
        assert schedule.epoch == after + 1
        assert schedule.revive_after() is None
    freeze = {"latest": 2, "warmup": 1}
    frozen, _ = run(make_schedule(freeze=freeze, replace={"after": 9}, revive=5), [0.1] * 2)
    assert frozen.revive_after() is None
    never, _ = run(make_schedule(freeze=freeze, replace=None, revive=5), [0.1] * 9)
    assert never.revive_after() == 5
    assert make_schedule().revive_after() is None


@pytest.mark.parametrize("phase", ["stage1", "warmup", "stage2"])
def test_each_phase_trains_the_terms_that_the_paper_lists(make, phase):
    expected = {
        "stage1": {
            "l1": 1,
            "perceptual": 1,
            "codebook": 1,
            "commitment": 0.25,
            "nonstationary": 0.1,
            "adversarial": 0.1,
        },
        "warmup": {"l1": 1, "perceptual": 1, "codebook": 1},
        "stage2": {"l1": 1, "perceptual": 1, "codebook": 1, "adversarial": 0.05},
    }
    factor = {"stage1": 1.0, "warmup": 0.0, "stage2": 0.5}[phase]
    assert phase_weights(LossConfig(), PullConfig(), phase, factor, make("vq")) == expected[phase]


def test_a_method_trains_with_its_own_terms_while_the_encoder_trains(make):
    config = LossConfig(perceptual="none", adversarial_weight=0, pixel="mse")
    assert phase_weights(config, None, "stage1", 1.0, make("fsq")) == {"mse": 1}
    assert phase_weights(config, None, "stage1", 1.0, make("ema")) == {"mse": 1, "commitment": 0.25}
    ibq = {"mse": 1, "codebook": 1, "commitment": 0.25, "joint": 1, "entropy": 0.05}
    assert phase_weights(config, None, "stage1", 1.0, make("ibq")) == ibq
    assert phase_weights(config, None, "warmup", 0.0, make("ibq")) == {"mse": 1, "codebook": 1}


def test_state_survives_saving():
    schedule, _ = run(make_schedule(freeze={"patience": 3}), CURVE)
    other = Schedule(schedule.config, schedule.nsvq, 100)
    other.load_state_dict(schedule.state_dict())
    assert vars(other) == vars(schedule)


def test_a_schedule_without_room_for_stage2_is_refused():
    with pytest.raises(UsageError, match="leaves no stage2"):
        validate(TrainConfig, {"schedule": {"epochs": 50}})
    validate(TrainConfig, {"schedule": {"epochs": 50}, "nsvq": {"freeze": None}})
