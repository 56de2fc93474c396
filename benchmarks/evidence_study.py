"""A study as its YAML says it: what its runs train, what sets them apart, and the names of their records."""

import hashlib
import json
import os
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nsvq.autoregressive.config import TrainConfig as AutoregressiveConfig
from nsvq.common import config as configs
from nsvq.common.config import merged
from nsvq.data.config import DataConfig
from nsvq.diffusion.config import TrainConfig as DiffusionConfig
from nsvq.eval.config import GenerationConfig
from nsvq.tokenizer.config import TrainConfig

COLUMNS = {  # of the table: metric (or its start, with _ at the end), heading, format
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips_": ("LPIPS", "{:.3f}"),
    "rf": ("FD", "{:.1f}"),
    "fd_at_": ("FD of samples, guidance {}", "{:.1f}"),
    "accuracy_at_": ("in their class, guidance {}", "{:.1%}"),
    "accuracy_real": ("real photos", "{:.1%}"),
    "held_out_bits": ("bits an image", "{:.0f}"),
    "minutes": ("minutes of training", "{:.0f}"),
    "quantization_error": ("quantization MSE", "{:.4f}"),
    "relative_error": ("MSE / mean z²", "{:.4f}"),
    "utilization": ("utilization", "{:.1%}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "perplexity_fraction": ("perplexity / K", "{:.3f}"),
    "codebook_size": ("K", "{:.0f}"),
    "bits_per_token": ("bits a token", "{:.1f}"),
    "tokens_per_image": ("tokens", "{:.0f}"),
    "lowest_utilization": ("lowest utilization in training", "{:.1%}"),
    "drift_rms": ("drift", "{:.3f}"),
    "drift_relative": ("drift / RMS(z)", "{:.3f}"),
    "churn": ("churn", "{:.2f}"),
    "winner_mass": ("winner's mass", "{:.2f}"),
    "step_ms": ("step, ms", "{:.0f}"),
    "memory_gib": ("memory, GiB", "{:.2f}"),
}
MAIN = ["psnr", "ssim", "lpips_", "rf", "quantization_error", "relative_error", "utilization", "perplexity_fraction"]
CURVES = {
    "val_psnr",
    "val_quantization_error",
    "utilization",
    "perplexity",
    "epoch_commitment",
    "latent_rms",
    "drift_rms",
    "drift_relative",
    "churn",
    "winner_mass",
    "effective_codes",
    "held_out_bits",
    "fd",
}
STAGES = {"diffusion": DiffusionConfig, "autoregressive": AutoregressiveConfig}


class Generator(configs.Config):
    """What a study trains on each run's tokenizer."""

    stage: Literal["diffusion", "autoregressive"] = Field(description="The folder whose train.py it is for.")
    config: Path = Field(description="Its config, named relative to the study,")
    common: dict[str, Any] = Field({}, description="and what the study changes in it.")
    samples: dict[str, Any] = Field({}, description="Options of eval/generation.py, which measures it.")


class Study(configs.Config):
    """What a study trains and shows."""

    title: str = Field(description="Heading of its page.")
    question: str = Field(description="What it asks, and what is equal for all of its runs: the page's first lines.")
    base: Path = Field(description="Tokenizer config of what all runs have in common, as `base` of any config,")
    common: dict[str, Any] = Field({}, description="and what the study changes in it for all of them.")
    generators: dict[str, Generator] = Field({}, description="Trained on each run's tokenizer; by their names.")
    seeds: list[int] = Field([0], min_length=1, description="One training of each run for each.")
    runs: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Name: what sets it apart, as a tokenizer config.",
    )
    against: str | None = Field(None, description="Run that the others are compared with, seed by seed.")
    columns: list[str] = Field(MAIN, min_length=1, description="Of the table.")
    curves: list[str] = Field([], description="Keys of metrics.jsonl to plot over the training.")

    @model_validator(mode="after")
    def _known(self) -> "Study":
        for given, known in ((self.columns, COLUMNS), (self.curves, CURVES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        if self.against is not None and self.against not in self.runs:
            raise ValueError(f"against: {self.against!r} is not one of the runs")
        for name, generator in self.generators.items():
            options = {"pipeline": "", "output": "x.json"} | generator.samples
            configs.validate(GenerationConfig, options, source=f"samples of {name}")
        return self

    def rows(self) -> dict[str, tuple[str, str | None]]:
        """(run, generator) of each row of the page: runs, or each of them with each generator."""
        if not self.generators:
            return {run: (run, None) for run in self.runs}
        return {f"{run}, {name}": (run, name) for name in self.generators for run in self.runs}

    def peers(self) -> dict[str, str]:
        """The row that each is compared with: of the same generator."""
        by_parts = {parts: row for row, parts in self.rows().items()}
        return {row: by_parts[self.against, name] for row, (_, name) in self.rows().items()} if self.against else {}


def read_study(path: Path) -> Study:
    """The study in `path`, whose configs are named relative to it. Raises `UsageError` where it is none."""
    values = configs.read_yaml(path)
    study = configs.validate(Study, values, source=str(path))
    for part, name in [(study, "base"), *((generator, "config") for generator in study.generators.values())]:
        setattr(part, name, Path(os.path.normpath(path.parent / getattr(part, name))))
    return study


def training_config(study: Study, name: str, seed: int, data: DataConfig, lpips_weights: Path | None = None) -> dict:
    """The tokenizer config of one run, as written: no defaults in it, and no `out`."""
    parts = [configs.read_config(study.base), study.common, study.runs[name]]
    values = _with_data(reduce(merged, parts), seed, data)
    if lpips_weights is not None and values.get("loss", {}).get("perceptual", "vgg") != "none":
        values = merged(values, {"loss": {"perceptual_weights": str(lpips_weights)}})
    configs.validate(TrainConfig, values, source=f"run {name!r}")
    return values


def generator_config(generator: Generator, seed: int, data: DataConfig, features: str) -> dict:
    """The same of what is trained on a tokenizer: no `out` and no `tokenizer` in it. Its Frechet distances are in
    `features`; where these are "none" it measures none."""
    values = _with_data(merged(configs.read_config(generator.config), generator.common), seed, data)
    if values.get("sampling", {}).get("fd_every"):
        distance = {"fd_every": None} if features == "none" else {"fd_features": features}
        values = merged(values, {"sampling": distance})
    configs.validate(STAGES[generator.stage], values, source=str(generator.config))
    return values


def _with_data(values: dict, seed: int, data: DataConfig) -> dict:
    """With the study's images, at the size of the config's; no defaults, so that records outlive a new key of data."""
    section = data.model_dump(mode="json", exclude_defaults=True)
    size = {"source": data.source, "image_size": values["data"]["image_size"]}
    return merged(values, {"data": section | size, "run": {"seed": seed}})


def record_key(values: dict, fingerprint: str, measured: list[str]) -> str:
    """Names what decides a run's numbers: config, data (by what is in it, not where it lies), what is measured."""
    content = values | {"data": values["data"] | {"source": fingerprint}}
    return hashlib.sha256(json.dumps([content, measured], sort_keys=True).encode()).hexdigest()[:16]
