"""The config of a diffusion run."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nsvq.common.config import Config
from nsvq.common.generator import DrawingConfig, GeneratorConfig
from nsvq.diffusion.model import DiTConfig, ModelConfig
from nsvq.diffusion.objectives import FlowConfig, ObjectiveConfig


class OptimConfig(Config):
    """AdamW, and the averaged weights."""

    lr: float = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    warmup_steps: int = Field(5_000, ge=0, description="Steps over which the learning rate rises from 0.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the averages; (1 + n) / (10 + n) at first.")


class SamplingConfig(DrawingConfig):
    """Samples during training, of averaged weights and fixed seeds: a picture, and a Frechet distance."""

    steps: int = Field(50, ge=1, description="Sampler steps.")


class TrainConfig(GeneratorConfig):
    """Train a DiT or a U-Net (stage two) in the latent space of a frozen tokenizer."""

    out: Path = Field(Path("runs/imagenet128-dit-b"), description="Folder of the run; holds the pipeline at the end.")
    latents: Literal["continuous", "quantized"] = Field("continuous", description="Train on latents or on their codes.")
    steps: int = Field(400_000, ge=1, description="Optimizer steps; a run may go on to more of them.")
    model: ModelConfig = Field(default_factory=DiTConfig, discriminator="variant")
    objective: ObjectiveConfig = Field(default_factory=FlowConfig, discriminator="name")
    optim: OptimConfig = Field(default_factory=OptimConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainConfig":
        self.objective.check_steps(self.sampling.steps)
        return self
