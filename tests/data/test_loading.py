import os
import signal
import sys
import time
from itertools import islice
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from nsvq.data import loading
from nsvq.data.batches import train_batches
from nsvq.data.config import DataConfig
from nsvq.data.loading import LoadingProcessDied, affordable_workers, batches_of, make_loader, restarting
from nsvq.errors import UserError


class Fatal(Dataset):
    """Numbers; the process that loads one of `fatal` is killed, the first time or always, once the file `after` is
    there."""

    def __init__(self, fatal, marker=None, after=None):
        self.fatal, self.marker, self.after = fatal, marker, after

    def __getitem__(self, i):
        if i in self.fatal and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            time.sleep(0.3)  # so that earlier batches have left the process
            while self.after and not self.after.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.mark.slow
def test_after_the_death_of_a_loading_process_the_sequence_goes_on_without_a_gap(tmp_path, capsys):
    data = Fatal({7}, tmp_path / "died")

    def make(done):
        return batches_of(make_loader(data, 2, batch_sampler=[[i, i + 1] for i in range(2 * done, 20, 2)]))

    assert torch.cat(list(restarting(make))).tolist() == list(range(20))
    assert "a loading process was killed" in capsys.readouterr().err


def test_a_death_is_not_raised_in_the_middle_of_a_training_step(tmp_path):
    data = Fatal({3}, after=tmp_path / "taken")
    loader = make_loader(data, 1, batch_sampler=[[0], [1], [2], [3]], prefetch_factor=4)
    batches = batches_of(loader)
    next(batches)
    (tmp_path / "taken").touch()
    end = time.monotonic() + 1  # a step of training, in which the process that loads ahead dies
    while time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(LoadingProcessDied, match=r"take fewer --run\.workers"):
        list(batches)


class Hung(Dataset):
    def __getitem__(self, i):
        time.sleep(60 if i == 2 else 0)
        return i


def test_a_batch_that_never_comes_ends_the_run_and_is_named(monkeypatch):
    monkeypatch.setattr(loading, "_PATIENCE", 1)
    with pytest.raises(UserError, match="batch 3 did not come within 1 seconds"):
        list(batches_of(make_loader(Hung(), 1, batch_sampler=[[0], [1], [2], [3]])))


def test_no_more_processes_are_started_than_shared_memory_has_room_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "_SHARED", tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    batch = 32 * 3 * 128 * 128 * 4
    assert affordable_workers(2, batch) == 2
    assert affordable_workers(8, batch) == 3
    assert affordable_workers(8, 100 * batch) == 0
    assert "has room for the batches of 3 loading processes, not 8" in capsys.readouterr().err
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    before = psutil.Process().children()
    next(batches := train_batches(DataConfig(source="synthetic", image_size=512), batch_size=2, seed=0, workers=2))
    assert set(psutil.Process().children()) <= set(before)
    batches.close()


def test_ranks_of_a_machine_divide_its_shared_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "_SHARED", tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=96 * 2**20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert affordable_workers(4, 2**20) == 4
    assert affordable_workers(16, 2**20) == 8  # 3 batches of each process, in a quarter of the room
    assert "the batches of 8 loading processes of each of 4 ranks, not 16" in capsys.readouterr().err


def test_processes_that_die_again_and_again_end_the_run(monkeypatch):
    def make(done):
        raise LoadingProcessDied("gone")
        yield

    with pytest.raises(LoadingProcessDied):
        list(restarting(make))


def test_loading_goes_on_when_every_process_of_the_job_gets_a_signal():
    config = DataConfig(source="synthetic", image_size=16)
    expected = [batch["index"] for batch in islice(train_batches(config, batch_size=4, seed=0), 30)]
    batches = train_batches(config, batch_size=4, seed=0, workers=2)
    found = [next(batches)["index"]]
    children = [process.pid for process in psutil.Process().children()]
    sender = f"import os, signal; [os.kill(p, s) for p in {children} for s in (signal.SIGTERM, signal.SIGINT)]"
    assert len(children) >= 2
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", sender])
    found += [batch["index"] for batch in islice(batches, 29)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize(
    ("error", "workers", "raised"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), 1, LoadingProcessDied),
        (EOFError(), 1, LoadingProcessDied),
        (RuntimeError("Pin memory thread exited unexpectedly"), 1, LoadingProcessDied),
        (ConnectionResetError(104, "Connection reset by peer"), 0, ConnectionResetError),  # of the data
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0."), 1, ConnectionError),
    ],
)
def test_a_process_that_dies_while_it_hands_a_batch_over_is_one_that_died(error, workers, raised):
    class Loader:
        num_workers = workers

        def __iter__(self):
            yield 1
            raise error

    with pytest.raises(raised) as caught:
        list(batches_of(Loader()))
    assert type(caught.value) is raised
