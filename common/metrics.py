"""The numbers of a run: means over an interval, metrics.jsonl, trackers, throughput, memory, model-FLOPs utilization.

docs/watching.md says what each of them means."""

import contextlib
import errno
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nsvq.files import atomic_file

# Dense bfloat16 and float16 FLOP/s of a GPU, from NVIDIA's data sheets, by a word of its name.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "A10": 125e12}
PEAK_FLOPS |= {"L40S": 362e12, "L40": 181e12, "L4": 121e12}


class RankSums:
    """Sums by name, `sums`, which each rank adds up for itself; on every rank the same names."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}

    def add_to(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state_dict(self) -> dict[str, Tensor]:
        """The sums over all ranks; a collective call."""
        return {name: self.accelerator.reduce(self.sums[name], "sum").cpu() for name in sorted(self.sums)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The first rank takes up the sums, the others start from nothing, so that the total is right."""
        share = int(self.accelerator.is_main_process)
        self.sums = {name: (share * total).to(self.accelerator.device) for name, total in state.items()}


class Means(RankSums):
    """Means since the last line of metrics, summed on the device."""

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """`total` is a sum over `count` samples of this rank."""
        total = total.detach().float()
        # A fill, where a copy of a number would have the host wait for the GPU.
        count = count.float() if isinstance(count, Tensor) else total.new_full((), count)
        self.add_to(name, torch.stack([total, count]))

    def take(self) -> dict[str, float]:
        """The means over all ranks, without names that counted nothing; starts anew."""
        if not (names := sorted(self.sums)):
            return {}
        pairs = self.accelerator.reduce(torch.stack([self.sums[name] for name in names]), "sum").tolist()
        self.sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count > 0}


class MetricsLog:
    """metrics.jsonl and the trackers. Adds images a second since the last line, peak memory (of the GPU; else of the
    process) and, where it is known, model-FLOPs utilization."""

    def __init__(self, accelerator: Accelerator, path: Path):
        self.accelerator, self.path = accelerator, path
        self._unwritten = ""  # lines that did not get onto the disk
        self._flops: list[tuple[str, float]] = []  # (what was counted, FLOPs an image), the latest last
        self.start(0)

    def start(self, samples_seen: int) -> None:
        """Throughput is measured from here on."""
        self._time, self._samples = time.perf_counter(), samples_seen

    def drop_after(self, step: int) -> None:
        """Delete lines that are later than `step`, and what a kill left of one."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            with atomic_file(self.path) as part:
                part.write_text("".join(kept))

    def write(self, step: int, samples_seen: int, values: dict[str, Any]) -> dict[str, Any]:
        """Append one object, and hand its numbers to the trackers; returns `values` with what was added. What cannot be
        written goes with the next line."""
        now, values = time.perf_counter(), dict(values)
        if (seen := samples_seen - self._samples) > 0:
            values["images_per_second"] = seen / (now - self._time)
            if self._flops and (peak := peak_flops(self.accelerator)):
                values["mfu"] = self._flops[-1][1] * values["images_per_second"] / peak
        values["memory_gib"] = _peak_memory(self.accelerator.device) / 2**30
        if self.accelerator.device.type == "cuda":
            values["memory_reserved_gib"] = torch.cuda.max_memory_reserved(self.accelerator.device) / 2**30
        self._time, self._samples = now, samples_seen
        if self.accelerator.is_main_process:
            self._unwritten += json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n"
            with surviving("metrics.jsonl"):
                _append(self.path, self._unwritten)
                self._unwritten = ""
        with surviving("to a tracker"):
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=step)
        return values

    def write_picture(self, step: int, path: Path) -> None:
        """Hand a picture to the trackers."""
        pixels = np.asarray(Image.open(path))[None]
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with surviving("to a tracker"):
                tracker.log_images({"samples": pixels}, step=step, **layout)

    @contextlib.contextmanager
    def counting_flops(self, kind: str, images: int) -> Iterator[None]:
        """Counts the FLOPs of what is done with `images` images inside, on a GPU and where `kind` is another one than
        the last time."""
        if self.accelerator.device.type != "cuda" or (self._flops and self._flops[-1][0] == kind):
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops.append((kind, counter.get_total_flops() / images))


def peak_flops(accelerator: Accelerator) -> float | None:
    """FLOP/s that the data sheet promises for all ranks together; None on unknown GPUs and without autocast."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(accelerator.device))
    if "H100" in words and "PCIe" in words:
        return 756e12 * accelerator.num_processes
    return next((PEAK_FLOPS[word] * accelerator.num_processes for word in words if word in PEAK_FLOPS), None)


def show(bar: tqdm, values: dict[str, Any], names: tuple[str, ...]) -> None:
    """Beside the bar's rate and remaining time: speed, memory, and those of `names` that `values` has."""
    names = (*names, "images_per_second", "memory_gib", "mfu")
    shown = {name: values[name] for name in names if name in values}
    bar.set_postfix({k: v if isinstance(v, str) else f"{v:.4g}" for k, v in shown.items()}, refresh=False)


@contextlib.contextmanager
def surviving(what: str) -> Iterator[None]:
    """A failed write inside becomes a warning."""
    try:
        yield
    except OSError as error:
        warn(f"cannot write {what} ({error}); training goes on")


def warn(text: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def _append(path: Path, text: str) -> None:
    """Append all of `text`, or nothing of it and raise `OSError`."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(text.encode()) < len(text.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
