"""Train a DiT, or a U-Net, by rectified flow or as a DDPM, in the latent space of a frozen tokenizer.

accelerate launch diffusion/train.py                                    # DiT-B on what the default tokenizer run left
accelerate launch diffusion/train.py --config configs/imagenet128/dit-xl.yaml --tokenizer runs/nsvq/tokenizer
accelerate launch --num_processes 4 --mixed_precision bf16 diffusion/train.py --config FILE --tokenizer DIR
The same command goes on from the newest checkpoint; the finished pipeline is in <out>/pipeline.
"""

import contextlib
import copy
import math
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from pydantic import Field, model_validator
from torch.nn.utils import clip_grad_norm_

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.config import Config
from nsvq.common.guard import Guard
from nsvq.common.metrics import Means, show, surviving
from nsvq.common.run import (
    Run,
    RunConfig,
    averaged_weights,
    code_version,
    make_accelerator,
    micro_batch_size,
    progress_bar,
)
from nsvq.common.sharding import full, split_like
from nsvq.data.config import DataConfig
from nsvq.diffusion.model import DiTConfig, ModelConfig, make_model
from nsvq.diffusion.objectives import FlowConfig, ObjectiveConfig, drop_labels, make_objective
from nsvq.diffusion.sampling import TIMESTEPS, sample
from nsvq.errors import UsageError, UserError
from nsvq.eval.features import INCEPTION
from nsvq.eval.monitor import FrechetMonitor
from nsvq.pipelines.export import check_classes, save_pipeline, to_stock
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.latents import train_batches
from nsvq.tokenizer.pretrained import Tokenizer, read_training

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "dit-b.yaml"
_QUARTILES = 4  # of the noise level, in the loss that is logged


class OptimConfig(Config):
    """AdamW, and the averaged weights."""

    lr: float = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam's betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    warmup_steps: int = Field(5_000, ge=0, description="Steps over which the learning rate rises from 0.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the averaged weights, which are what is saved; "
                             "at step n it is at most (1 + n) / (10 + n).")  # fmt: skip


class SamplingConfig(Config):
    """Samples during training, of averaged weights and fixed seeds: a picture, and a Frechet distance."""

    images: int = Field(16, ge=1, description="Images in it, of classes spread over all.")
    steps: int = Field(50, ge=1, description="Sampler steps.")
    guidance_scale: float = Field(2.0, ge=0, description="Classifier-free guidance; 1 is none.")
    fd_every: int | None = Field(
        None, ge=1, description="Optimizer steps between two Frechet distances to the test split; null: none."
    )
    fd_samples: int = Field(5_000, ge=2, description="Samples in each; sample i has seed i and class i mod C.")
    fd_features: str = Field(INCEPTION, description="Their features, as --features of eval/generation.py.")
    fd_features_weights: Path | None = Field(None, description="Weights of these features; null downloads them.")
    fd_guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance of these samples; 1 is none.")


