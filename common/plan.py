"""What a run will need, from its config alone: memory, FLOPs, disk and hours, without a GPU and without data.

python common/plan.py --config configs/imagenet128/nsvq.yaml                        # every GPU that is known
python common/plan.py --config configs/imagenet128/dit-xl.yaml --gpu H100 --count 4 --model.gradient_checkpointing
python common/plan.py --table                                                       # README's hardware table
Any key of the config may be given. The trainers' own step runs on tensors without values, so parameters, FLOPs and the
bytes that autograd keeps are counted; peak memory, speed and hours are computed from them, by the constants below.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, PreTrainedModel

from nsvq.autoregressive import config as autoregressive
from nsvq.autoregressive.model import NextToken, make_llama
from nsvq.autoregressive.trainer import AutoregressiveTrainer
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.counting import Counted, CountingAccelerator, Step, count
from nsvq.common.metrics import PEAK_FLOPS
from nsvq.common.micro_batches import next_accumulation
from nsvq.data.config import IMAGENET
from nsvq.data.sources import open_split
from nsvq.diffusion import config as diffusion
from nsvq.diffusion.model import make_model
from nsvq.diffusion.objectives import make_objective
from nsvq.diffusion.trainer import DiffusionTrainer
from nsvq.errors import UsageError, UserError
from nsvq.tokenizer import ranks
from nsvq.tokenizer.adversary import Adversary
from nsvq.tokenizer.alignment import Alignment
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.discriminator import make_discriminator
from nsvq.tokenizer.logit_loss import LogitLoss
from nsvq.tokenizer.losses import ImageLosses, random_lpips
from nsvq.tokenizer.quantizers import make_quantizer
from nsvq.tokenizer.quantizers.base import NearestQuantizer
from nsvq.tokenizer.quantizers.ns_vq import NSVQPrecursor
from nsvq.tokenizer.schedule import Schedule
from nsvq.tokenizer.step import TokenizerStep, make_networks
from nsvq.tokenizer.teachers import CLASSIFIERS, IMAGENET_MEAN, IMAGENET_STD, Classifier, VisionModel
from nsvq.tokenizer.temperature import Temperature

CONFIGS = Path(__file__).parent.parent / "configs" / "imagenet128"
IMAGENET_IMAGES, IMAGENET_BYTES = 1_281_167, 150e9
CLASSES = 1000
GIB = 2**30
# What CUDA reports as a GPU's memory, GiB; speeds are in common/metrics.py.
MEMORY = {"B200": 178, "H200": 139, "H100": 79, "A100": 79, "L40S": 44, "L40": 44, "A10": 22, "L4": 22}
# Peak memory beyond what is counted: gradients on their way through an image of 128 x 128 (in proportion for others),
# cuDNN's workspace and CUDA's context, NCCL's buffers, and what fragments take.
PASSING, WORKSPACE, NCCL, FRAGMENTS = 20 * 2**20, 1.6 * GIB, 0.5 * GIB, 1.05
# Share of peak FLOP/s: convolutions of float32 norms wait for memory; transformers do not.
UTILIZATION = {"tokenizer": 0.21, "unet": 0.21, "transformer": 0.4}
# TF32 is half as fast as bfloat16, and the codebook's products take three of it to be accurate.
TF32_COST, CODEBOOK_COST = 2, 6


@dataclass
class Plan:
    """A config as far as a plan needs it: `step`(images, device) runs forward and backward of a micro-batch."""

    kind: str  # of UTILIZATION
    config: Any
    samples: int  # of the run
    latents: float  # bytes of the token cache
    make: Callable[[torch.device], "Step"]


# The stages


def read(file: Path, words: list[str], tokenizer_file: Path | None = None) -> Plan:
    """The plan of a config of any stage. A generator's tokenizer is of the config in `tokenizer_file`, at the
    generator's size of images; without one, of that config of ours which leaves it where the generator looks. Raises
    `UsageError` where none does."""
    values = configs.read_config(file)
    transformer = "steps" in (values.get("schedule") or {})
    if not transformer and not values.keys() & {"tokenizer", "steps"}:
        return _tokenizer(configs.parse(TrainConfig, words, file))
    module, kind = (autoregressive, _autoregressive) if transformer else (diffusion, _diffusion)
    config = configs.parse(module.TrainConfig, words, file)
    tokenizer = configs.parse(TrainConfig, [], tokenizer_file or _config_of(Path(config.tokenizer)))
    if tokenizer_file:
        tokenizer.data.image_size = config.data.image_size
    elif config.data.image_size != tokenizer.data.image_size:
        sizes = f"images of {config.data.image_size} pixels, its tokenizer of {tokenizer.data.image_size}"
        raise UsageError(f"the generator is for {sizes}: give --data.image_size, or the tokenizer's --tokenizer_config")
    return kind(config, tokenizer)


def _config_of(folder: Path) -> Path:
    for file in sorted(CONFIGS.parent.glob("*/*.yaml")):
        values = configs.read_yaml(file)
        if "out" in values and "tokenizer" not in values and Path(values["out"]) / "tokenizer" == folder:
            return file
    raise UsageError(f"no config of {CONFIGS.parent} makes {folder}: give its config as --tokenizer_config")


def _images(config: Any) -> int:
    return IMAGENET_IMAGES if config.data.source == IMAGENET else len(open_split(config.data, "train"))


def _tokenizer(config: TrainConfig) -> Plan:
    images = _images(config)
    samples = Schedule(config.schedule, config.nsvq, config.schedule.epoch_samples or images).total_samples
    return Plan("tokenizer", config, samples, 0, lambda device: _tokenizer_step(config, device))


def _tokenizer_step(config: TrainConfig, device: torch.device) -> Step:
    """stage1 with its GAN, which takes the most."""
    accelerator = CountingAccelerator(device)
    encoder, decoder = make_networks(config)
    quantizer = decoder.quantizer
    if isinstance(quantizer, NSVQPrecursor):
        quantizer._finished = 0
    if isinstance(quantizer, NearestQuantizer):
        # Bookkeeping, which may look at values, and takes next to nothing.
        quantizer.searched = lambda *_: None  # type: ignore[method-assign]
    with patch.object(PreTrainedModel, "init_weights", lambda self: None):  # which looks at values
        features, discriminator = make_discriminator(config.discriminator, seed=0, weights=False)
    metric = None
    if config.loss.perceptual != "none":
        metric = random_lpips(config.loss.perceptual, config.loss.perceptual_precision)
        for module in metric.modules():  # lpips makes its buffers on the CPU, whatever the default device
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    logits, alignment = config.loss.logits, config.loss.alignment
    if logits is not None:
        logits = LogitLoss(logits, _teacher(logits.network, "logits"))
    if alignment is not None:
        alignment = Alignment(alignment, config.model.latent_channels, _teacher(alignment.network, "alignment"))
    heads = [alignment.head] if alignment else []
    image_losses = ImageLosses(config.loss, metric, logits, alignment)
    adversary = Adversary(features, discriminator, config.loss.lecam_weight, accelerator)
    encoder, decoder = map(accelerator.prepared, (encoder, decoder))
    step = TokenizerStep(config, encoder, decoder, image_losses, adversary, accelerator)
    step.perturbation = None  # which takes next to nothing
    if device.type == "cuda":  # where memory is counted, without a backward pass
        step.adaptive = {}
    step.begin("stage1", 1.0, Temperature(config.nsvq.pull, quantizer.dim).config.temperature)
    size = config.data.image_size

    def run(images: int) -> None:
        with patch.object(ranks.Draws, "generator", lambda self: None):  # which looks at its state
            step(torch.rand(images, 3, size, size), range(images))

    frozen = [part for part in (features, metric, logits, alignment and alignment.teacher) if part]
    precisions = {"_Distance": config.loss.perceptual_precision}
    precisions |= {"LogitLoss": config.loss.logits.precision} if logits else {}
    precisions |= {"Alignment.teacher": config.loss.alignment.precision} if alignment else {}
    exact = [name for name, precision in precisions.items() if precision == "fp32"]
    return Step(run, [encoder, decoder, discriminator, *heads], [encoder, decoder], frozen, accelerator, exact)


def _teacher(name: str, section: str) -> nn.Module:
    """A loss's frozen network, without its weights."""
    if name in CLASSIFIERS:
        with patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor):  # which looks at values
            return Classifier(CLASSIFIERS[name](weights=None))
    try:
        with patch.object(PreTrainedModel, "init_weights", lambda self: None):  # which looks at them
            model = AutoModel.from_config(AutoConfig.from_pretrained(name), attn_implementation="eager")
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"a plan cannot count {name} ({why}): plan with --loss.{section} null") from None
    return VisionModel(model, IMAGENET_MEAN, IMAGENET_STD, 224)


