"""VQGAN's adaptive weight of the generator's GAN loss (arXiv 2012.09841, eq. 7)."""

import torch
from torch import Tensor, nn

from nsvq.tokenizer.quantizers import ranks

_DELTA = 1e-6


class AdaptiveWeight:
    """`factor`: |gradient of the reconstruction loss| / (|gradient of the GAN loss| + 1e-6), at most `cap`, both at the
    decoder's last `layer`.

    The gradients are means over all micro-batches and ranks. Those of a step are known only at its end, so they make
    the factor of the next one: it is the same however a batch is cut, and no pass waits for it. It starts at 0."""

    name = "adaptive_weight"  # in a checkpoint

    def __init__(self, cap: float, layer: nn.Parameter):
        self.cap, self.layer = cap, layer
        self.factor = layer.new_zeros(())
        self._gradients: list[Tensor] = []  # of each micro-batch of a step

    def observe(self, reconstruction: Tensor, adversarial: Tensor) -> None:
        """The losses of a micro-batch, before their backward pass; both graphs are kept."""
        terms = (reconstruction, adversarial)
        self._gradients.append(torch.stack([torch.autograd.grad(t, self.layer, retain_graph=True)[0] for t in terms]))

    def end_step(self, stepped: bool) -> None:
        """A collective call where the step had a GAN."""
        gradients, self._gradients = self._gradients, []
        if stepped and gradients:
            mean = ranks.mean(torch.stack(gradients).mean(0))
            reconstruction, adversarial = mean.flatten(1).norm(dim=1)
            self.factor = (reconstruction / (adversarial + _DELTA)).clamp(max=self.cap)

    def state_dict(self) -> dict:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict) -> None:
        self.factor = state["factor"].to(self.factor)