class TrainConfig(Config):
    """Train a DiT or a U-Net (stage two) in the latent space of a frozen tokenizer."""

    out: Path = Field(Path("runs/imagenet128-dit-b"), description="Folder of the run; holds the pipeline at the end.")
    tokenizer: Path = Field(
        Path("runs/imagenet128-nsvq/tokenizer"), description="Folder of the tokenizer: ours, or any diffusers VQModel."
    )
    cache: Path | None = Field(None, description="Folder of the latents; null is <out>/latents.")
    cache_images: int | None = Field(None, ge=1, description="Training images to encode; null is all of them.")
    cache_crops: int = Field(
        1, ge=1, description="Crops of each image to encode: ADM's centre crop, and beyond one ADM's random crops."
    )
    cache_verify: bool = Field(False, description="Compare every shard of a complete cache with its SHA-256 first.")
    latents: Literal["continuous", "quantized"] = Field(
        "continuous", description="Train on the encoder's latents or on their codes; the decoder quantizes either way."
    )
    steps: int = Field(400_000, ge=1, description="Optimizer steps; a run may go on to more of them.")
    export_every: int | None = Field(
        None, ge=1, description="Optimizer steps between two pipelines kept in <out>/pipelines/step-N, such as a guide "
        "for autoguidance; null: none.")  # fmt: skip
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=DiTConfig, discriminator="variant")
    objective: ObjectiveConfig = Field(default_factory=FlowConfig, discriminator="name")
    optim: OptimConfig = Field(default_factory=OptimConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, values: Any) -> Any:
        """A section that does not say which one it is, is the default one."""
        for section, kind in (("model", {"variant": "dit"}), ("objective", {"name": "flow"})):
            if isinstance(values, dict) and isinstance(values.get(section), dict):
                values = values | {section: kind | values[section]}
        return values

    @model_validator(mode="after")
    def _parts_fit(self) -> "TrainConfig":
        if self.objective.name == "ddpm" and TIMESTEPS % self.sampling.steps:
            raise ValueError(f"sampling.steps = {self.sampling.steps} must divide {TIMESTEPS}, the steps of the DDPM")
        return self


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    if not (config.tokenizer / "config.json").is_file():
        raise UserError(f"there is no tokenizer at {config.tokenizer}: train one with `accelerate launch "
                        "tokenizer/train.py`, or give --tokenizer <out>/tokenizer of a finished run")  # fmt: skip
    accelerator = make_accelerator(config.run, config.out, may_shard=True)
    micro_batch = micro_batch_size(config.run, accelerator)
    device, optim = accelerator.device, config.optim

    # Data
    tokenizer = Tokenizer.from_pretrained(config.tokenizer).to(device)
    cache = open_cache(
        config.cache or config.out / "latents",
        tokenizer,
        config.data,
        accelerator,
        workers=config.run.workers,
        limit=config.cache_images,
        crops=config.cache_crops,
        quantized=config.latents == "quantized",
        verify=config.cache_verify,
    )
    names = dict(enumerate(cache.classes)) if config.model.conditional else {}
    check_classes(len(names))
    objective = make_objective(config.objective, cache.shape)
    monitor = None
    if (sampling := config.sampling).fd_every:
        monitor = FrechetMonitor(sampling.fd_features, sampling.fd_features_weights, config.data, accelerator,
                                 workers=config.run.workers)  # fmt: skip

    # Model and optimizer
    set_seed(config.run.seed)  # whatever encoding drew
    try:
        model = make_model(config.model, cache.shape, len(names))
    except ValueError as error:
        raise UsageError(f"the model does not fit these latents: {error}") from None
    if config.model.compile:
        model.compile()
    # What draws and is exported: of a network that FSDP splits, a copy that is not.
    drawing = copy.deepcopy(model).requires_grad_(False).to(device) if accelerator.is_fsdp2 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    network, optimizer = accelerator.prepare(model, optimizer)
    parameters = list(model.parameters())
    ema = EMAModel(parameters, decay=optim.ema_decay, foreach=True)

    # State
    run = Run(accelerator, config, config.out, "diffusion", {"model": network}, {"model": optimizer})
    guard, means = Guard(accelerator), Means(accelerator)
    stateful = {"ema": ema, "guard": guard, "means": means}
    state = run.load()
    if state is not None:
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        ema.shadow_params = [split_like(a, p) for a, p in zip(ema.shadow_params, parameters, strict=True)]
        ema.to(device)
    if run.step > config.steps:
        raise UsageError(f"{config.out} has been trained for {run.step} steps: --steps {config.steps} is too few")

    def states() -> dict:
        return {name: part.state_dict() for name, part in stateful.items()}

    @contextlib.contextmanager
    def averaged() -> Iterator[None]:
        """With EMA weights in `drawing`; a collective call."""
        if drawing is not model:
            for parameter, average in zip(drawing.parameters(), ema.shadow_params, strict=True):
                parameter.copy_(full(average))
            yield
            return
        with averaged_weights(ema, parameters):
            yield

    @torch.no_grad()
    def draw(labels: list[int], seeds: range, guidance_scale: float) -> torch.Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of these classes and seeds."""
        noise = torch.stack([torch.randn(cache.shape, generator=torch.Generator().manual_seed(i)) for i in seeds])
        with accelerator.autocast():
            latents = sample(
                drawing, objective.scheduler(), noise.to(device), torch.tensor(labels, device=device),
                drawing.null_class, steps=sampling.steps, guidance_scale=guidance_scale,
            )  # fmt: skip
        latents = latents / tokenizer.model.config.scaling_factor
        return torch.cat([tokenizer.model.decode(part).sample for part in latents.split(8)])

    def draw_picture() -> None:
        count = sampling.images
        labels = [i * (len(names) or 1) // count for i in range(count)]
        run.save_picture(draw(labels, range(count), sampling.guidance_scale), per_row=math.isqrt(count - 1) + 1)

    def distance() -> dict[str, float]:
        """Of samples of all classes in turn, over all ranks."""
        with averaged():
            return monitor.measure(
                lambda seeds: draw([i % (len(names) or 1) for i in seeds], seeds, sampling.fd_guidance_scale),
                sampling.fd_samples,
            )

    def export(folder: Path) -> None:
        """The pipeline, of the weights in `drawing`."""
        about = {
            "nsvq": code_version(),
            "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate")},
            "step": run.step,
            "samples_seen": run.samples_seen,
            "parameters": sum(p.numel() for p in drawing.parameters()),
            "objective": objective.description,
            "config": configs.to_dict(config),
            "latents": {name: value for name, value in cache.manifest.items() if name not in ("shards", "classes")},
            "tokenizer": read_training(config.tokenizer),
        }
        save_pipeline(folder, to_stock(drawing), tokenizer.model, objective.scheduler(), names, about)

    # Training
    batches = train_batches(
        cache, batch_size=micro_batch, seed=config.run.seed, start=run.samples_seen, rank=accelerator.process_index,
        world_size=accelerator.num_processes, workers=config.run.workers,
    )  # fmt: skip
    bar = progress_bar(accelerator, config.steps, run.step)
    for _ in guard.until(lambda: run.step == config.steps):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * min(1.0, (run.step + 1) / max(1, optim.warmup_steps))
        micro_batches, results = [], []
        for number in range(config.run.accumulation):
            loaded = next(batches)
            micro_batches.append(loaded)
            batch = {name: loaded[name].to(device, non_blocking=True) for name in loaded if name != "id"}
            run.seed_micro_batch(number, micro_batch)
            levels = objective.levels(batch["time_normal"])
            labels = drop_labels(batch["labels"], batch["drop_uniform"], config.model.label_dropout(), model.null_class)
            with accelerator.accumulate(network), run.counting_flops("step", micro_batch):
                with accelerator.autocast():  # accelerate puts none around a network that FSDP2 splits
                    losses = objective.losses(network, batch["latents"], batch["noise"], levels, labels)
                accelerator.backward(losses.mean())
            results.append((losses.detach(), levels))
        accelerator.unscale_gradients()
        norm = full(clip_grad_norm_(parameters, optim.clip_grad_norm))
        if guard.step([optimizer], [norm, *(losses.mean() for losses, _ in results)]):
            ema.step(parameters)
            share = micro_batch * config.run.accumulation
            means.add("grad_norm", share * norm, share)
            for losses, levels in results:
                _add_losses(means, losses, levels)
        run.step += 1
        run.samples_seen += config.run.batch_size
        bar.update()
        if guard.in_a_row >= config.run.skip_limit:
            run.give_up(states(), micro_batches, guard.in_a_row)

        last = run.step == config.steps
        values = distance() if monitor and (run.step % sampling.fd_every == 0 or last) else {}
        if run.step % config.run.log_every == 0 or last:
            values |= means.take() | {"lr": optimizer.param_groups[0]["lr"], "ema_decay": ema.cur_decay_value}
            values |= {"skipped_steps": guard.skipped}
        if values:
            show(bar, run.log(values), ("loss", "grad_norm"))
        picture = run.step % config.run.sample_every == 0 or last
        kept = config.export_every is not None and run.step % config.export_every == 0
        if picture or kept:
            with averaged():
                if picture and accelerator.is_main_process:
                    draw_picture()
                if kept and accelerator.is_main_process:
                    with surviving(f"pipelines/step-{run.step}"):
                        (config.out / "pipelines").mkdir(exist_ok=True)
                        export(config.out / "pipelines" / f"step-{run.step}")
        if run.checkpoint_due() or last or guard.stop:
            run.save(states())
        if guard.stop:
            run.stop(guard.stop)
    bar.close()

    with averaged():
        if accelerator.is_main_process:
            export(config.out / "pipeline")
    if accelerator.is_main_process:
        accelerator.print(f"pipeline: {config.out / 'pipeline'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _add_losses(means: Means, losses: torch.Tensor, levels: torch.Tensor) -> None:
    """Losses [B] at noise levels [B], in all and by quarter of the level."""
    means.add("loss", losses.sum(), len(losses))
    quartile = (levels * _QUARTILES).long().clamp(max=_QUARTILES - 1)
    for q in range(_QUARTILES):
        inside = (quartile == q).float()
        means.add(f"loss_level_q{q + 1}", (losses * inside).sum(), inside.sum())


if __name__ == "__main__":
    launch.run(main)
