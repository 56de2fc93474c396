"""Batches from torch's loader.

What this adds: a loading process that is killed is replaced instead of ending the run, signals of a scheduler are left
to the training process, and an error is one line instead of a traceback.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nsvq.data.tables import note
from nsvq.errors import UserError

_RESTARTS = 3  # in a row, without a batch in between
_PATIENCE = 900  # seconds for a batch, until loading counts as hung
_HUNG = "loading hangs"
_SHARED = Path("/dev/shm")  # through which loading processes hand over their batches
_AHEAD = 3  # batches of a process on their way: two in its queue, one in the making


class LoadingProcessDied(UserError):
    """One of the loading processes is gone, most often because the system ran short of memory."""


def affordable_workers(workers: int, batch_bytes: int) -> int:
    """As many of `workers` as this rank's share of shared memory has room for: 64 MiB, as in a container by default,
    hold few batches, and a process that finds no room is killed, or waits for good."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, as torchrun and accelerate launch say it
    free = shutil.disk_usage(_SHARED).free / ranks if _SHARED.is_dir() else None
    if free is None or workers * _AHEAD * batch_bytes <= free:
        return workers
    fit = int(free // (_AHEAD * batch_bytes))
    rest = f"{fit} are started; docker run --shm-size 8g makes room"
    each = "" if ranks == 1 else f" of each of {ranks} ranks"
    note(f"{_SHARED} has room for the batches of {fit} loading processes{each}, not {workers}: {rest}")
    return fit


def make_loader(dataset: Dataset, workers: int, batch_bytes: int = 0, **how: Any) -> DataLoader:
    """torch's loader, with pinned memory where there is a GPU. Of `workers` as many as shared memory has room for,
    where a batch has tensors of `batch_bytes`."""
    # A generator of its own, so that making a loader leaves the random state of training as it is.
    generator = torch.Generator().manual_seed(0)
    how |= {"pin_memory": torch.cuda.is_available(), "generator": generator, "worker_init_fn": _leave_signals}
    return DataLoader(dataset, num_workers=affordable_workers(workers, batch_bytes), **how)


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises `LoadingProcessDied`, within seconds, where a loading process dies; `UserError`
    with the text of a batch {"failure": text}, and where a batch does not come within 15 minutes."""
    batches, done = iter(loader), 0
    _lose_patience(batches)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch raises where the main process happens to be when a loading process dies, be it in the middle of an
        # optimizer's step. Without that, `next` finds out.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for batch in batches:
            if isinstance(batch, dict) and (failure := batch.pop("failure", None)) is not None:
                raise UserError(failure)
            yield batch
            done += 1
    except RuntimeError as error:
        if str(error) == _HUNG:
            why = "a disk or a network hangs, or /dev/shm is full; --run.workers 0 does without loading processes"
            raise UserError(f"batch {done + 1} did not come within {_PATIENCE} seconds: {why}") from None
        if not any(of in str(error) for of in ("DataLoader worker", "Pin memory thread")):  # which fails with a worker
            raise
        raise _died(error) from None
    except (ConnectionError, EOFError) as error:  # it was killed while its batch was handed over
        if not loader.num_workers or "in DataLoader worker process" in str(error):  # an error of the data
            raise
        raise _died(error) from None


def _died(error: Exception) -> LoadingProcessDied:
    why = f"a loading process was killed ({(str(error) or type(error).__name__).splitlines()[0]})"
    return LoadingProcessDied(f"{why}; if the machine is short of memory, take fewer --run.workers")


def _lose_patience(batches: Any) -> None:
    """Raise from `next` where a batch does not come. The loader's own `timeout` would look for dead processes no sooner
    than that."""
    look = getattr(batches, "_try_get_data", None)  # what `next` asks again and again, of processes alone
    waited = 0.0

    def look_again(*timeout: float) -> tuple[bool, Any]:
        nonlocal waited
        begin = time.monotonic()
        found = look(*timeout)
        waited = 0.0 if found[0] else waited + time.monotonic() - begin
        if waited > _PATIENCE:
            raise RuntimeError(_HUNG)
        return found

    if look is not None:
        batches._try_get_data = look_again


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
