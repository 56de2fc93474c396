"""A whole training step of NSVQ against SimVQ and plain VQ, at the paper's shape unless told otherwise.

python benchmarks/tokenizer_step.py                                  # 128 px, K = 65,536, d = 128, batch 32
python benchmarks/tokenizer_step.py --reference vq --methods vq fsq lfq ibq
python benchmarks/tokenizer_step.py --batch 8 --codebook_size 8192 --rounds 5
Stage 1 with L1 and the quantizer's losses, without LPIPS and GAN: they cost every method the same, so that the ratios
here are above those of a full run. Steps are interleaved; a time is the median of the rounds, a ratio that of ratios.
"""

import argparse
import statistics
from pathlib import Path

import torch
from measure import interleaved, machine, peak_memory, ratio

from common import config as configs
from tokenizer.config import TrainConfig
from tokenizer.losses import phase_weights
from tokenizer.model import QuantizedDecoder, make_encoder
from tokenizer.quantizers import make_quantizer

CONFIGS = Path(__file__).parent.parent / "configs" / "imagenet128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["nsvq", "simvq", "vq"], help="configs of configs/imagenet128")
    parser.add_argument("--reference", default="simvq", help="the method that ratios refer to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--codebook_size", type=int, help="K; none given: the configs', 65,536 or the nearest there is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    steps = {name: TrainingStep(name, options.batch, options.codebook_size, device) for name in options.methods}
    for step in steps.values():
        step()  # allocates gradients and Adam's moments
    memory = {name: peak_memory(step, device) + step.held() for name, step in steps.items()}
    seconds = interleaved(steps, options.rounds, device)
    print(f"{machine(device)}; batch {options.batch} of 128 x 128, {options.batch * 256} tokens, bfloat16 autocast, "
          f"{options.rounds} rounds\n")  # fmt: skip
    reference = options.reference
    print(f"| method | K | d | s a step | times {reference} | GiB | times {reference} |\n|---|---|---|---|---|---|---|")
    for name, step in steps.items():
        quantizer, times = step.decoder.quantizer, ratio(seconds[name], seconds[reference])
        print(f"| {name} | {quantizer.codebook_size:,} | {quantizer.dim} | {statistics.median(seconds[name]):.3f} | "
              f"{times:.3f} | {memory[name] / 2**30:.2f} | {memory[name] / memory[reference]:.3f} |")  # fmt: skip


class TrainingStep:
    """Networks and optimizer of a config of configs/imagenet128, and a call that trains them one step."""

    def __init__(self, name: str, batch: int, codebook_size: int | None, device: torch.device):
        options = [f"--quantizer.codebook_size={codebook_size}"] if codebook_size else []
        config = configs.parse(TrainConfig, options, CONFIGS / f"{name}.yaml")
        torch.manual_seed(0)
        quantizer = make_quantizer(config.quantizer, config.model.latent_channels)
        quantizer.nonstationary_weight = config.loss.nonstationary_weight
        self.encoder = make_encoder(config.model).to(device)
        self.decoder = QuantizedDecoder(config.model, quantizer).to(device)
        self.images = torch.rand(batch, 3, 128, 128, device=device) * 2 - 1
        if count := quantizer.initial_latents():
            quantizer.initialize(torch.randn(count, config.model.latent_channels, device=device))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=config.optim.lr, betas=config.optim.betas)
        weights = phase_weights(config.loss, "stage1", 0.0, quantizer)
        self.weights = {term: weight for term, weight in weights.items() if term not in ("perceptual", "adversarial")}
        self.temperature = config.loss.temperature if "nonstationary" in weights else None

    def __call__(self) -> None:
        with torch.autocast(self.images.device.type, torch.bfloat16):
            output, quantized = self.decoder(self.encoder(self.images), self.temperature)
        terms = {"l1": (output.float() - self.images).abs().mean(), **quantized.losses}
        sum(weight * terms[term] for term, weight in self.weights.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.decoder.quantizer.end_step(True)

    def held(self) -> int:
        """Bytes of parameters, buffers and moments, which are there before a step."""
        tensors = [*self.encoder.parameters(), *self.decoder.parameters(), *self.decoder.buffers()]
        moments = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *moments))


if __name__ == "__main__":
    main()
