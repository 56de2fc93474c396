"""Draw samples of chosen classes, or of none, into one picture, a row of each class.

python pipelines/sample.py --pipeline runs/dit-b/pipeline --classes 207 "golden retriever" --output grid.png
"""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torchvision.utils import save_image

from nsvq.autoregressive.config import TokenSampling
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.diffusion.samplers import Sampler
from nsvq.errors import UsageError, UserError
from nsvq.pipelines.autoregressive import TOKEN_KEYS, generates_tokens
from nsvq.pipelines.pipeline import ClassConditionalPipeline

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class SampleConfig(TokenSampling):
    """Samples of a pipeline as a picture, one row a class."""

    pipeline: Path = Field(description="Folder of a pipeline (<out>/pipeline).")
    output: Path = Field(description="The picture: .png, .jpg or .webp.")
    classes: list[int | str] = Field([], description="Class ids or names; without any, images of no class.")
    per_class: int = Field(4, ge=1, description="Images of each class.")
    steps: int = Field(50, ge=1, description="Sampler steps.")
    guidance_scale: float = Field(2.0, ge=0, description="Classifier-free guidance; 1 is none, 0 unconditional.")
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="Noise levels between which guidance acts.")
    guide: Path | None = Field(
        None, description="Folder of a smaller or earlier pipeline to guide by (autoguidance), instead of no class."
    )
    sampler: Sampler | None = Field(None, description="Sampler that fits the model; null is the folder's.")
    seed: int = Field(0, ge=0, description="Seed of the first image; image i has seed + i.")
    batch_size: int = Field(16, ge=1, description="Images to sample at once.")
    device: str | None = Field(None, description="Such as cpu or cuda:1; null is a GPU where there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the network and its latents; the tokenizer stays float32."
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _one_class(cls, value):
        return value if isinstance(value, list) else [value]


def main() -> None:
    config = configs.parse(SampleConfig, sys.argv[1:])
    for folder in filter(None, (config.pipeline, config.guide)):
        if not (folder / "model_index.json").is_file():
            raise UserError(f"there is no pipeline at {folder}: give the <out>/pipeline folder of a finished run")
    if config.output.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--output {config.output} must end in one of {', '.join(_SUFFIXES)}")
    pipeline = ClassConditionalPipeline.from_pretrained(config.pipeline)
    tokens = generates_tokens(pipeline, config.model_fields_set)
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        pipeline.to(device)
        # Not the tokenizer: in bfloat16 it would find other codes in the same latents.
        pipeline.transformer.to(getattr(torch, config.dtype))
        how = config.model_dump(include=TOKEN_KEYS)
        if not tokens:
            guide = pipeline.load_guide(config.guide) if config.guide else None
            how = {"guidance_interval": config.guidance_interval, "num_inference_steps": config.steps}
            how |= {"sampler": config.sampler, "guide": guide}
        launch.keep_freed_memory(device.type)
        classes = [_named(label, pipeline.id2label) for label in config.classes]
        labels = [label for label in classes or [None] for _ in range(config.per_class)]
        how |= {"guidance_scale": config.guidance_scale, "batch_size": config.batch_size, "output_type": "pt"}
        images = pipeline(labels, seeds=list(range(config.seed, config.seed + len(labels))), **how).images
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        save_image(images.float(), config.output, nrow=config.per_class)
    except OSError as error:
        raise UserError(f"cannot write {config.output}: {error}") from None
    print(f"{len(labels)} images: {config.output}")


def _named(label: int | str, names: dict[Any, str]) -> int | str:
    """A number that is also the name of a class, as folders 1, 10, 2 make it, is the name, and that is said."""
    if str(label) not in names.values() or names.get(label) == str(label):
        return label
    if not isinstance(label, str):
        known = next(i for i, name in names.items() if name == str(label))
        print(f"note: {label} is taken for the name of class {known}, not for the class of that id", file=sys.stderr)
    return str(label)


if __name__ == "__main__":
    launch.run(main)
