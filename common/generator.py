"""What trainers of generators share: a tokenizer's cached tokens, and samples on the way, with averaged weights."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from torch import Tensor, nn

from nsvq.common.config import Config, to_dict
from nsvq.common.fsdp import full
from nsvq.common.metrics import surviving
from nsvq.common.optimized import Optimized
from nsvq.common.run import RunConfig, code_version
from nsvq.common.trainer import Trainer
from nsvq.data.config import DataConfig
from nsvq.errors import UsageError

Distance = Callable[[Callable[[range], Tensor], int], dict[str, float]]


class DrawingConfig(Config):
    """Samples during training, of averaged weights and fixed seeds: a picture, and a Frechet distance."""

    images: int = Field(16, ge=1, description="Images in the picture, of classes spread over all.")
    guidance_scale: float = Field(2.0, ge=0, description="Classifier-free guidance; 1 is none.")
    fd_every: int | None = Field(None, ge=1, description="Steps between two Frechet distances to the test split.")
    fd_samples: int = Field(5_000, ge=2, description="Samples in each; sample i has seed i and class i mod C.")
    fd_features: str = Field("inception-v3-compat", description="Their features, as --features of eval/generation.py.")
    fd_features_weights: Path | None = Field(None, description="Weights of these features; null downloads them.")
    fd_guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance of these samples; 1 is none.")


class GeneratorConfig(Config):
    """What the config of a generator has; it adds `optim` with `ema_decay` and `clip_grad_norm`."""

    out: Path = Field(description="Folder of the run; holds the pipeline at the end.")
    tokenizer: Path = Field(
        Path("runs/imagenet128-nsvq/tokenizer"), description="Folder or Hub id of a VQModel, or an autoencoder."
    )
    cache: Path | None = Field(None, description="Folder of the tokens; null: in <out>.")
    cache_images: int | None = Field(None, ge=1, description="Training images to encode; null is all of them.")
    cache_crops: int = Field(1, ge=1, description="Crops of an image to encode: the centre one, then ADM's random.")
    cache_verify: bool = Field(False, description="Compare every shard of a complete cache with its SHA-256 first.")
    export_every: int | None = Field(None, ge=1, description="Steps between two pipelines in <out>/pipelines/step-N.")
    data: DataConfig = Field(default_factory=DataConfig)
    sampling: DrawingConfig = Field(default_factory=DrawingConfig)
    run: RunConfig = Field(default_factory=RunConfig)


def check_image_size(tokenizer: Any, data: DataConfig) -> None:
    """Raises `UsageError` where a tokenizer that this project trained was trained on images of another size."""
    if tokenizer.trained is not None and tokenizer.image_size != data.image_size:
        what = f"the tokenizer was trained on images of {tokenizer.image_size} pixels, and data.image_size is"
        raise UsageError(f"{what} {data.image_size}: give --data.image_size {tokenizer.image_size}")


class GeneratorTrainer(Trainer):
    """Trains a network on the tokens of `cache`, which `tokenizer` made. Its clock is the optimizer step.

    A subclass's constructor calls this one first, makes its network, and ends with `adopt`; `sample` draws from
    `drawn`, the network that trains, or a copy of it, where FSDP splits that one. save(folder, trainer) writes the
    pipeline of the weights in `drawn`. distance(draw, n), where there is one, measures n samples that draw(range of
    numbers) makes; a collective call.
    """

    config: Any
    shown = ("loss", "grad_norm")

    def __init__(
        self,
        config: GeneratorConfig,
        accelerator: Accelerator,
        tokenizer: nn.Module,
        cache: Any,
        save: Callable[[Path, Any], None],
        distance: Distance | None,
    ):
        super().__init__(config, accelerator)
        self.tokenizer, self.cache, self.save, self.distance = tokenizer, cache, save, distance
        key = cache.manifest["key"]
        self.inputs = {"data.source": key["data"], "tokenizer": key["tokenizer"]}
        self.names = dict(enumerate(cache.classes))
        set_seed(config.run.seed)  # whatever encoding drew

    def adopt(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, drawn: nn.Module) -> None:
        """Train `model`, of which `drawn` is the part that draws. Raises what `Run` does."""
        optim, self.split = self.config.optim, self.accelerator.is_fsdp2
        self.drawn = copy.deepcopy(drawn).requires_grad_(False).to(self.device) if self.split else drawn
        self.model = model
        self.network, optimizer = self.accelerator.prepare(model, optimizer)
        parameters = list(model.parameters())
        part = Optimized(optimizer, parameters, optim.clip_grad_norm)
        ema = {"decay": optim.ema_decay, "foreach": True}
        self.register(name, {"model": self.network}, {"model": part}, parameters, ema)

    def sample(self, labels: list[int], seeds: range, guidance_scale: float) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of these classes and seeds, with the weights in `drawn`. Each
        generator defines it."""
        raise NotImplementedError

    def measure(self, due: bool, last: bool) -> dict[str, float]:
        values = {}
        if due:
            group, *_ = self.optimized["model"].optimizer.param_groups
            values = {"lr": group["lr"], "ema_decay": self.ema.cur_decay_value}
        every = self.config.sampling.fd_every
        if self.distance and every is not None and (self.run.step % every == 0 or last):
            values |= self._measured_distance()
        return values

    def _measured_distance(self) -> dict[str, float]:
        with self.averaged_weights():
            found = self.distance(self._of_all_classes, self.config.sampling.fd_samples)
        if self.guard.interrupted_anywhere():
            self.run.warn("a signal came: no distance here, it would take the time of the checkpoint")
            return {}
        return found

    def _of_all_classes(self, numbers: range) -> Tensor:
        """Samples of all classes in turn: number i has seed i. Black ones once the run is to stop, which are not
        measured."""
        if self.guard.interrupted():
            size = self.config.data.image_size
            return torch.zeros(len(numbers), 3, size, size, device=self.device)
        labels = [i % max(1, len(self.names)) for i in numbers]
        return self.sample(labels, numbers, self.config.sampling.fd_guidance_scale)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """With the averages in `drawn`. A collective call."""
        if not self.split:
            with super().averaged_weights():
                yield
            return
        for parameter, average in zip(self.drawn.parameters(), self.ema.shadow_params, strict=True):
            parameter.copy_(full(average))
        yield

    def draw(self) -> None:
        count = self.config.sampling.images
        labels = [i * max(1, len(self.names)) // count for i in range(count)]
        images = self.sample(labels, range(count), self.config.sampling.guidance_scale)
        self.run.save_picture(images, per_row=math.isqrt(count - 1) + 1)

    def keep(self) -> None:
        every = self.config.export_every
        if every is not None and self.run.step % every == 0:
            name = f"pipelines/step-{self.run.step}"
            with surviving(name):
                self._save(self.config.out / name)

    def export(self) -> None:
        """<out>/pipeline, with averaged weights."""
        self._save(self.config.out / "pipeline")
        self.accelerator.print(f"pipeline: {self.config.out / 'pipeline'}")

    def _save(self, folder: Path) -> None:
        with self.averaged_weights():
            if self.accelerator.is_main_process:
                folder.parent.mkdir(exist_ok=True)
                self.save(folder, self)

    def about(self, objective: str, *packages: str) -> dict[str, Any]:
        """How `drawn` was trained, for its folder; `packages` whose versions matter beside torch's and so on."""
        return {
            "nsvq": code_version(),
            "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate", *packages)},
            "step": self.run.step,
            "samples_seen": self.run.samples_seen,
            "parameters": sum(p.numel() for p in self.drawn.parameters()),
            "objective": objective,
            "config": to_dict(self.config),
            "latents": {k: v for k, v in self.cache.manifest.items() if k not in ("shards", "classes")},
            "tokenizer": self.tokenizer.trained,
        }
