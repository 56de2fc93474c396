"""How many images did not decode, and when that is too many."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from nsvq.errors import UserError


class BadImages:
    """Counts images that did not decode, and ends the run when their share passes `limit`.

    `update` each batch on its own rank; the rest on all ranks alike (it reduces or gathers)."""

    def __init__(self, limit: float, accelerator: Accelerator | None = None, minimum: int = 100):
        self.limit, self.accelerator, self.minimum = limit, accelerator, minimum
        self.seen = 0  # on this rank, bad ones included
        self.bad: list[str] = []  # on this rank
        self._before = (0, 0)  # bad and seen on all ranks, before a restart; kept by the first rank
        self._told = 0  # of self.bad

    def update(self, batch: dict) -> None:
        """Count a batch of `train_batches` or `eval_batches`."""
        self.seen += len(batch["label"]) + len(batch["bad"])
        self.bad += batch["bad"]

    def check(self, final: bool = False) -> int:
        """Bad images so far on all ranks. Raises `UserError` on every rank where their share of all images passes the
        limit; looks at no fewer than `minimum` images unless `final`."""
        bad, seen = self._counts()
        if bad > self.limit * seen and (final or seen >= self.minimum):
            some = ", ".join(dict.fromkeys(self.bad[:100])) or "on other ranks"
            some = some if len(some) < 400 else some[:400] + " ..."
            what = f"{bad} of {seen} images do not decode ({some}), more than data.max_bad_fraction = {self.limit}"
            raise UserError(f"{what}; repair or remove them, or raise the limit")
        return bad

    def news(self) -> list[str]:
        """Those that `news` has not told yet, on all ranks."""
        fresh, self._told = list(dict.fromkeys(self.bad[self._told :])), len(self.bad)
        return gather_object(fresh) if self.accelerator is not None else fresh

    def _counts(self) -> tuple[int, int]:
        counts = torch.tensor([self._before[0] + len(self.bad), self._before[1] + self.seen])
        if self.accelerator is not None:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), "sum")
        return tuple(counts.tolist())

    def state_dict(self) -> dict:
        """Counts over all ranks, and what `news` is still to tell."""
        untold = self.bad[self._told :]
        return {"counts": self._counts(), "untold": gather_object(untold) if self.accelerator is not None else untold}

    def load_state_dict(self, state: dict) -> None:
        """The first rank takes up the counts, so that the total is right."""
        self.seen, self.bad, self._told, self._before = 0, [], 0, (0, 0)
        if self.accelerator is None or self.accelerator.is_main_process:
            bad, seen = state["counts"]
            self.bad = list(state["untold"])
            self._before = (bad - len(self.bad), seen)
