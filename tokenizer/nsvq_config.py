"""NSVQ (arXiv 2606.11363) as a section of the config: what keeps codes alive, with any quantizer that it suits.

pull     losing codes are pulled to the latents near them: the NS loss (codebook.py)
revive   a code that wins nothing starts again at a latent of the step, until replacement sets in (quantizers/ema.py)
replace  a code that an epoch did not use becomes a copy of one that it did (replacement.py)
freeze   the encoder stops once its commitment loss has settled; codes and decoder go on (schedule.py)"""

from typing import Any, Literal

from pydantic import Field, model_validator

from nsvq.common.config import Config
from nsvq.tokenizer.quantizers.base import Quantizer


class PullConfig(Config):
    """The NS loss (eq. 8-11)."""

    weight: float = Field(0.1, gt=0, description="alpha, the weight of the NS loss; pull: null is without.")
    temperature: float = Field(0.35, gt=0, description="tau of the NS loss, in squared distance summed over d,")
    relative_to: Literal["mean", "own"] | None = Field(
        None, description="or in units of the mean squared distance to the nearest code, or of a latent's own."
    )


class ReplaceConfig(Config):
    """Replacement of dead codes at each epoch's end, while the encoder trains (C.3)."""

    after: int = Field(5, ge=0, description="Epochs at the start without replacement.")
    noise: float = Field(0.001, ge=0, description="Standard deviation of the noise on a replaced code.")
    weights: Literal["usage", "error"] = Field("usage", description="Copies are drawn by usage, or by squared error.")
    reset_adam: bool = Field(True, description="Clear Adam's moments of a replaced code.")


class FreezeConfig(Config):
    """The end of the encoder's training, then warmup and stage2 (4.1-4.3); lengths are in epochs."""

    patience: int = Field(10, ge=1, description="Epochs without a new lowest commitment loss that trigger the freeze.")
    latest: int = Field(50, ge=0, description="Epoch at whose end the encoder is frozen at the latest; 0: its start.")
    warmup: int = Field(3, ge=0, description="Epochs of warmup.")
    ramp: float = Field(2, ge=0, description="Epochs over which the GAN's weight rises to 1 in stage2.")
    decay: float | None = Field(None, ge=0, lt=1, description="quantizer.decay from then on; null: as before.")
    consolidate: int = Field(0, ge=0, description="Iterations of k-means, from the codes, when the encoder is frozen.")
    consolidate_images: int = Field(10_000, ge=1, description="Training images whose latents it works on.")


class NSVQConfig(Config):
    """The parts of NSVQ, each null where it is off. Defaults are the paper's (appendix D), which revives no codes."""

    pull: PullConfig | None = Field(PullConfig(), description="The NS loss, a pull on losing codes.")
    revive: float | None = Field(None, gt=0, description="Tokens of the mean code before an unused one moves.")
    replace: ReplaceConfig | None = Field(ReplaceConfig(), description="Replace codes that an epoch did not use.")
    freeze: FreezeConfig | None = Field(FreezeConfig(), description="Freeze the encoder; null: it trains to the end.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_all_off(cls, values: Any) -> Any:
        return dict.fromkeys(cls.model_fields) if values is None else values

    def set_up(self, quantizer: Quantizer) -> None:
        """Tell a quantizer how its codes are pulled."""
        quantizer.nonstationary_weight = self.pull.weight if self.pull else 0.0
        quantizer.own_temperature = self.pull is not None and self.pull.relative_to == "own"

    def check_method(self, name: str, method: type[Quantizer]) -> None:
        """Raises `ValueError` where a part is on that does not suit the quantizer `name`, of class `method`."""
        consolidate = self.freeze and self.freeze.consolidate
        own = self.pull and self.pull.relative_to == "own"
        decay = self.freeze and self.freeze.decay is not None
        parts = (
            (name == "ns-vq", self.pull, "ns-vq is its pull; set nsvq.pull"),
            (self.pull, method.learns_codes, f"the NS loss pulls no codes of {name}; set nsvq.pull: null"),
            (own, name != "ns-vq", "ns-vq has a temperature of its own; set nsvq.pull.relative_to: null"),
            (self.revive, method.can_revive, f"{name} cannot revive codes; set nsvq.revive: null"),
            (self.replace, method.free_table, f"{name} has no free codes to replace; set nsvq.replace: null"),
            (decay, name == "ema", f"{name} has no decay; set nsvq.freeze.decay: null"),
            (consolidate, method.can_consolidate, f"k-means fits no codes of {name}; set nsvq.freeze.consolidate: 0"),
        )
        if unfit := [text for asked, able, text in parts if asked and not able]:
            raise ValueError("; ".join(unfit))