def _latent_shape(tokenizer: TrainConfig) -> tuple[int, int, int]:
    side = tokenizer.data.image_size // 2 ** (len(tokenizer.model.channel_multipliers) - 1)
    return tokenizer.model.latent_channels, side, side


def _views(config: Any, images: int) -> int:
    return (config.cache_images or images) * (2 if config.data.flip else 1) * config.cache_crops


def _diffusion(config: diffusion.TrainConfig, tokenizer: TrainConfig) -> Plan:
    images, shape = _images(config), _latent_shape(tokenizer)

    def make(device: torch.device) -> Step:
        accelerator = CountingAccelerator(device)
        model, objective = make_model(config.model, shape, CLASSES), make_objective(config.objective, shape)
        trainer = SimpleNamespace(
            config=config, device=device, accelerator=accelerator, objective=objective, model=model, network=model
        )

        def run(images: int) -> None:
            names = ("time_normal", "drop_uniform")
            batch = {name: torch.randn(images, *shape) for name in ("latents", "noise")}
            batch |= {name: torch.rand(images) for name in names} | {"labels": torch.zeros(images, dtype=torch.int64)}
            DiffusionTrainer.step(trainer, batch)  # type: ignore[arg-type]

        return Step(run, [model], [model], _frozen(tokenizer), accelerator)

    size = 2.0 * math.prod(shape) * _views(config, images)
    kind = "unet" if config.model.variant == "unet" else "transformer"
    return Plan(kind, config, config.steps * config.run.batch_size, size, make)


