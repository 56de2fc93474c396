"""A step of stage one: its networks, its optimizers, and forward and backward of a micro-batch. The trainer, plans and
benchmarks run the same one."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nsvq.common.fsdp import unwrapped
from nsvq.tokenizer.adversary import Adversary
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.losses import RECONSTRUCTION, ImageLosses, adaptive_weights, phase_weights
from nsvq.tokenizer.model import QuantizedDecoder, make_encoder
from nsvq.tokenizer.perturbation import Perturbation
from nsvq.tokenizer.quantizers import Quantized, make_quantizer
from nsvq.tokenizer.schedule import Phase


def make_networks(config: TrainConfig) -> tuple[nn.Module, QuantizedDecoder]:
    """Encoder, and decoder with the quantizer in it."""
    quantizer = make_quantizer(config.quantizer, config.model.latent_channels)
    config.nsvq.set_up(quantizer)
    return make_encoder(config.model), QuantizedDecoder(config.model, quantizer)


def make_optimizers(
    config: TrainConfig,
    encoder: nn.Module,
    decoder: QuantizedDecoder,
    heads: Sequence[nn.Module],
    discriminator: nn.Module,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Of the generator, with the `heads` of its losses, and of the discriminator."""
    optim = config.optim
    groups = [
        {"params": list(encoder.parameters()), "lr": optim.encoder_lr or optim.lr},
        {"params": list(decoder.decoder.parameters()), "lr": optim.lr},
        # A group of its own: see optim.codebook_eps
        {
            "params": list(decoder.quantizer.parameters()),
            "lr": optim.codebook_lr or optim.lr,
            "eps": optim.codebook_eps,
        },
    ]
    groups += [{"params": list(head.parameters()), "lr": optim.lr} for head in heads]
    # Fused where launches cost; on a CPU it rounds in other ways
    how = {"betas": optim.betas, "fused": device.type == "cuda" or None}
    lr = optim.discriminator_lr or optim.lr
    decay = optim.discriminator_weight_decay
    return torch.optim.Adam(groups, **how), torch.optim.AdamW(
        discriminator.parameters(), lr=lr, weight_decay=decay, **how
    )


class TokenizerStep:
    """Forward and backward, between `begin` and `end`. `encoder` and `decoder` are as accelerate prepared them;
    `live_encoder` and `live_decoder` are without what it puts around them."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: nn.Module,
        decoder: nn.Module,
        losses: ImageLosses,
        adversary: Adversary,
        accelerator: Accelerator,
    ):
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.losses, self.adversary, self.accelerator = losses, adversary, accelerator
        self.live_encoder, self.live_decoder = map(unwrapped, (encoder, decoder))
        self.quantizer = self.live_decoder.quantizer
        self.adaptive = adaptive_weights(config.loss, self.live_encoder, self.live_decoder.decoder)
        self.perturbation = None
        if config.perturbation is not None:
            self.perturbation = Perturbation(config.perturbation, self.quantizer, config.run.seed)

    def begin(self, phase: Phase, adversarial_factor: float | None, tau: float | None) -> None:
        """What the micro-batches of a step train with. `adversarial_factor`: on the GAN's weight in the generator's
        loss; None: there is no GAN yet. `tau`: of the NS loss; None: it is not known yet."""
        self.phase, self.generator_trains = phase, phase != "discriminator"
        config = self.config
        self.weights = phase_weights(config.loss, config.nsvq.pull, phase, adversarial_factor, self.quantizer)
        for name, part in self.adaptive.items():
            if name in self.weights:
                self.weights[name] = part.factor * self.weights[name]
        if tau is None:
            self.weights.pop("nonstationary", None)
        self.tau = tau if "nonstationary" in self.weights else None
        if "adversarial" in self.weights:
            self.adversary.begin_step()

    def __call__(self, images: Tensor, positions: Sequence[int]) -> tuple[dict[str, Tensor], Tensor, Quantized]:
        """Of `images` [B, 3, H, W] in [-1, 1], whose samples have these positions in the run: detached terms of the
        losses, "loss" among them, latents, and what became of them."""
        weights = self.weights
        if self.config.model.compile and images.is_cuda:  # eager group norm would bring each layer back
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.phase == "stage1"):
            z = self.encoder(images)
        self.live_decoder.train(self.generator_trains)
        perturb = None
        if self.perturbation is not None and self.generator_trains:
            perturb = self.perturbation.at(positions)
        with torch.set_grad_enabled(self.generator_trains):
            output, quantized = self.decoder(z, self.tau, perturb)
        terms = self.losses(z, output, images, weights) | quantized.losses
        if "adversarial" in weights and self.generator_trains:
            terms["adversarial"] = self.adversary.generator_loss(output, positions)
        for name, part in self.adaptive.items():
            if name in terms:
                part.observe(sum(weights[k] * terms[k] for k in RECONSTRUCTION if k in weights), terms[name])
        if self.generator_trains:
            terms["loss"] = sum(weight * terms[name] for name, weight in weights.items())
            self.accelerator.backward(terms["loss"])
        if "adversarial" in weights:
            loss, found = self.adversary.discriminator_loss(images, output, positions)
            self.accelerator.backward(loss)
            terms |= found
        terms.setdefault("loss", terms.get("discriminator"))  # where it alone trains
        return {name: value.detach() for name, value in (terms | quantized.stats).items()}, z, quantized

    def end(self, stepped: bool) -> None:
        """After the optimizers stepped, or did not."""
        if self.generator_trains:
            self.quantizer.end_step(stepped)
        for part in self.adaptive.values():
            part.end_step(stepped)
        self.adversary.end_step(stepped)
