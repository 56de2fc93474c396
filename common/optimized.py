"""What one optimizer trains."""

import math
from dataclasses import dataclass

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from nsvq.common.fsdp import full


@dataclass
class Optimized:
    """`parameters` that `optimizer` trains, as accelerate prepared it; `clip` is the largest norm of their gradient.
    In a step that they do not take part in, `trains` is false."""

    optimizer: AcceleratedOptimizer
    parameters: list[nn.Parameter]
    clip: float = math.inf
    trains: bool = True

    def __post_init__(self) -> None:
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Every group's learning rate becomes `factor` times the one that the optimizer was made with."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def clip_gradients(self) -> Tensor:
        """Their norm before; a collective call where FSDP2 splits them."""
        return full(clip_grad_norm_(self.parameters, self.clip))
