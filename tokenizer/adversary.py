"""The GAN of stage one: a discriminator, what it sees of images, and the losses of both sides."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nsvq.common.fsdp import unwrapped
from nsvq.tokenizer.dino_discriminator import DinoHeads
from nsvq.tokenizer.lecam import LeCam
from nsvq.tokenizer.losses import discriminator_hinge, generator_adversarial


class Adversary:
    """`features` and `network` are `make_discriminator`'s, `network` as accelerate prepared it. Images are
    [B, 3, H, W], `positions` those of their samples. Each loss is a mean over images."""

    def __init__(self, features: nn.Module, network: nn.Module, lecam_weight: float, accelerator: Accelerator):
        self.features, self.network, self.live_network = features, network, unwrapped(network)
        self.accelerator, self.lecam_weight = accelerator, lecam_weight
        self.lecam = LeCam(accelerator.device) if lecam_weight else None

    def begin_step(self) -> None:
        if isinstance(self.live_network, DinoHeads):
            self.live_network.begin_step()

    def generator_loss(self, output: Tensor, positions: Sequence[int]) -> Tensor:
        """Its gradient goes to `output` alone."""
        self.live_network.requires_grad_(False)
        with self.accelerator.autocast():
            logits = self.live_network(self.features(output, positions))
        self.live_network.requires_grad_(True)
        return generator_adversarial(logits.float())

    def discriminator_loss(
        self, images: Tensor, output: Tensor, positions: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What trains `network`, and what a line of metrics tells of it. No gradient goes to `output`."""
        with self.accelerator.autocast():
            logits = self.network(self.features(torch.cat([images, output.detach()]), positions))
        real, fake = logits.float().chunk(2)
        loss = discriminator_hinge(real, fake)
        terms = {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
        if self.lecam:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.lecam_weight * terms["lecam"]
        return loss, terms

    def end_step(self, stepped: bool) -> None:
        """A collective call with LeCAM, where the step had a GAN."""
        if self.lecam:
            self.lecam.end_step(stepped)
