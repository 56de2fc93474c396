"""The config of an autoregressive run."""

from pathlib import Path

from pydantic import Field, model_validator

from nsvq.autoregressive.model import ModelConfig
from nsvq.autoregressive.sampling import GuidanceSchedule, check_rise
from nsvq.common.config import Config
from nsvq.common.generator import DrawingConfig, GeneratorConfig


class ScheduleConfig(Config):
    """How long, and how the learning rate rises, stays and falls: FVQ's schedule (arXiv 2509.10140, in its code)."""

    steps: int = Field(1_500_000, ge=1, description="Optimizer steps; the rate falls towards them, so they are fixed.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    hold: float = Field(0.05, ge=0, lt=1, description="Share of the steps before it falls, linearly.")
    final: float = Field(0.01, ge=0, le=1, description="Factor on the learning rate in the last step; 1 keeps it.")


class OptimConfig(Config):
    """AdamW, and the averaged weights."""

    lr: float = Field(1e-4, gt=0, description="Learning rate; the field scales it with the batch.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's betas.")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's weight decay, of matrices; norms have none.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema_decay: float = Field(
        0.9999,
        ge=0,
        lt=1,
        description="Decay of the averaged weights, which are what is saved; at step n it is at "
        "most (1 + n) / (10 + n).",
    )


class TokenSampling(Config):
    """How tokens are drawn, beside guidance_scale."""

    guidance_schedule: GuidanceSchedule = Field("constant", description="How it rises from 1 over the tokens.")
    guidance_power: float = Field(1.0, gt=0, description="Exponent of that rise: above 1 it starts later.")
    temperature: float = Field(1.0, ge=0, description="Of the distribution of a token; 0 takes the likeliest.")
    top_k: int = Field(0, ge=0, description="Draw among that many likeliest codes; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest codes of that share together.")

    @model_validator(mode="after")
    def _rises(self) -> "TokenSampling":
        check_rise(self.guidance_schedule, self.guidance_power)
        return self


class SamplingConfig(DrawingConfig, TokenSampling):
    """Samples during training, of averaged weights and fixed seeds: a picture, and a Frechet distance."""


class HeldOutConfig(Config):
    """Bits an image on test images' codes, with averaged weights: comparable between tokenizers, as the loss is not."""

    images: int | None = Field(2048, ge=1, description="Test images to measure; null is all of them.")
    every: int = Field(10_000, ge=1, description="Steps between measurements; the last step is measured in any case.")


class TrainConfig(GeneratorConfig):
    """Train a transformer that generates the codes of a frozen tokenizer one after the other (stage two)."""

    out: Path = Field(Path("runs/imagenet128-ar-b"), description="Folder of the run; holds the pipeline at the end.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    held_out: HeldOutConfig = Field(default_factory=HeldOutConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
