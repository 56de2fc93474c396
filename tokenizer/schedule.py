"""The three phases of NSVQ (arXiv 2606.11363, 4.1-4.3) as a small state machine that moves at epoch ends.

stage1   everything trains; NS loss and code replacement on
warmup   encoder frozen; reconstruction, perceptual and codebook losses alone
stage2   encoder still frozen; the GAN comes back, its weight ramped from 0 to 1
"""

from typing import Literal

from pydantic import Field, model_validator

from nsvq.common.config import Config

Phase = Literal["stage1", "warmup", "stage2"]


class ScheduleConfig(Config):
    """Lengths are in epochs; an epoch is a pass over the training data unless `epoch_samples` says otherwise."""

    epochs: float = Field(70, gt=0, description="Length of the run.")
    epoch_samples: int | None = Field(None, ge=1, description="Images in an epoch; null is the training set's size.")
    freeze: bool = Field(True, description="Freeze the encoder (warmup, then stage2); false keeps stage1 throughout.")
    patience: int = Field(10, ge=1, description="Epochs without a new lowest commitment loss that trigger the freeze.")
    latest_freeze: int = Field(50, ge=1, description="Epoch at whose end the encoder is frozen at the latest.")
    warmup: int = Field(3, ge=0, description="Epochs of warmup.")
    ramp: float = Field(2, ge=0, description="Epochs over which the GAN's weight rises to 1 in stage2.")
    adversarial_after: float = Field(0, ge=0, description="Epochs at the start without a GAN.")
    replace: bool = Field(True, description="Replace dead codes at each epoch's end in stage1.")
    replace_after: int = Field(5, ge=0, description="Epochs at the start without replacement.")
    replace_noise: float = Field(0.001, ge=0, description="Standard deviation of the noise on a replaced code.")
    replace_from: Literal["usage", "error"] = Field(
        "usage", description="Active codes are copied in proportion to their usage, or to the squared error that they "
        "leave, so that new codes go where they are missing.")  # fmt: skip
    replace_resets_adam: bool = Field(True, description="Clear Adam's moments of a replaced code.")
    consolidate: int = Field(0, ge=0, description="Iterations of k-means, from the codes, when the encoder is frozen.")
    consolidate_images: int = Field(10_000, ge=1, description="Training images whose latents it works on.")

    @model_validator(mode="after")
    def _leaves_room(self) -> "ScheduleConfig":
        if self.freeze and self.latest_freeze + self.warmup >= self.epochs:
            raise ValueError(
                f"latest_freeze + warmup = {self.latest_freeze + self.warmup} leaves no stage2 in "
                f"{self.epochs:g} epochs; lower them, or set freeze: false"
            )
        return self


def plateaued(losses: list[float], patience: int) -> bool:
    """Whether the last `patience` epochs brought no new minimum (eq. 57): min(last) >= min(all before)."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


class Schedule:
    """Where a run stands. `epoch` counts finished epochs; the clock is the number of samples seen."""

    def __init__(self, config: ScheduleConfig, epoch_samples: int):
        self.config, self.epoch_samples = config, epoch_samples
        self.phase: Phase = "stage1"
        self.epoch = self.phase_start = 0
        self.commitments: list[float] = []

    @property
    def total_samples(self) -> int:
        return round(self.config.epochs * self.epoch_samples)

    def epoch_ended(self, samples_seen: int) -> bool:
        return samples_seen >= (self.epoch + 1) * self.epoch_samples

    def end_epoch(self, commitment: float) -> bool:
        """Close an epoch whose mean commitment loss (raw, over all ranks) is given; True where the phase changes."""
        self.epoch += 1
        before = self.phase
        if self.phase == "stage1" and self.config.freeze:
            self.commitments.append(commitment)
            if plateaued(self.commitments, self.config.patience) or self.epoch >= self.config.latest_freeze:
                self.phase, self.phase_start = "warmup", self.epoch
        if self.phase == "warmup" and self.epoch - self.phase_start >= self.config.warmup:
            self.phase, self.phase_start = "stage2", self.epoch
        return self.phase != before

    def replaces_codes(self) -> bool:
        """Whether dead codes are replaced at the end of the epoch that was just closed (a.3)."""
        return self.config.replace and self.phase == "stage1" and self.epoch > self.config.replace_after

    def revives_codes(self) -> bool:
        """Whether a method may revive codes of its own accord: until replacement or the freeze sets in."""
        return not self.config.replace or (self.phase == "stage1" and self.epoch <= self.config.replace_after)

    def adversarial_factor(self, samples_seen: int) -> float:
        """r in [0, 1], the factor on the GAN loss: 1 in stage1, 0 in warmup, a linear ramp in stage2."""
        if self.phase == "warmup":
            return 0.0
        if self.phase == "stage1" or self.config.ramp == 0:
            return 1.0
        epochs = samples_seen / self.epoch_samples - self.phase_start
        return min(1.0, max(0.0, epochs / self.config.ramp))

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("phase", "epoch", "phase_start", "commitments")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
