"""Batches from torch's loader.

What this adds: a loading process that is killed is replaced instead of ending the run, signals of a scheduler are left
to the training process, and an error is one line instead of a traceback.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nsvq.errors import UserError

_RESTARTS = 3  # in a row, without a batch in between


class LoadingProcessDied(UserError):
    """One of the loading processes is gone, most often because the system ran short of memory."""


def make_loader(dataset: Dataset, workers: int, **how: Any) -> DataLoader:
    """torch's loader, with pinned memory where there is a GPU."""
    # A generator of its own, so that making a loader leaves the random state of training as it is.
    generator = torch.Generator().manual_seed(0)
    how |= {"pin_memory": torch.cuda.is_available(), "generator": generator, "worker_init_fn": _leave_signals}
    return DataLoader(dataset, num_workers=workers, **how)


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises `LoadingProcessDied`, within seconds, where a loading process dies; `UserError`
    with the text of a batch {"failure": text}."""
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch raises where the main process happens to be when a loading process dies, be it in the middle of an
        # optimizer's step. Without that, `next` finds out.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for batch in batches:
            if isinstance(batch, dict) and (failure := batch.pop("failure", None)) is not None:
                raise UserError(failure)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        why = f"a loading process was killed ({str(error).splitlines()[0]})"
        raise LoadingProcessDied(f"{why}; if the machine is short of memory, take fewer --run.workers") from None


def restarting(make: Callable[[int], Iterable]) -> Generator[Any, None, None]:
    """The batches of make(0); after the death of a loading process those of make(batches so far)."""
    done = deaths = 0
    while True:
        try:
            for batch in make(done):
                yield batch
                done, deaths = done + 1, 0
            return
        except LoadingProcessDied as error:
            deaths += 1
            if deaths > _RESTARTS:
                raise
            print(f"warning: {error}. New ones go on at the same sample", file=sys.stderr, flush=True)


def _leave_signals(_: int) -> None:
    """Schedulers signal every process of a job; the main one needs these for the rest of its step, and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
