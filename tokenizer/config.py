"""The config of a tokenizer run. Its defaults are the paper's recipe on ImageNet-128 (NSVQ, appendix D)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.config import Config
from common.data import DataConfig
from common.run import RunConfig
from tokenizer.losses import LossConfig
from tokenizer.model import ModelConfig
from tokenizer.quantizers import QUANTIZERS
from tokenizer.schedule import ScheduleConfig


class QuantizerConfig(Config):
    """Which quantizer, and its codebook."""

    name: Literal["nsvq", "simvq", "vq"] = Field("nsvq", description="Method, see tokenizer/quantizers.")
    codebook_size: int = Field(65_536, ge=2, description="K, the number of codes.")
    init: Literal["latents", "uniform"] | None = Field(
        None, description="Start of the codes: encoder outputs or uniform in +-1/K; null is the method's own "
        "(latents for vq and nsvq; simvq has N(0, 1/d) always).")  # fmt: skip

    @model_validator(mode="after")
    def _init_fits(self) -> "QuantizerConfig":
        if self.name == "simvq" and self.init is not None:
            raise ValueError("init does not apply to simvq, whose base is N(0, 1/d); leave it null")
        return self


class OptimConfig(Config):
    """Adam for both networks."""

    lr: float = Field(1e-4, gt=0, description="Learning rate of encoder, decoder and discriminator.")
    betas: tuple[float, float] = Field((0.5, 0.9), description="Adam's betas.")
    codebook_lr: float | None = Field(None, gt=0, description="Learning rate of the quantizer; null is lr.")
    codebook_eps: float = Field(
        1e-8, gt=0, description="Adam's epsilon for the quantizer. The NS gradient of a code that the batch did not "
        "hit is mostly below 1e-8, and then moves it by much less than lr.")  # fmt: skip
    clip_grad_norm: float | None = Field(None, gt=0, description="Largest gradient norm of the generator; null: none.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights, which are what is saved.")


class ValidationConfig(Config):
    """Measured with EMA weights on the test split."""

    every: int = Field(1, ge=1, description="Epochs between two validations.")
    images: int | None = Field(None, ge=1, description="Test images to use; null is all of them.")
    probe_images: int = Field(32, ge=1, description="Fixed images on which drift and churn are measured.")
    statistics_images: int = Field(50_000, ge=1, description="Training images for the latents' mean and deviation.")


class TrainConfig(Config):
    """Train an image tokenizer (stage one): encoder, codebook, decoder, with NSVQ's three phases."""

    out: Path = Field(Path("runs/imagenet128-nsvq"), description="Folder of the run; holds the tokenizer at the end.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    quantizer: QuantizerConfig = Field(default_factory=QuantizerConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainConfig":
        if self.schedule.replace and QUANTIZERS[self.quantizer.name].table is QUANTIZERS["simvq"].table:
            raise ValueError(f"{self.quantizer.name} has no free codes to replace; set schedule.replace: false")
        factor = 2 ** (len(self.model.channel_multipliers) - 1)
        if self.data.image_size % factor:
            raise ValueError(f"data.image_size = {self.data.image_size} must be a multiple of f = {factor}, which is "
                             "2^(levels - 1) of model.channel_multipliers")  # fmt: skip
        for multiplier in self.model.channel_multipliers:
            if self.model.channels * multiplier % self.model.norm_groups:
                raise ValueError(f"model.norm_groups = {self.model.norm_groups} must divide every level's width, "
                                 f"but not {self.model.channels * multiplier}")  # fmt: skip
        return self
