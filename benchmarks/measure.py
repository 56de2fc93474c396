"""Times and memory of several ways to do the same thing, interleaved, so that a noisy machine is noisy for all."""

import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from nsvq.errors import UserError


def of_bench(name: str) -> ModuleType:
    """A module that only the extra `bench` installs. Raises `UserError` where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this needs {name}: pip install --editable '.[bench]' in a clone") from None


def metrics_of(folder: Path) -> list[dict]:
    """The lines that a run in `folder` logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def machine(device: torch.device) -> str:
    """One line: what the numbers were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
        name = (
            f"{models[0].split(':')[1].strip() if models else platform.processor()}, {torch.get_num_threads()} threads"
        )
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def interleaved(ways: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> float:
    """Median over rounds of the ratio of two ways in the same round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def peak_memory(way: Callable, device: torch.device) -> int:
    """Bytes that `way` holds at most beyond what there was before, its result included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    stop, peak = threading.Event(), [0]
    before = _resident()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _resident() - before)
            stop.wait(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        way()
    finally:
        stop.set()
        watcher.join()
    return peak[0]


class Elsewhere:
    """A way that another process of the same script goes each time that this is called: one that `serve`s it.

    `options` of the script: True gives one without a value, None and False leave it out. `peak`: bytes, see `serve`.
    """

    def __init__(self, options: dict[str, object]):
        words = []
        for name, value in options.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words.append(f"--{name}={value}")
        command = [sys.executable, sys.argv[0], *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.peak = int(self._answer())

    def __call__(self) -> None:
        self._process.stdin.write("go\n")
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of {sys.argv[0]} ended with {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process, and free its memory."""
        self._process.stdin.close()
        self._process.wait()


def serve(make: Callable[[], Callable], device: torch.device, calls: int) -> None:
    """Be the process of an `Elsewhere`: make the way and go it `calls` times, print the peak bytes of both, and go it
    again for each line of stdin."""
    ways: list[Callable] = []

    def start() -> None:
        ways.append(make())
        for _ in range(calls):
            ways[0]()

    print(peak_memory(start, device), flush=True)
    for _ in sys.stdin:
        ways[0]()
        _wait(device)
        print("done", flush=True)


def matmul_rate(device: torch.device, size: int = 4096) -> Callable[[], float]:
    """A way that multiplies two float32 matrices; its FLOPs are 2 size^3."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return lambda: a @ b


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> int:
    return int(_read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> str:
    return Path(path).read_text()
