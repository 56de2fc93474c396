"""Train a class-conditional DiT by rectified flow in the latent space of a frozen tokenizer.

accelerate launch diffusion/train.py                                    # DiT-B on what the default tokenizer run left
accelerate launch diffusion/train.py --config configs/imagenet128/dit-xl.yaml --tokenizer runs/nsvq/tokenizer
accelerate launch --num_processes 4 --mixed_precision bf16 diffusion/train.py --config FILE --tokenizer DIR
The same command goes on from the newest checkpoint; the finished pipeline is in <out>/pipeline.
"""

import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel
from pydantic import Field, model_validator
from torch.nn.utils import clip_grad_norm_

from common import config as configs
from common import launch
from common.config import Config
from common.data import DataConfig
from common.errors import UsageError, UserError
from common.guard import Guard
from common.metrics import Means, show
from common.run import (
    Run,
    RunConfig,
    averaged_weights,
    code_version,
    make_accelerator,
    micro_batch_size,
    progress_bar,
)
from diffusion.encode import open_cache
from diffusion.flow import (
    FlowConfig,
    dimension_shift,
    drop_labels,
    flow_loss,
    make_scheduler,
    sample,
    training_sigma,
)
from diffusion.latents import train_batches
from diffusion.model import DiTConfig, ModelConfig, make_model
from pipelines.export import check_classes, save_pipeline, to_stock
from tokenizer import Tokenizer
from tokenizer.pretrained import read_training

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "dit-b.yaml"
_QUARTILES = 4  # of sigma, in the loss that is logged


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
    """The picture of samples during training."""

    images: int = Field(16, ge=1, description="Images in it, of classes spread over all.")
    steps: int = Field(50, ge=1, description="Sampler steps.")
    guidance_scale: float = Field(2.0, ge=0, description="Classifier-free guidance; 1 is none.")


