"""The end of an optimizer step: is it finite, and is the run to stop? All ranks get the same answers.

A step costs one all-reduce of four numbers and one look at the device, which is the only one of a step: the GPU works
on while the host prepares what comes next."""

import signal
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Guard:
    """Counts steps that were skipped because a loss or a gradient norm was not finite on some rank: `skipped` in all,
    `in_a_row` without a good one since. `stop`: the signal, come on any rank, that ends the run after this step."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.skipped = self.in_a_row = 0
        self.stop: signal.Signals | None = None
        self.told = 0.0
        self._received = dict.fromkeys(_SIGNALS, False)

    def until(self, done: Callable[[], bool]) -> Iterator[None]:
        """Goes round until `done()`. In it SIGTERM and SIGINT do no more than set `stop` in the next `step`."""

        def note(number: int, _: object) -> None:
            self._received[signal.Signals(number)] = True

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            while not done():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for number in _SIGNALS:
            if self._received[number] and self.stop is None:  # it came after the last step
                signal.raise_signal(number)

    def interrupted(self) -> bool:
        """Whether a signal has come to this rank: what is long and can be left out should be. Other ranks may know of
        it later; `interrupted_anywhere` tells all of them."""
        return any(self._received.values())

    def interrupted_anywhere(self) -> bool:
        """The same on all ranks; a collective call."""
        received = torch.tensor(float(self.interrupted()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(received, "sum").item())

    def step(self, optimizers: Iterable, values: Iterable[Tensor], told: Tensor | None = None) -> bool:
        """Step the `optimizers`, prepared by accelerate and with unscaled gradients, where all scalars in `values` are
        finite on all ranks, and say whether it was done; else leave them and count. Clears the gradients. `told`: a
        scalar whose mean over all ranks the host is to know; it comes with the same look, and is in `self.told`."""
        finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
        bad = (~finite).float()
        # Fills, where copies would have the host wait for the GPU.
        received = [bad.new_full((), self._received[s]) for s in _SIGNALS]
        told = bad if told is None else told.detach().float()
        bad, told, *stops = self.accelerator.reduce(torch.stack([bad, told, *received]), "sum").tolist()
        self.told = told / self.accelerator.num_processes
        self.stop = next((s for s, count in zip(_SIGNALS, stops, strict=True) if count), None)
        for optimizer in optimizers:
            if not bad:
                optimizer.optimizer.step()  # accelerate's own step would look for infinities again
            optimizer.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # in float16, infinities are how the scale is found
        self.skipped += bool(bad)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return not bad

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
