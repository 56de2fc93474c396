"""A whole training step of NSVQ against SimVQ and plain VQ, at the paper's shape unless told otherwise.

python benchmarks/tokenizer_step.py                                  # 128 px, K = 65,536, d = 128, batch 32
python benchmarks/tokenizer_step.py --reference vq --methods vq fsq lfq ibq --bare
python benchmarks/tokenizer_step.py --batch 8 --codebook_size 8192 --rounds 5
A step of stage 1 with all of its losses and both optimizers; LPIPS has random weights, which cost the same. --bare
leaves out LPIPS and GAN, which cost every method the same, so that its ratios are farther from 1 than those of a run.
Each method has a process of its own, and they take turns; a time is the median of the rounds, a ratio that of ratios,
memory the peak, weights and all. --flops counts the reference's FLOPs instead, and in which type they are.
"""

import argparse
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from measure import Elsewhere, interleaved, machine, ratio, serve
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nsvq.common import config as configs
from nsvq.common.launch import LONG_WAIT, keep_freed_memory
from nsvq.tokenizer.adversary import Adversary
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.discriminator import make_discriminator
from nsvq.tokenizer.losses import load_losses, random_lpips
from nsvq.tokenizer.quantizers import make_quantizer
from nsvq.tokenizer.step import TokenizerStep, make_networks, make_optimizers
from nsvq.tokenizer.temperature import Temperature

CONFIGS = Path(__file__).parent.parent / "configs" / "imagenet128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["nsvq", "simvq", "vq"], help="configs of configs/imagenet128")
    parser.add_argument("--reference", default="simvq", help="the method that ratios refer to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codebook_size", type=int, help="K; none given: the configs', 65,536 or the nearest there is")
    parser.add_argument("--bare", action="store_true", help="without LPIPS and GAN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--flops", action="store_true", help="of one step of the reference, by type; no times")
    parser.add_argument("--method", help="be the process of this method")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.method:
        keep_freed_memory(device.type)  # as the trainer does
        config = load(options.method, options.codebook_size, options.bare)
        # In the second step optimizers hold their moments.
        serve(lambda: TrainingStep(config, options.batch, device), device, calls=2)
        return
    if options.flops:
        config = load(options.reference, options.codebook_size, options.bare)
        print_flops(TrainingStep(config, options.batch, device))
        return
    chosen = {name: getattr(options, name) for name in ("batch", "codebook_size", "bare", "device")}
    steps = {name: Elsewhere(chosen | {"method": name}) for name in options.methods}
    seconds = interleaved(steps, options.rounds, device)
    print(
        f"{machine(device)}; batch {options.batch} of 128 x 128, {options.batch * 256} tokens, bfloat16 autocast, "
        f"{'without LPIPS and GAN, ' if options.bare else ''}{options.rounds} rounds\n"
    )
    reference = options.reference
    print(f"| method | K | d | s a step | times {reference} | GiB | times {reference} |\n|---|---|---|---|---|---|---|")
    for name, step in steps.items():
        config, times = load(name, options.codebook_size, options.bare), ratio(seconds[name], seconds[reference])
        quantizer = make_quantizer(config.quantizer, config.model.latent_channels)
        print(
            f"| {name} | {quantizer.codebook_size:,} | {quantizer.dim} | {statistics.median(seconds[name]):.3f} | "
            f"{times:.3f} | {step.peak / 2**30:.2f} | {step.peak / steps[reference].peak:.3f} |"
        )


class FlopsByType(FlopCounterMode):
    """FLOPs by the type of what they make. The codebook's operators count the products that their kernels need: one of
    [N, d] with [d, K] for the search, three with the NS loss."""

    def __init__(self):
        ops = torch.ops.nsvq
        formulas = {ops.nearest_code: partial(products, 1), ops.nonstationary: partial(products, 3)}
        super().__init__(display=False, custom_mapping=formulas)
        self.custom = set(formulas)
        self.by_type: Counter[str] = Counter()

    def _count_flops(self, packet, out, args, kwargs):
        before = self.get_total_flops()
        result = super()._count_flops(packet, out, args, kwargs)
        if flops := self.get_total_flops() - before:
            made = next(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            self.by_type["codebook, float32" if packet in self.custom else str(made.dtype)] += flops
        return result


def products(count: int, z: tuple, codebook: tuple, *_, **__) -> int:
    """Of shapes [N, d] and [K, d]."""
    return count * 2 * z[0] * codebook[0] * z[1]


def print_flops(step: "TrainingStep") -> None:
    with FlopsByType() as counter:
        step()
    total, images = counter.get_total_flops(), len(step.images)
    print(f"{total / images / 1e9:.1f} GFLOP an image")
    for name, flops in counter.by_type.most_common():
        print(f"{flops / total:7.2%} {name.removeprefix('torch.')}")


def load(name: str, codebook_size: int | None, bare: bool) -> TrainConfig:
    """A config of configs/imagenet128; a `codebook_size` replaces its own."""
    options = [f"--quantizer.codebook_size={codebook_size}"] if codebook_size else []
    options += ["--loss.perceptual=none", "--loss.adversarial_weight=0"] if bare else []
    return configs.parse(TrainConfig, options, CONFIGS / f"{name}.yaml")


class TrainingStep:
    """A call that trains the networks of `config` one step, as the trainer does."""

    def __init__(self, config: TrainConfig, batch: int, device: torch.device):
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16", kwargs_handlers=[LONG_WAIT])
        encoder, decoder = make_networks(config)
        features, discriminator = make_discriminator(config.discriminator, seed=0)
        losses = load_losses(
            config.loss.model_copy(update={"perceptual": "none"}), config.model.latent_channels, device
        )
        if config.loss.perceptual != "none":
            losses.lpips = random_lpips(config.loss.perceptual, config.loss.perceptual_precision).to(device)
        heads = [losses.alignment.head] if losses.alignment else []
        self.optimizers = make_optimizers(config, encoder, decoder, heads, discriminator, device)
        encoder, decoder, discriminator = accelerator.prepare(encoder, decoder, discriminator)
        adversary = Adversary(features.to(device), discriminator, config.loss.lecam_weight, accelerator)
        self.step = TokenizerStep(config, encoder, decoder, losses, adversary, accelerator)
        self.images = torch.rand(batch, 3, 128, 128, device=device) * 2 - 1
        quantizer = decoder.quantizer
        if count := quantizer.initial_latents():
            quantizer.initialize(torch.randn(count, config.model.latent_channels, device=device))
        quantizer.revive_after = config.nsvq.revive
        self.tau = Temperature(config.nsvq.pull, quantizer.dim).config.temperature

    def __call__(self) -> None:
        self.step.begin("stage1", 1.0, self.tau)
        self.step(self.images, range(len(self.images)))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step.end(stepped=True)


if __name__ == "__main__":
    main()
