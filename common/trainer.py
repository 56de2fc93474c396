"""What a trainer brings to the training loop (training.py), and what it finds there."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nsvq.common.guard import Guard
from nsvq.common.metrics import Means
from nsvq.common.optimized import Optimized
from nsvq.common.run import Run, micro_batch_size


class Trainer:
    """Base of the trainers. A subclass's constructor calls this one first, builds its networks, and ends with
    `register`; `stateful` then holds what a checkpoint keeps besides weights and optimizers."""

    config: Any  # a schema with `out` and a section `run`
    total_steps: int
    shown: tuple[str, ...] = ()  # metrics beside the progress bar
    flops_of: str = "step"  # what a step computes; where it changes, its FLOPs are counted anew

    def __init__(self, config: Any, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        torch.backends.cudnn.benchmark = True  # the batches of a run have one size
        self.micro_batch = micro_batch_size(config.run, accelerator)
        self.accumulation = config.run.batch_size // (accelerator.num_processes * self.micro_batch)
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.loading = {"batch_size": self.micro_batch, "workers": config.run.workers, **ranks}
        self.guard, self.means = Guard(accelerator), Means(accelerator)
        self.inputs: dict[str, str] = {}  # see `Run`
        self.ema: EMAModel | None = None  # after `start`
        self.stateful: dict[str, Any] = {"guard": self.guard, "means": self.means}

    def register(
        self, name: str, modules: dict[str, nn.Module], optimized: dict[str, Optimized], averaged: list, ema: dict
    ) -> None:
        """`modules` as accelerate prepared them; `optimized`, whose first part's gradient norm has no name; of the
        parameters in `averaged`, `EMAModel(**ema)` keeps an average. Takes up the folder; raises what `Run` does."""
        self.modules, self.optimized, self.averaged, self.ema_options = modules, optimized, averaged, ema
        optimizers = {key: part.optimizer for key, part in optimized.items()}
        self.run = Run(self.accelerator, self.config, self.config.out, name, modules, optimizers, self.inputs)

    @property
    def compiled(self) -> bool:
        """Whether torch compiled any part of what trains."""
        parts = [part for module in self.modules.values() for part in module.modules()]
        return any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in parts)

    # What a trainer defines: the first two at least

    def batches(self, start: int) -> Iterator[dict]:
        """This rank's micro-batches without end, from global sample `start` on."""
        raise NotImplementedError

    def step(self, batch: dict) -> dict[str, Tensor | tuple[Tensor, Tensor | int]]:
        """Forward and backward of one micro-batch. Returns detached scalars, "loss" among them: means over the
        micro-batch, or (sum, count)."""
        raise NotImplementedError

    def start(self) -> None:
        """Before the first step of a run that does not resume."""

    def resume(self) -> None:
        """After the state of a checkpoint has come back."""

    def begin_step(self) -> None:
        """Before the micro-batches of a step."""

    def rate_factor(self) -> float:
        """The factor on all learning rates in this step."""
        return 1.0

    def told(self) -> Tensor | None:
        """A scalar of this step that `end_step` finds as a number in `guard.told`, its mean over all ranks."""
        return None

    def end_step(self, stepped: bool) -> None:
        """After the optimizers stepped, or did not because something was not finite."""

    def measure(self, due: bool, last: bool) -> dict[str, Any]:
        """What goes into the line of metrics after this step, equal on all ranks or the main process's. `due`: the
        interval's line is written in any case."""
        return {}

    def watch(self, values: dict[str, Any]) -> None:
        """Look at a line that was written."""

    def draw(self) -> None:
        """A picture, on the main process, with averaged weights."""

    def keep(self) -> None:
        """Results that are kept on the way, where one is due."""

    def export(self) -> None:
        """The result, after the last step."""

    @contextlib.contextmanager
    def heaviest(self) -> Iterator[None]:
        """Inside, `step` takes as much memory as it ever does, and waits for no other rank. What it changes beside
        gradients, buffers and random states comes back at the end, also after an error."""
        yield

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """With the averages in the networks, which get their own weights back at the end. A collective call."""
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        try:
            yield
        finally:
            self.ema.restore(self.averaged)

    def tries_micro_batches(self) -> bool:
        """Whether "auto" tries what fits. With FSDP ranks wait for each other in the middle of a step, so that one that
        ran out of memory would stop the others for good."""
        return self.device.type == "cuda" and not self.accelerator.is_fsdp2