class TrainConfig(Config):
    """Train a class-conditional DiT (stage two) in the latent space of a frozen tokenizer."""

    out: Path = Field(Path("runs/imagenet128-dit-b"), description="Folder of the run; holds the pipeline at the end.")
    tokenizer: Path = Field(
        Path("runs/imagenet128-nsvq/tokenizer"), description="Folder of the tokenizer: ours, or any diffusers VQModel."
    )
    cache: Path | None = Field(None, description="Folder of the latents; null is <out>/latents.")
    cache_images: int | None = Field(None, ge=1, description="Training images to encode; null is all of them.")
    steps: int = Field(400_000, ge=1, description="Optimizer steps.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=DiTConfig, discriminator="variant")
    flow: FlowConfig = Field(default_factory=FlowConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="before")
    @classmethod
    def _default_variant(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values = values | {"model": {"variant": "dit"} | values["model"]}
        return values


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    if not (config.tokenizer / "config.json").is_file():
        raise UserError(f"there is no tokenizer at {config.tokenizer}: train one with `accelerate launch "
                        "tokenizer/train.py`, or give --tokenizer <out>/tokenizer of a finished run")  # fmt: skip
    accelerator = make_accelerator(config.run, config.out)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("checkpoints and averaged weights are of whole networks, and FSDP splits them: launch with "
                         "DDP (configs/accelerate/four-gpus.yaml), and --model.gradient_checkpointing for large "
                         "models")  # fmt: skip
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
    )
    names = dict(enumerate(cache.classes)) if config.model.conditional else {}
    check_classes(len(names))
    shift = config.flow.shift or dimension_shift(cache.shape)

    # Model and optimizer
    set_seed(config.run.seed)  # whatever encoding drew
    try:
        model = make_model(config.model, cache.shape, len(names))
    except ValueError as error:
        raise UsageError(f"the model does not fit these latents: {error}") from None
    if config.model.compile:
        model.compile()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    network, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters, decay=optim.ema_decay, foreach=True)

    # State
    run = Run(accelerator, config, config.out, "diffusion", {"model": network}, {"model": optimizer})
    guard, means = Guard(accelerator), Means(accelerator)
    stateful = {"ema": ema, "guard": guard, "means": means}
    state = run.load()
    if state is not None:
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        ema.to(device)

    def states() -> dict:
        return {name: part.state_dict() for name, part in stateful.items()}

    @torch.no_grad()
    def draw() -> None:
        """Samples from fixed noise, with EMA weights."""
        count = config.sampling.images
        labels = torch.arange(count, device=device) * (len(names) or 1) // count
        noise = torch.stack(
            [torch.randn(cache.shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
        )
        with averaged_weights(ema, parameters), accelerator.autocast():
            latents = sample(
                model, make_scheduler(shift), noise.to(device), labels, model.null_class,
                steps=config.sampling.steps, guidance_scale=config.sampling.guidance_scale,
            )  # fmt: skip
        latents = latents / tokenizer.model.config.scaling_factor
        images = torch.cat([tokenizer.model.decode(part).sample for part in latents.split(8)])
        run.save_picture(images, per_row=math.isqrt(count - 1) + 1)

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
            sigma = training_sigma(batch["time_normal"], config.flow, shift)
            labels = drop_labels(batch["labels"], batch["drop_uniform"], config.model.label_dropout(), model.null_class)
            with accelerator.accumulate(network), run.counting_flops("step", micro_batch):
                losses = flow_loss(network, batch["latents"], batch["noise"], sigma, labels)
                accelerator.backward(losses.mean())
            results.append((losses.detach(), sigma))
        accelerator.unscale_gradients()
        norm = clip_grad_norm_(parameters, optim.clip_grad_norm)
        if guard.step([optimizer], [norm, *(losses.mean() for losses, _ in results)]):
            ema.step(parameters)
            share = micro_batch * config.run.accumulation
            means.add("grad_norm", share * norm, share)
            for losses, sigma in results:
                _add_losses(means, losses, sigma)
        run.step += 1
        run.samples_seen += config.run.batch_size
        bar.update()
        if guard.in_a_row >= config.run.skip_limit:
            run.give_up(states(), micro_batches, guard.in_a_row)

        last = run.step == config.steps
        if run.step % config.run.log_every == 0 or last:
            values = means.take() | {"lr": optimizer.param_groups[0]["lr"], "ema_decay": ema.cur_decay_value}
            values = run.log(values | {"skipped_steps": guard.skipped})
            show(bar, values, ("loss", "grad_norm"))
        if (run.step % config.run.sample_every == 0 or last) and accelerator.is_main_process:
            draw()
        if run.checkpoint_due() or last or guard.stop:
            run.save(states())
        if guard.stop:
            run.stop(guard.stop)
    bar.close()

    # Export, with EMA weights
    if accelerator.is_main_process:
        ema.copy_to(parameters)
        about = {
            "nsvq": code_version(),
            "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "accelerate")},
            "step": run.step,
            "samples_seen": run.samples_seen,
            "parameters": sum(p.numel() for p in parameters),
            "flow_shift": shift,
            "config": configs.to_dict(config),
            "latents": {name: value for name, value in cache.manifest.items() if name not in ("shards", "classes")},
            "tokenizer": read_training(config.tokenizer),
        }
        save_pipeline(config.out / "pipeline", to_stock(model.cpu()), tokenizer.model.cpu(), make_scheduler(shift),
                      names, about)  # fmt: skip
        accelerator.print(f"pipeline: {config.out / 'pipeline'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _add_losses(means: Means, losses: torch.Tensor, sigma: torch.Tensor) -> None:
    """Losses [B] at noise levels sigma [B], in all and by quartile of sigma."""
    means.add("loss", losses.sum(), len(losses))
    quartile = (sigma * _QUARTILES).long().clamp(max=_QUARTILES - 1)
    for q in range(_QUARTILES):
        inside = (quartile == q).float()
        means.add(f"loss_sigma_q{q + 1}", (losses * inside).sum(), inside.sum())


if __name__ == "__main__":
    launch.run(main)
