"""The config of a tokenizer run. Its defaults are the paper's recipe on ImageNet-128 (NSVQ, appendix D)."""

import math
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nsvq.common.config import Config
from nsvq.common.run import RunConfig
from nsvq.data.config import DataConfig
from nsvq.tokenizer.discriminator import DiscriminatorConfig, PatchConfig
from nsvq.tokenizer.losses import LossConfig
from nsvq.tokenizer.model import ModelConfig
from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.perturbation import TrainingPerturbationConfig
from nsvq.tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from nsvq.tokenizer.quantizers.base import NearestQuantizer
from nsvq.tokenizer.quantizers.ema import EMAConfig, decay_of_step
from nsvq.tokenizer.quantizers.vq import VQConfig
from nsvq.tokenizer.schedule import ScheduleConfig


class OptimConfig(Config):
    """Adam for both networks."""

    lr: float = Field(1e-4, gt=0, description="Learning rate of decoder and discriminator.")
    lr_warmup: float = Field(0, ge=0, description="Epochs over which all learning rates rise from lr_floor.")
    lr_hold: float = Field(0, ge=0, lt=1, description="Share of the rest of the run before they decay.")
    lr_decay: Literal["none", "linear", "cosine"] = Field("none", description="How they then fall to lr_floor.")
    lr_floor: float = Field(0.01, ge=0, le=1, description="Lowest factor on them, at both ends.")
    betas: tuple[float, float] = Field((0.5, 0.9), description="Adam's betas.")
    encoder_lr: float | None = Field(None, gt=0, description="Learning rate of the encoder; null is lr.")
    codebook_lr: float | None = Field(None, gt=0, description="Learning rate of the quantizer; null is lr.")
    discriminator_lr: float | None = Field(None, gt=0, description="Learning rate of the discriminator; null is lr.")
    discriminator_weight_decay: float = Field(0, ge=0, description="Its decoupled weight decay (AdamW).")
    # The NS gradient of a code that the batch did not hit is mostly below 1e-8: it moves by much less than lr then.
    codebook_eps: float = Field(1e-8, gt=0, description="Adam's epsilon for the quantizer; its NS gradients are tiny.")
    clip_grad_norm: float | None = Field(None, gt=0, description="Largest gradient norm of the generator; null: none.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights, which are what is saved.")

    def lr_factor(self, progress: float, epochs: float) -> float:
        """The factor on all learning rates at `progress` in [0, 1) of a run of `epochs`: a rise, a hold, a decay."""
        start, floor = min(1.0, self.lr_warmup / epochs), self.lr_floor
        if progress < start:
            return floor + (1 - floor) * progress / start
        if self.lr_decay == "none":
            return 1.0
        left = min(1.0, (1 - (progress - start) / (1 - start)) / (1 - self.lr_hold))
        return floor + (1 - floor) * (left if self.lr_decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


class ValidationConfig(Config):
    """Measured with EMA weights on the test split."""

    every: int = Field(1, ge=1, description="Epochs between two validations.")
    images: int | None = Field(None, ge=1, description="Test images to use; null is all of them.")
    probe_images: int = Field(32, ge=1, description="Fixed images on which drift and churn are measured.")
    features: str = Field("none", description="Also rFID, in these features: as --features of eval/reconstruction.py.")
    features_weights: Path | None = Field(None, description="Weights of these features; null downloads them.")
    statistics_images: int = Field(50_000, ge=1, description="Training images for the latents' mean and deviation.")


class TrainConfig(Config):
    """Train an image tokenizer (stage one): encoder, codebook, decoder. `quantizer` says how codes move, `nsvq` what
    keeps them alive."""

    renamed: ClassVar[dict[str, str]] = {
        "quantizer.name: nsvq": "the section nsvq, and quantizer.name: vq or ema",
        "quantizer.name: fc": "quantizer.name: vq, at a small model.latent_channels",
        "quantizer.revive_after": "nsvq.revive (null for 0)",
        "loss.nonstationary_weight": "nsvq.pull.weight (nsvq.pull: null for 0)",
        "loss.discriminator_channels": "discriminator.channels",
        "loss.discriminator_layers": "discriminator.layers",
        "loss.temperature": "nsvq.pull.temperature",
        "loss.temperature_relative": "nsvq.pull.relative_to (mean for true)",
        "nsvq.pull.relative": "nsvq.pull.relative_to (mean for true)",
        "schedule.replace": "nsvq.replace (null for false)",
        "schedule.replace_after": "nsvq.replace.after",
        "schedule.replace_noise": "nsvq.replace.noise",
        "schedule.replace_from": "nsvq.replace.weights",
        "schedule.replace_resets_adam": "nsvq.replace.reset_adam",
        "schedule.freeze": "nsvq.freeze (null for false)",
        "schedule.latest_freeze": "nsvq.freeze.latest",
        "schedule.patience": "nsvq.freeze.patience",
        "schedule.warmup": "nsvq.freeze.warmup",
        "schedule.ramp": "nsvq.freeze.ramp",
        "schedule.consolidate": "nsvq.freeze.consolidate",
        "schedule.consolidate_images": "nsvq.freeze.consolidate_images",
    }

    out: Path = Field(Path("runs/imagenet128-nsvq"), description="Folder of the run; holds the tokenizer at the end.")
    export_every: int | None = Field(None, ge=1, description="Steps between two tokenizers in <out>/tokenizers/step-N.")
    init_from: str | None = Field(None, description="Tokenizer to start from: a VQModel's folder or Hub id.")
    init_codes: bool = Field(True, description="Take its codes too, where the quantizer can hold them.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    quantizer: QuantizerConfig = Field(default_factory=VQConfig, discriminator="name")
    nsvq: NSVQConfig = Field(default_factory=NSVQConfig, description="What keeps codes alive; null: nothing does.")
    perturbation: TrainingPerturbationConfig | None = Field(
        None, description="Codes that training replaces by near ones (RobustTok); null: none."
    )
    loss: LossConfig = Field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = Field(default_factory=PatchConfig, discriminator="name")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.data.image_size >> (len(self.model.channel_multipliers) - 1)) ** 2

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainConfig":
        freeze = self.nsvq.freeze
        self.quantizer.check_dim(self.model.latent_channels)
        self.nsvq.check_method(self.quantizer.name, QUANTIZERS[self.quantizer.name])
        if freeze and freeze.latest + freeze.warmup >= (epochs := self.schedule.epochs):
            what = f"nsvq.freeze.latest + warmup leaves no stage2 in schedule.epochs = {epochs:g}"
            raise ValueError(f"{what}; lower them, or set nsvq.freeze: null")
        if self.export_every and self.quantizer.name == "vp":
            raise ValueError("vp finds its codes after the last step; set export_every: null")
        self._check_start()
        self._check_gan()
        self._check_alignment()
        self._check_adaptive_weights()
        method = QUANTIZERS[self.quantizer.name]
        if self.perturbation and not (issubclass(method, NearestQuantizer) or method.free_table):
            raise ValueError(f"{self.quantizer.name} has no table of codes to draw from; set perturbation: null")
        size, multipliers, groups = self.data.image_size, self.model.channel_multipliers, self.model.norm_groups
        factor = 2 ** (len(multipliers) - 1)
        if size % factor:
            what = f"a multiple of f = {factor}, which is 2^(levels - 1) of model.channel_multipliers"
            raise ValueError(f"data.image_size = {size} must be {what}")
        for width in (self.model.channels * multiplier for multiplier in multipliers):
            if width % groups:
                raise ValueError(f"model.norm_groups = {groups} must divide every level's width, but not {width}")
        if isinstance(self.quantizer, EMAConfig) and self.quantizer.decay is None:  # a saved run holds the number
            decay = decay_of_step(self.run.batch_size * self.tokens, self.quantizer.codebook_size)
            self.quantizer = self.quantizer.model_copy(update={"decay": decay})
        return self

    def _check_gan(self) -> None:
        loss, schedule, least = self.loss, self.schedule, self.discriminator.least_size
        if loss.adversarial_weight == 0:
            for key, given in (("lecam_weight", loss.lecam_weight), ("adversarial_cap", loss.adversarial_cap)):
                if given:
                    raise ValueError(f"loss.{key} needs a GAN, and adversarial_weight = 0 trains none; leave it out")
            return
        if schedule.adversarial_after >= schedule.epochs:
            what = f"schedule.adversarial_after leaves no GAN in schedule.epochs = {schedule.epochs:g}"
            raise ValueError(f"{what}; lower it, or set loss.adversarial_weight: 0")
        if self.data.image_size < least:
            what = f"this discriminator needs {least} pixels, data.image_size is {self.data.image_size}"
            raise ValueError(f"{what}; lower discriminator.layers or stages, or set loss.adversarial_weight: 0")

    def _check_alignment(self) -> None:
        freeze = self.nsvq.freeze
        if self.loss.alignment is not None and freeze and freeze.latest == 0:
            raise ValueError("nsvq.freeze.latest = 0 trains no encoder that could be aligned; set loss.alignment: null")

    def _check_adaptive_weights(self) -> None:
        alignment = self.loss.alignment
        vf = alignment is not None and alignment.form == "vf"
        for key, given in (("adversarial_cap", self.loss.adversarial_cap is not None), ("alignment.form = vf", vf)):
            what = f"loss.{key} compares gradients, which"
            if given and self.model.compile:
                raise ValueError(f"{what} compiled networks do not give twice; set model.compile: false")
            if given and self.run.mixed_precision == "fp16":
                raise ValueError(f"{what} float16 loses where they are not scaled; set run.mixed_precision: bf16")

    def _check_start(self) -> None:
        schedule, freeze = self.schedule, self.nsvq.freeze
        if freeze and freeze.latest == 0 and self.init_from is None:
            raise ValueError("nsvq.freeze.latest = 0 freezes an encoder that never trained; give init_from")
        first = schedule.discriminator_first
        if not first:
            return
        what = f"schedule.discriminator_first = {first:g}"
        late = schedule.adversarial_after or schedule.adversarial_after_steps
        if self.init_from is None or self.loss.adversarial_weight == 0 or late:
            needs = "init_from, a GAN (loss.adversarial_weight) and schedule.adversarial_after: 0"
            raise ValueError(f"{what} needs {needs}")
        if first >= (freeze.latest if freeze else schedule.epochs):
            other = "where nsvq.freeze.latest is 0, the ramp of stage2 is the discriminator's start"
            raise ValueError(f"{what} leaves the encoder no epoch to train in; lower it ({other})")