def _autoregressive(config: autoregressive.TrainConfig, tokenizer: TrainConfig) -> Plan:
    images, (_, side, _) = _images(config), _latent_shape(tokenizer)
    with FakeTensorMode():
        codes = make_quantizer(tokenizer.quantizer, tokenizer.model.latent_channels).codebook_size

    def make(device: torch.device) -> Step:
        accelerator = CountingAccelerator(device)
        llama = make_llama(config.model, codes, CLASSES, side**2)
        if config.model.gradient_checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        model = NextToken(llama, codes, config.model.dropout)
        null = codes + CLASSES
        trainer = SimpleNamespace(
            config=config, device=device, accelerator=accelerator, codes=codes, null=null, model=model, network=model
        )

        def run(images: int) -> None:
            batch = {name: torch.zeros(images, *shape, dtype=torch.int64) for name, shape in shapes.items()}
            AutoregressiveTrainer.step(trainer, batch | {"drop_uniform": torch.rand(images)})  # type: ignore[arg-type]

        shapes: dict[str, tuple[int, ...]] = {"codes": (side, side), "labels": ()}
        return Step(run, [model], [model], _frozen(tokenizer), accelerator)

    size = (2.0 if codes <= 2**16 else 4.0) * side**2 * _views(config, images)
    return Plan("transformer", config, config.schedule.steps * config.run.batch_size, size, make)


def _frozen(tokenizer: TrainConfig) -> list[nn.Module]:
    """The tokenizer's networks, which a generator's trainer has on the GPU."""
    return list(make_networks(tokenizer))


# What is computed of it


@dataclass
class Outcome:
    """On some GPUs. `accumulation` is None where not one image fits."""

    accumulation: int | None
    micro_batch: int
    memory: float  # bytes on each GPU
    images_per_second: float  # of all GPUs
    hours: float


