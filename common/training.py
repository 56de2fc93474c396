"""The training loop: the clock, the order of events, and the state that resumes.

What trains is a `Trainer` (trainer.py), which brings networks and says what a micro-batch does. The order of a step:

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

from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from nsvq.common import micro_batches
from nsvq.common.fsdp import split_like
from nsvq.common.metrics import show
from nsvq.common.run import progress_bar
from nsvq.common.trainer import Trainer
from nsvq.errors import UserError


def train(trainer: Trainer) -> None:
    """What is left of a run, and its export. The same command goes on from the newest checkpoint. Raises `UserError`
    where the GPU's memory is too small for a step."""
    with contextlib.closing(trainer.run):
        _train(trainer)


def _train(trainer: Trainer) -> None:
    run, accelerator = trainer.run, trainer.accelerator
    if trainer.config.run.accumulation == "auto" and trainer.tries_micro_batches():
        _cut_batches(trainer)
    accelerator.gradient_accumulation_steps = trainer.accumulation
    _load_or_start(trainer)
    batches = iter(trainer.batches(run.samples_seen))
    bar = progress_bar(accelerator, trainer.total_steps, run.step)
    for _ in trainer.guard.until(lambda: run.step == trainer.total_steps):
        try:
            _optimizer_step(trainer, batches)
        except RuntimeError as error:
            if not micro_batches.out_of_memory(error):
                raise
            share, said = trainer.micro_batch * trainer.accumulation, str(error).splitlines()[0]
            raise UserError(f"{micro_batches.advice(share, trainer.accumulation)} ({said})") from None
        bar.update()
        _after_step(trainer, bar, last=run.step == trainer.total_steps)
    bar.close()
    trainer.export()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _cut_batches(trainer: Trainer) -> None:
    """Into the fewest micro-batches that fit into the GPU's memory."""
    batch = None

    def fits(number: int) -> bool:
        nonlocal batch
        batch = batch or next(iter(trainer.batches(0)))
        part = {name: values[: trainer.micro_batch // number] for name, values in batch.items()}
        parameters = [p for each in trainer.optimized.values() for p in each.parameters]
        modules = list(trainer.modules.values())
        return micro_batches.fits(lambda: _try(trainer, part, min(number, 2)), modules, parameters, trainer.device)

    trainer.accumulation = micro_batches.fewest(trainer.micro_batch, fits, trainer.accelerator, trainer.run.out)
    trainer.micro_batch //= trainer.accumulation
    trainer.loading["batch_size"] = trainer.micro_batch


def _try(trainer: Trainer, batch: dict, times: int) -> None:
    """Forward and backward, without a word to other ranks; the second time beside the first one's gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer.heaviest())
        for module in trainer.modules.values():
            stack.enter_context(trainer.accelerator.no_sync(module))
        for _ in range(times):
            trainer.run.seed_micro_batch(0, trainer.micro_batch)
            trainer.step(batch)


def _load_or_start(trainer: Trainer) -> None:
    state = trainer.run.load()
    if state is None:
        trainer.start()
    ema = EMAModel(trainer.averaged, **trainer.ema_options)  # after `start`, which may write parameters
    trainer.ema = trainer.stateful["ema"] = ema
    if state is not None:
        state["ema"] = {name: state["ema"][name] for name in ("optimization_step", "shadow_params")}  # not its decay
        for name, part in trainer.stateful.items():
            if name in state:  # `resume_from` may bring a loss that the other run had not
                part.load_state_dict(state[name])
        averages = zip(ema.shadow_params, trainer.averaged, strict=True)
        ema.shadow_params = [split_like(average, parameter) for average, parameter in averages]
    ema.to(trainer.device)
    if state is not None:
        trainer.resume()


def _optimizer_step(trainer: Trainer, batches: Iterator[dict]) -> None:
    run, settings = trainer.run, trainer.config.run
    trainer.begin_step()
    for part in trainer.optimized.values():
        part.scale_rates(trainer.rate_factor())
    seen, results, nothing = [], [], contextlib.nullcontext()
    for number in range(trainer.accumulation):
        seen.append(batch := next(batches))
        run.seed_micro_batch(number, trainer.micro_batch)
        # Counting runs compiled networks as they are, which takes more memory than the run has planned for.
        counting = nothing if trainer.compiled else run.counting_flops(trainer.flops_of, trainer.micro_batch)
        with trainer.accelerator.accumulate(*trainer.modules.values()), counting:
            terms = trainer.step(batch)
        size = trainer.micro_batch
        results.append({k: term if isinstance(term, tuple) else (size * term, size) for k, term in terms.items()})
    trainer.accelerator.unscale_gradients()
    training = {name: part for name, part in trainer.optimized.items() if part.trains}
    norms = {name: part.clip_gradients() for name, part in training.items()}
    losses = [terms["loss"][0] for terms in results]
    optimizers = [part.optimizer for part in training.values()]
    stepped = trainer.guard.step(optimizers, [*losses, *norms.values()], trainer.told())
    trainer.end_step(stepped)
    if stepped:
        trainer.ema.step(trainer.averaged)
        _add_means(trainer, norms, results)
    run.step += 1
    run.samples_seen += settings.batch_size
    if trainer.guard.in_a_row >= settings.skip_limit:
        run.give_up(_states(trainer), seen, trainer.guard.in_a_row)


def _add_means(trainer: Trainer, norms: dict[str, Tensor], results: list[dict]) -> None:
    share, first = trainer.micro_batch * len(results), next(iter(trainer.optimized))
    for name, norm in norms.items():
        trainer.means.add("grad_norm" if name == first else f"{name}_grad_norm", share * norm, share)
    for terms in results:
        for name, (total, count) in terms.items():
            trainer.means.add(name, total, count)


def _after_step(trainer: Trainer, bar: tqdm, last: bool) -> None:
    run, settings, guard = trainer.run, trainer.config.run, trainer.guard
    due = run.step % settings.log_every == 0 or last
    values = trainer.means.take() | {"skipped_steps": guard.skipped} if due else {}
    if values := values | trainer.measure(due, last):
        values = run.log(values)
        show(bar, values, trainer.shown)
        trainer.watch(values)
    if run.step % settings.sample_every == 0 or last:
        with trainer.averaged_weights():
            if trainer.accelerator.is_main_process and not guard.interrupted():
                trainer.draw()
    trainer.keep()
    if run.checkpoint_due() or last or guard.stop:
        run.save(_states(trainer))
    if guard.stop:
        run.stop(guard.stop)


def _states(trainer: Trainer) -> dict:
    return {name: part.state_dict() for name, part in trainer.stateful.items()}
