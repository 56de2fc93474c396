import os
import signal
import sys
import time
from itertools import islice

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from nsvq.data.batches import train_batches
from nsvq.data.config import DataConfig
from nsvq.data.loading import LoadingProcessDied, batches_of, make_loader, restarting


class Fatal(Dataset):
    """Numbers; the process that loads one of `fatal` is killed, the first time or always."""

    def __init__(self, fatal, marker=None):
        self.fatal, self.marker = fatal, marker

    def __getitem__(self, i):
        if i in self.fatal and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            time.sleep(0.3)  # so that earlier batches have left the process
            os.kill(os.getpid(), signal.SIGKILL)
        return i


@pytest.mark.slow
def test_after_the_death_of_a_loading_process_the_sequence_goes_on_without_a_gap(tmp_path, capsys):
    data = Fatal({7}, tmp_path / "died")

    def make(done):
        return batches_of(make_loader(data, 2, batch_sampler=[[i, i + 1] for i in range(2 * done, 20, 2)]))

    assert torch.cat(list(restarting(make))).tolist() == list(range(20))
    assert "a loading process was killed" in capsys.readouterr().err


def test_a_death_is_not_raised_in_the_middle_of_a_training_step():
    loader = make_loader(Fatal({3}), 1, batch_sampler=[[0], [1], [2], [3]], prefetch_factor=4)
    batches = batches_of(loader)
    next(batches)
    end = time.monotonic() + 1  # a step of training, in which the process that loads ahead dies
    while time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(LoadingProcessDied, match=r"take fewer --run\.workers"):
        list(batches)


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