def outcome(plan: Plan, counted: Counted, gpu: str, gpus: int, utilization: float | None = None) -> Outcome:
    """Raises `UsageError` where the batch does not divide by the GPUs."""
    batch = plan.config.run.batch_size
    if batch % gpus:
        raise UsageError(f"run.batch_size = {batch} must be a multiple of {gpus} GPUs")
    share, number = batch // gpus, plan.config.run.accumulation
    accumulation: int | None = 1 if number == "auto" else number
    passing = PASSING * (plan.config.data.image_size / 128) ** 2 if plan.kind == "tokenizer" else 0

    def memory(accumulation: int) -> float:
        # Gradients are DDP's buckets; those that it has not sent yet are kept beside them.
        twice = gpus > 1 and accumulation > 1
        fixed = counted.fixed + NCCL * (gpus > 1) + 4 * counted.parameters * twice
        activations = counted.saved_once + share // accumulation * (counted.saved + passing)
        return (fixed + activations) * FRAGMENTS + WORKSPACE

    while accumulation and number == "auto" and memory(accumulation) > MEMORY[gpu] * GIB:
        accumulation = next_accumulation(share, accumulation)
    work = counted.flops + (TF32_COST - 1) * counted.flops_tf32 + CODEBOOK_COST * counted.flops_codebook
    rate = (utilization or UTILIZATION[plan.kind]) * PEAK_FLOPS[gpu] * gpus / work
    parts = accumulation or share
    return Outcome(accumulation, share // parts, memory(parts), rate, plan.samples / rate / 3600)


def report(plan: Plan, counted: Counted, gpus: list[str], number: int, utilization: float | None) -> list[str]:
    """The lines that are printed."""
    saved, once = counted.saved / 2**20, counted.saved_once / GIB
    keep = plan.config.run.keep_checkpoints + 1  # a new one is whole before an old one goes
    disk = [f"{keep} checkpoints {keep * counted.checkpoint / 1e9:.1f} GB"]
    if plan.latents:
        disk.append(f"token cache {plan.latents / 1e9:.1f} GB")
    if plan.config.data.source == IMAGENET:
        disk.append(f"data {IMAGENET_BYTES / 1e9:.0f} GB, and as much for the cache of `datasets`")
    share = utilization or UTILIZATION[plan.kind]
    lines = [
        f"counted: {counted.parameters / 1e6:.1f} M parameters; {counted.fixed / GIB:.2f} GiB with gradients, "
        "optimizers, averages and frozen networks",
        f"counted: {saved:.0f} MiB of activations an image, {once:.2f} GiB a micro-batch (bfloat16 by CUDA's rules)",
        f"counted: {counted.flops / 1e9:.0f} GFLOP an image, forward and backward, and "
        f"{counted.flops_codebook / 1e9:.1f} of the codebook, three times that on tensor cores",
        f"disk: {'; '.join(disk)}",
        f"computed, at {share:.0%} of the GPU's dense bfloat16 peak, for {plan.samples / 1e6:,.1f} M images:",
        "| GPUs | run.accumulation | micro-batch | GiB a GPU | images/s | hours |",
        "|---" * 6 + "|",
    ]
    for gpu in gpus:
        found = outcome(plan, counted, gpu, number, utilization)
        fits = str(found.accumulation or "not one image fits")
        lines.append(
            f"| {number} x {gpu} ({MEMORY[gpu]} GiB) | {fits} | {found.micro_batch} | {found.memory / GIB:.0f} | "
            f"{found.images_per_second:,.0f} | {found.hours:,.0f} |"
        )
    return lines


TABLE = [("A10", 1, "one-gpu"), ("H100", 1, "one-gpu"), ("H100", 4, "four-gpus"), ("H100", 8, "four-gpus")]


def table() -> list[str]:
    """README's: the default recipe's two stages on a few machines."""
    plans = {name: read(CONFIGS / f"{file}.yaml", []) for name, file in STAGES.items()}
    counts = {name: count(plan.make) for name, plan in plans.items()}
    lines = [
        "| computed | `accelerate launch` | stage | accumulation | GiB a GPU | images/s | time |",
        "|---" * 7 + "|",
    ]
    for gpu, gpus, file in TABLE:
        command = f"`--config_file configs/accelerate/{file}.yaml{' --num_processes 8' if gpus == 8 else ''}`"
        for name, plan in plans.items():
            found = outcome(plan, counts[name], gpu, gpus)
            time = f"{found.hours:.0f} h" if found.hours < 72 else f"{found.hours / 24:.0f} days"
            machine = f"{gpus} x {24 if gpu == 'A10' else 80} GB ({gpu})"
            lines.append(
                f"| {machine} | {command} | {name} | {found.accumulation} (auto) | {found.memory / GIB:.0f} | "
                f"{found.images_per_second:,.0f} | {time} |"
            )
    return lines


STAGES = {"tokenizer": "nsvq", "DiT-B": "dit-b"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --tokenizer is a key of a config
    )
    parser.add_argument("--config", type=Path, default=CONFIGS / "nsvq.yaml", help="of any stage")
    parser.add_argument("--gpu", nargs="+", choices=list(MEMORY), default=list(MEMORY))
    parser.add_argument("--count", type=int, default=1, help="GPUs")
    parser.add_argument("--utilization", type=float, help=f"share of peak FLOP/s; default: {UTILIZATION}")
    parser.add_argument(
        "--tokenizer_config", type=Path, help="of a generator's tokenizer; default: the one of ours that makes it"
    )
    parser.add_argument("--table", action="store_true", help="print README's hardware table")
    options, words = parser.parse_known_args(sys.argv[1:])
    if options.table:
        print(*table(), sep="\n")
        return
    plan = read(options.config, words, options.tokenizer_config)
    print(*report(plan, count(plan.make), options.gpu, options.count, options.utilization), sep="\n")


if __name__ == "__main__":
    launch.run(main)
