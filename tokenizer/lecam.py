"""LeCAM regularisation of a discriminator (arXiv 2104.03310, eq. 3-5, with the hinge of its code)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsvq.tokenizer import ranks

DECAY = 0.999


class LeCam:
    """Holds back logits of real images that rise above the moving average of fake ones' and the other way round, each
    patch's by itself, as IBQ, Open-MAGVIT2 and XQ-GAN do: VQGAN+ takes the mean of a batch, which depends on its cut.

    The averages start at 0, and move at the end of a step, by means over all micro-batches and ranks."""

    def __init__(self, device: torch.device):
        self.averages = torch.zeros(2, device=device)  # of real, of fake
        self._means: list[Tensor] = []  # the same of each micro-batch of a step

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """mean relu(real - average fake)^2 + mean relu(average real - fake)^2, of logits [B, ...]."""
        self._means.append(torch.stack([real.mean(), fake.mean()]).detach())
        of_real, of_fake = self.averages
        return F.relu(real - of_fake).square().mean() + F.relu(of_real - fake).square().mean()

    def end_step(self, stepped: bool) -> None:
        """A collective call where the step had a GAN."""
        means, self._means = self._means, []
        if stepped and means:
            self.averages = self.averages.lerp(ranks.mean(torch.stack(means).mean(0)), 1 - DECAY)

    def state_dict(self) -> dict:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        self.averages = state["averages"].to(self.averages)
