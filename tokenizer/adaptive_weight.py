"""A weight that follows the gradients: VQGAN's of the generator's GAN loss (arXiv 2012.09841, eq. 7), and VA-VAE's of
its alignment (arXiv 2501.01423, eq. 7)."""

import torch
from torch import Tensor, nn

from nsvq.tokenizer import ranks


class AdaptiveWeight:
    """`factor`: |gradient of the reconstruction loss| / (|gradient of the weighed term| + delta), at most `cap`, both
    at `layer`, the last of the network that they train.

    The gradients are means over all micro-batches and ranks. Those of a step are known only at its end, so they make
    the factor of the next one: it is the same however a batch is cut, and no pass waits for it. It starts at 0."""

    def __init__(self, layer: nn.Parameter, cap: float, delta: float = 1e-6):
        self.layer, self.cap, self.delta = layer, cap, delta
        self.factor = layer.new_zeros(())
        self._gradients: list[Tensor] = []  # of each micro-batch of a step

    def observe(self, reconstruction: Tensor, term: Tensor) -> None:
        """The losses of a micro-batch, before their backward pass; both graphs are kept."""
        terms = (reconstruction, term)
        self._gradients.append(torch.stack([torch.autograd.grad(t, self.layer, retain_graph=True)[0] for t in terms]))

    def end_step(self, stepped: bool) -> None:
        """A collective call where the step had the term."""
        gradients, self._gradients = self._gradients, []
        if stepped and gradients:
            mean = ranks.mean(torch.stack(gradients).mean(0))
            reconstruction, term = mean.flatten(1).norm(dim=1)
            self.factor = (reconstruction / (term + self.delta)).clamp(max=self.cap)

    def state_dict(self) -> dict:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict) -> None:
        self.factor = state["factor"].to(self.factor)
