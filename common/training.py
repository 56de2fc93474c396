"""The training loop of every trainer: the clock, the order of events, and the state that resumes.

A trainer is a subclass of `Trainer` that brings networks and says what a micro-batch does. The order of a step:

    `begin_step`, learning rates
    `step` for each micro-batch: forward and backward
    gradients unscaled and clipped; the optimizers step where all is finite on all ranks, else the step is skipped
    `end_step`, the averaged weights, means; the clock moves
    `measure`, and one line of metrics where there is something to tell
    `draw`, `keep`, a checkpoint, and the end of the run where a signal asked for it

After the last step comes `export`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from nsvq.common import micro_batches
from nsvq.common.fsdp import split_like
from nsvq.common.guard import Guard
from nsvq.common.metrics import Means, show
from nsvq.common.optimized import Optimized
from nsvq.common.run import Run, micro_batch_size, progress_bar
from nsvq.errors import UserError


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
        self.modules, self.optimized, self.averaged, self._ema_options = modules, optimized, averaged, ema
        optimizers = {key: part.optimizer for key, part in optimized.items()}
        self.run = Run(self.accelerator, self.config, self.config.out, name, modules, optimizers, self.inputs)

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

    # The loop

    def train(self) -> None:
        """What is left of the run, and its export. The same command goes on from the newest checkpoint. Raises
        `UserError` where the GPU's memory is too small."""
        try:
            self._train()
        except torch.OutOfMemoryError:
            raise UserError(micro_batches.advice(self.micro_batch * self.accumulation, self.accumulation)) from None

    def _train(self) -> None:
        with contextlib.closing(self.run) as run:
            self._cut_batches()
            self._load_or_start()
            batches = iter(self.batches(run.samples_seen))
            bar = progress_bar(self.accelerator, self.total_steps, run.step)
            for _ in self.guard.until(lambda: run.step == self.total_steps):
                self._optimizer_step(batches)
                bar.update()
                self._after_step(bar, last=run.step == self.total_steps)
            bar.close()
            self.export()
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def tries_micro_batches(self) -> bool:
        """Whether "auto" tries what fits. With FSDP ranks wait for each other in the middle of a step, so that one that
        ran out of memory would stop the others for good."""
        return self.device.type == "cuda" and not self.accelerator.is_fsdp2

    def _cut_batches(self) -> None:
        if self.config.run.accumulation == "auto" and self.tries_micro_batches():
            batch = None

            def fits(number: int) -> bool:
                nonlocal batch
                batch = batch or next(iter(self.batches(0)))
                size = self.micro_batch // number
                part = {name: values[:size] for name, values in batch.items()}
                parameters = [p for each in self.optimized.values() for p in each.parameters]
                modules = list(self.modules.values())
                return micro_batches.fits(lambda: self._try(part, min(number, 2)), modules, parameters, self.device)

            self.accumulation = micro_batches.fewest(self.micro_batch, fits, self.accelerator, self.run.out)
            self.micro_batch //= self.accumulation
            self.loading["batch_size"] = self.micro_batch
        self.accelerator.gradient_accumulation_steps = self.accumulation

    def _try(self, batch: dict, times: int) -> None:
        """Forward and backward, without a word to other ranks; the second time beside the first one's gradients."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.heaviest())
            for module in self.modules.values():
                stack.enter_context(self.accelerator.no_sync(module))
            for _ in range(times):
                self.run.seed_micro_batch(0, self.micro_batch)
                self.step(batch)

    def _load_or_start(self) -> None:
        state = self.run.load()
        if state is None:
            self.start()
        self.ema = EMAModel(self.averaged, **self._ema_options)  # after `start`, which may write parameters
        self.stateful["ema"] = self.ema
        if state is not None:
            for name, part in self.stateful.items():
                part.load_state_dict(state[name])
            averages = zip(self.ema.shadow_params, self.averaged, strict=True)
            self.ema.shadow_params = [split_like(average, parameter) for average, parameter in averages]
        self.ema.to(self.device)
        if state is not None:
            self.resume()

    def _optimizer_step(self, batches: Iterator[dict]) -> None:
        run, settings = self.run, self.config.run
        self.begin_step()
        for part in self.optimized.values():
            part.scale_rates(self.rate_factor())
        micro_batches, results = [], []
        for number in range(self.accumulation):
            micro_batches.append(batch := next(batches))
            run.seed_micro_batch(number, self.micro_batch)
            counting = run.counting_flops(self.flops_of, self.micro_batch)
            with self.accelerator.accumulate(*self.modules.values()), counting:
                terms = self.step(batch)
            size = self.micro_batch
            results.append({k: term if isinstance(term, tuple) else (size * term, size) for k, term in terms.items()})
        self.accelerator.unscale_gradients()
        training = {name: part for name, part in self.optimized.items() if part.trains}
        norms = {name: part.clip_gradients() for name, part in training.items()}
        losses = [terms["loss"][0] for terms in results]
        optimizers = [part.optimizer for part in training.values()]
        stepped = self.guard.step(optimizers, [*losses, *norms.values()], self.told())
        self.end_step(stepped)
        if stepped:
            self.ema.step(self.averaged)
            self._add_means(norms, results)
        run.step += 1
        run.samples_seen += settings.batch_size
        if self.guard.in_a_row >= settings.skip_limit:
            run.give_up(self._states(), micro_batches, self.guard.in_a_row)

    def _add_means(self, norms: dict[str, Tensor], results: list[dict]) -> None:
        share, first = self.micro_batch * len(results), next(iter(self.optimized))
        for name, norm in norms.items():
            self.means.add("grad_norm" if name == first else f"{name}_grad_norm", share * norm, share)
        for terms in results:
            for name, (total, count) in terms.items():
                self.means.add(name, total, count)

    def _after_step(self, bar: tqdm, last: bool) -> None:
        run, settings = self.run, self.config.run
        due = run.step % settings.log_every == 0 or last
        values = self.means.take() | {"skipped_steps": self.guard.skipped} if due else {}
        if values := values | self.measure(due, last):
            values = run.log(values)
            show(bar, values, self.shown)
            self.watch(values)
        if run.step % settings.sample_every == 0 or last:
            with self.averaged_weights():
                if self.accelerator.is_main_process and not self.guard.interrupted():
                    self.draw()
        self.keep()
        if run.checkpoint_due() or last or self.guard.stop:
            run.save(self._states())
        if self.guard.stop:
            run.stop(self.guard.stop)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """With the averages in the networks, which get their own weights back at the end. A collective call."""
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        try:
            yield
        finally:
            self.ema.restore(self.averaged)

    def _states(self) -> dict:
        return {name: part.state_dict() for name, part in self.stateful.items()}
