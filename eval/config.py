"""The options of eval/reconstruction.py, eval/generation.py and eval/probe.py."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from nsvq.autoregressive.sampling import GuidanceSchedule, check_rise
from nsvq.common.config import Config
from nsvq.data.config import DataConfig
from nsvq.diffusion.samplers import Sampler
from nsvq.eval.features import DINOV2, INCEPTION
from nsvq.eval.reference import DEFAULT_CACHE
from nsvq.tokenizer.perturbation import PerturbationConfig

_DRAWING = (  # options of eval/generation.py that say how samples are drawn
    *("labels", "guidance_scale", "guidance_interval", "guide", "sampler", "steps", "guidance_schedule"),
    *("guidance_power", "temperature", "top_k", "top_p", "seed", "mixed_precision", "compile", "keep"),
)
_FEATURES = "Feature extractors: names of torch-fidelity, .py files that register one each, or none."


class MeasuringConfig(Config):
    """Options of all evaluations."""

    data: DataConfig = Field(DataConfig(), description="The images to measure against.")
    output: Path = Field(description="The result, a .json file; its folder is created.")
    batch_size: int = Field(
        64, ge=1, description="Images that a rank loads at once; no number changes: networks see groups of one size."
    )
    workers: int = Field(4, ge=0, description="Data loading processes per rank.")

    @property
    def loading(self) -> dict[str, int]:
        """How images are loaded, as arguments of `eval_batches`."""
        return {"batch_size": self.batch_size, "workers": self.workers}


class EvaluationConfig(MeasuringConfig):
    """Options of those that compare sets of images."""

    features: list[str] = Field([INCEPTION], min_length=1, description=_FEATURES)
    features_weights: Path | None = Field(None, description="Weights of the first extractor; null downloads them.")
    cache: Path | None = Field(DEFAULT_CACHE, description="Folder that keeps reference statistics; null keeps none.")
    cache_features: bool = Field(
        False, description="Keep the features of single images there, too, for KID, precision and recall to reuse."
    )


class ReconstructionConfig(EvaluationConfig):
    """Measure a tokenizer's reconstructions and codebook."""

    tokenizer: str = Field(description="Folder or Hub id: <out>/tokenizer, or a VQModel or autoencoder of diffusers.")
    compare: str | None = Field(None, description="Folder of an earlier tokenizer, to measure drift and churn since.")
    protocol: Literal["ours", "simvq"] = Field("ours", description="How to measure: see docs/evaluation.md.")
    pfid: PerturbationConfig | None = Field(
        None, description="Also measure pFID: reconstructions from codes of which some are replaced by near ones."
    )
    split: Literal["train", "test"] = Field("test", description="Split of the data to reconstruct.")
    limit: int | None = Field(None, ge=1, description="Measure only this many images; null for all.")
    lpips: list[Literal["vgg", "alex", "squeeze", "none"]] = Field(["vgg", "alex"], description="Backbones of LPIPS.")
    lpips_weights: list[Path] = Field(
        [], description="Backbone weights (.pth or .safetensors, torchvision's names), one for each; none: downloaded."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ReconstructionConfig":
        if self.lpips_weights and len(self.lpips_weights) != len(self.lpips):
            raise ValueError("lpips_weights must name one file for each backbone of lpips")
        if self.protocol == "simvq" and self.features not in ([INCEPTION], ["none"]):
            raise ValueError(f"protocol simvq measures features of {INCEPTION} alone")
        return self


class ProbeConfig(MeasuringConfig):
    """Measure how well the classes of images are read off a tokenizer's codes."""

    tokenizer: str = Field(description="Folder or Hub id: <out>/tokenizer, or a VQModel or autoencoder of diffusers.")
    grid: Literal[1, 2] = Field(1, description="Features: mean code vector of the image, or of each of its quarters.")
    l2: float = Field(1e-3, gt=0, description="Of the linear probe: times half the squared weights, in its loss.")
    neighbours: int = Field(20, ge=1, description="Training images that vote on a test image.")
    train_limit: int | None = Field(None, ge=1, description="Fit on only this many images; null for all.")
    limit: int | None = Field(None, ge=1, description="Measure only this many test images; null for all.")


class GenerationConfig(EvaluationConfig):
    """Measure a pipeline's samples, or images that another program drew, against real images."""

    pipeline: str | None = Field(
        None, description="Folder of a pipeline (<out>/pipeline, or a class-conditional one of diffusers)."
    )
    images: Path | None = Field(
        None, description="In its place, samples of another program: an .npz file in ADM's format, or a folder."
    )
    resize: int | None = Field(
        None, ge=1, description="Measure the samples at this size, by Pillow's antialiased bicubic; null: as they are."
    )
    features: list[str] = Field([INCEPTION, DINOV2], min_length=1, description=_FEATURES)
    protocol: Literal["ours", "adm", "nsvq"] | None = Field(
        None, description="How to measure: see docs/evaluation.md; null: adm for ImageNet-1k, else ours."
    )
    metrics: list[Literal["fid", "sfid", "isc", "kid", "prc"]] = Field(
        ["fid", "sfid", "isc", "kid", "prc"],
        min_length=1,
        description="What to measure, as far as an extractor has features for it.",
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="Images to generate; null: as many as the protocol asks for. Of --images the first; or all.",
    )
    labels: Literal["balanced", "data"] = Field(
        "balanced",
        description="Classes of the samples: each in turn, or drawn as often as in the training split; a model without "
        "classes is asked for none.",
    )
    guidance_scale: list[float] = Field(
        [1.0], min_length=1, description="Classifier-free guidance; 1 is none, 0 unconditional; several make a sweep."
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Noise levels, from 0 (image) to 1 (noise), within which guidance acts."
    )
    guide: Path | None = Field(
        None, description="Folder of a smaller or earlier pipeline to guide by (autoguidance), instead of no class."
    )
    sampler: Sampler | None = Field(None, description="Sampler that fits the model; null is the pipeline's.")
    steps: list[int] = Field([50], min_length=1, description="Sampler steps; several make a sweep.")
    guidance_schedule: GuidanceSchedule = Field(
        "constant",
        description="How guidance rises from 1 over the tokens; this and the next four of autoregressive models.",
    )
    guidance_power: float = Field(1.0, gt=0, description="Exponent of that rise: above 1 it starts later.")
    temperature: list[float] = Field([1.0], min_length=1, description="Of each token; several make a sweep.")
    top_k: list[int] = Field([0], min_length=1, description="Likeliest codes to draw among, 0: all; or a sweep.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest codes of that share together.")
    seed: int = Field(0, ge=0, description="Seed of the first sample; sample i has seed + i.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Autocast type of sampling; features are always float32."
    )
    compile: bool = Field(False, description="torch.compile of the network: faster after minutes of compiling.")
    reference: str | None = Field(
        None, description="Real images: train, test, or an .npz file in ADM's format; null: what the protocol asks for."
    )
    reference_limit: int | None = Field(
        None, ge=1, description="Compare with only this many of a split (a file is taken whole); null for all."
    )
    keep: Literal["none", "png", "npz"] = Field(
        "none", description="Keep samples beside the result: PNG files, from which sampling resumes; npz: ADM's, too."
    )
    classifier: Literal["none", "trained", "features"] = Field(
        "none",
        description="Also report which share is of the class asked for: by a small network trained on the data, or by "
        "the class outputs of the first extractor.",
    )

    @property
    def measured(self) -> str:
        """What is measured, as it was given."""
        return str(self.images if self.pipeline is None else self.pipeline)

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationConfig":
        if (self.pipeline is None) == (self.images is None):
            raise ValueError("give --pipeline or --images, one of the two")
        if self.images is not None and (wrong := [name for name in _DRAWING if name in self.model_fields_set]):
            raise ValueError(f"--images are drawn already: leave out {', '.join(f'--{name}' for name in wrong)}")
        check_rise(self.guidance_schedule, self.guidance_power)
        return self

    @field_validator("guidance_scale", "steps", "temperature", "top_k")
    @classmethod
    def _in_range(cls, values, info):
        least = 1 if info.field_name == "steps" else 0
        if any(value < least for value in values):
            raise ValueError(f"each must be {least} or more")
        return values

    @field_validator("reference")
    @classmethod
    def _known(cls, value):
        if value not in (None, "train", "test") and not value.endswith(".npz"):
            raise ValueError("it should be train, test, or a file that ends in .npz")
        return value
