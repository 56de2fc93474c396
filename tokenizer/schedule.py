"""The three phases of NSVQ (arXiv 2606.11363, 4.1-4.3) as a small state machine that moves at epoch ends.

discriminator   after a warm start, if asked for: the discriminator alone trains
stage1   everything trains; NS loss and code replacement on
warmup   encoder frozen; reconstruction, perceptual and codebook losses alone
stage2   encoder still frozen; the GAN comes back, its weight ramped from 0 to 1"""

from typing import Literal

from pydantic import Field

from nsvq.common.config import Config
from nsvq.tokenizer.nsvq_config import NSVQConfig

Phase = Literal["discriminator", "stage1", "warmup", "stage2"]


class ScheduleConfig(Config):
    """Lengths are in epochs; an epoch is a pass over the training data unless `epoch_samples` says otherwise."""

    epochs: float = Field(70, gt=0, description="Length of the run.")
    epoch_samples: int | None = Field(None, ge=1, description="Images in an epoch; null is the training set's size.")
    adversarial_after: float = Field(0, ge=0, description="Epochs at the start without a GAN.")
    adversarial_after_steps: int = Field(0, ge=0, description="The same in optimizer steps; the later one counts.")
    discriminator_first: float = Field(0, ge=0, description="Epochs at the start in which it alone trains (init_from).")


def plateaued(losses: list[float], patience: int) -> bool:
    """Whether the last `patience` epochs brought no new minimum (eq. 57): min(last) >= min(all before)."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


class Schedule:
    """Where a run stands. `epoch` counts finished epochs; the clock is the number of samples seen."""

    def __init__(self, config: ScheduleConfig, nsvq: NSVQConfig, epoch_samples: int):
        self.config, self.nsvq, self.epoch_samples = config, nsvq, epoch_samples
        self.phase: Phase = "stage1"
        if nsvq.freeze and nsvq.freeze.latest == 0:
            self.phase = "warmup" if nsvq.freeze.warmup else "stage2"
        self.epoch = self.phase_start = 0
        self.commitments: list[float] = []

    @property
    def total_samples(self) -> int:
        return round(self.config.epochs * self.epoch_samples)

    def phase_at(self, samples_seen: int) -> Phase:
        """What a step trains: the phase, or the discriminator alone before it."""
        first = samples_seen < self.config.discriminator_first * self.epoch_samples
        return "discriminator" if first else self.phase

    def epoch_ended(self, samples_seen: int) -> bool:
        return samples_seen >= (self.epoch + 1) * self.epoch_samples

    def end_epoch(self, commitment: float) -> bool:
        """Close an epoch whose mean commitment loss (raw, over all ranks) is given; True where the phase changes."""
        self.epoch += 1
        before, freeze = self.phase, self.nsvq.freeze
        if freeze is None:
            return False
        if self.phase == "stage1":
            if self.epoch > self.config.discriminator_first:  # the encoder trained in it
                self.commitments.append(commitment)
            if plateaued(self.commitments, freeze.patience) or self.epoch >= freeze.latest:
                self.phase, self.phase_start = "warmup", self.epoch
        if self.phase == "warmup" and self.epoch - self.phase_start >= freeze.warmup:
            self.phase, self.phase_start = "stage2", self.epoch
        return self.phase != before

    def replaces_codes(self) -> bool:
        """Whether dead codes are replaced at the end of the epoch that was just closed (a.3): not without an epoch left
        in which they train."""
        replace, left = self.nsvq.replace, self.config.epochs - self.epoch
        if replace is None or self.phase != "stage1" or left < 1:
            return False
        return self.epoch > max(replace.after, self.config.discriminator_first)

    def revive_after(self) -> float | None:
        """Tokens that the mean code wins before one without any is revived; None once replacement has set in, or the
        freeze where there is to be replacement, and where nothing is revived."""
        replace = self.nsvq.replace
        waits = replace is None or (self.phase == "stage1" and self.epoch <= replace.after)
        return self.nsvq.revive if waits else None

    def adversarial_factor(self, samples_seen: int) -> float:
        """r in [0, 1], the factor on the GAN loss: 1 in stage1, 0 in warmup, a linear ramp in stage2."""
        if self.phase == "warmup":
            return 0.0
        if self.phase == "stage1" or self.nsvq.freeze.ramp == 0:
            return 1.0
        epochs = samples_seen / self.epoch_samples - self.phase_start
        return min(1.0, max(0.0, epochs / self.nsvq.freeze.ramp))

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("phase", "epoch", "phase_start", "commitments")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
