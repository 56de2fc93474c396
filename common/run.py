"""A run's folder: resolved config, metrics, checkpoints. The only clock is the number of samples seen.

<out>/config.yaml  <out>/metrics.jsonl  <out>/checkpoints/step-N/  <out>/samples/step-N.png
"""

import contextlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.training_utils import EMAModel
from pydantic import Field
from tqdm import tqdm

from common import config as configs
from common.errors import UsageError


class RunConfig(configs.Config):
    """What both trainers share about a run: seed, precision, and when to log, save and draw."""

    seed: int = Field(0, ge=0, description="Seed of weights, data order, augmentation and noise.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "bf16", description="Autocast type of the networks; codebook, losses and optimizers stay float32."
    )
    batch_size: int = Field(128, ge=1, description="Images per optimizer step, over all ranks and micro-batches.")
    accumulation: int = Field(1, ge=1, description="Micro-batches that each rank splits its share of a batch into.")
    workers: int = Field(
        4, ge=0, description="Data loading processes per rank, or 0. Keep the number when resuming on streamed data."
    )
    log_every: int = Field(100, ge=1, description="Optimizer steps between two lines of metrics.jsonl.")
    sample_every: int = Field(5_000, ge=1, description="Optimizer steps between two pictures in <out>/samples.")
    checkpoint_every: int = Field(5_000, ge=1, description="Optimizer steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        ["tensorboard"], description="Trackers of accelerate to report to, beside metrics.jsonl; [] for none."
    )


# Keys that may change between two starts of the same run: they change none of its weights.
_FREE_KEYS = (
    "out:",
    "run.workers",
    "run.log_every",
    "run.sample_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.trackers",
    "run.accumulation",
    "sampling.",
    "cache:",
)


def make_accelerator(config: RunConfig, out: Path) -> Accelerator:
    """The accelerator of a run, its seed set alike on every rank (so that weights start equal)."""
    # Its successor, forward_sync_buffers, is newer than the oldest torch that the project runs on.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
        step_scheduler_with_optimizer=False,
        # The loss is a mean over the micro-batch of this rank; buffers are constant, so none is broadcast.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(config.seed)
    return accelerator


def micro_batch_size(config: RunConfig, accelerator: Accelerator) -> int:
    """Images in one micro-batch of one rank. Raises `UsageError` where the global batch does not divide evenly."""
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"run.batch_size = {config.batch_size} must be a multiple of ranks x run.accumulation = "
            f"{accelerator.num_processes} x {config.accumulation}"
        )
    return config.batch_size // parts


class Run:
    """The output folder `out` of a training run, and where in it the run stands.

    Attributes: `step` (optimizer steps done) and `samples_seen` (global, over all ranks).
    Raises `UsageError` where `out` holds a run of another config.
    """

    def __init__(self, accelerator: Accelerator, config: configs.Config, out: Path, name: str):
        self.accelerator, self.out, self.settings = accelerator, Path(out), config.run
        self.step = self.samples_seen = 0
        self._logged_at, self._logged_samples = time.perf_counter(), 0
        problem = [None]
        if accelerator.is_main_process:
            try:
                self._claim(configs.to_dict(config))
            except UsageError as error:
                problem = [str(error)]
        if problem_anywhere := broadcast_object_list(problem)[0]:
            raise UsageError(problem_anywhere)
        if config.run.trackers:
            accelerator.init_trackers(name)

    def _claim(self, resolved: dict) -> None:
        path = self.out / "config.yaml"
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to out = {self.out}: {error.strerror}") from None
        if path.exists():
            old = configs.read_yaml(path)
            changed = [
                line for line in configs.differences(old.get("config", {}), resolved) if not line.startswith(_FREE_KEYS)
            ]
            if changed:
                raise UsageError(
                    f"{self.out} holds a run of another config ({'; '.join(changed[:4])}); "
                    "choose another --out, or delete that folder"
                )
        text = yaml.safe_dump(
            {"nsvq": code_version(), "command": shlex.join(sys.argv), "config": resolved}, sort_keys=False
        )
        _write_atomically(path, text)

    # Checkpoints

    def save(self, state: dict) -> None:
        """Write `checkpoints/step-N` from every rank: models, optimizers and random states through accelerate, and
        `state` (tensors and plain values) beside them. A failed write leaves the older checkpoints and the run as
        they were. The folder appears under its name only when it is complete."""
        folder = self.out / "checkpoints"
        target, temporary = folder / f"step-{self.step}", folder / f".step-{self.step}.part"
        failure = None
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        except OSError as error:
            failure = error
        self.accelerator.wait_for_everyone()  # also after a failure, or the other ranks would wait for ever
        try:
            if failure is None:
                self.accelerator.save_state(str(temporary))
                if self.accelerator.is_main_process:
                    torch.save({"step": self.step, "samples_seen": self.samples_seen, **state}, temporary / "state.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            failure = error
        failed = torch.tensor([float(failure is not None)], device=self.accelerator.device)
        failed = bool(self.accelerator.reduce(failed, "sum").item())
        if failed:
            self.accelerator.print(
                f"warning: no checkpoint at step {self.step} ({failure}); training goes on, "
                "the next one is tried as planned",
                file=sys.stderr,
            )
        if self.accelerator.is_main_process:
            if failed:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                _sync(temporary)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
                for old in self.checkpoints()[: -self.settings.keep_checkpoints]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> dict | None:
        """Restore the newest checkpoint and return the `state` it was saved with; None where there is none.

        Lines of metrics.jsonl that are later than the checkpoint are dropped: they will be written again."""
        found = self.checkpoints()
        if not found:
            return None
        self.accelerator.load_state(str(found[-1]))
        state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self._logged_samples = self.samples_seen
        if self.accelerator.is_main_process:
            metrics = self.out / "metrics.jsonl"
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            _write_atomically(metrics, "".join(kept))
        self.accelerator.print(f"resuming {self.out} from step {self.step}")
        return state

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))

    # Metrics

    def log(self, values: dict[str, float], **extra: object) -> None:
        """Append one object to metrics.jsonl and report it to the trackers; `values` must be equal on all ranks or
        reduced. Adds images a second since the last call, and peak memory (of the GPU; else of the process)."""
        now = time.perf_counter()
        values = dict(values)
        if (seen := self.samples_seen - self._logged_samples) > 0:
            values["images_per_second"] = seen / (now - self._logged_at)
        values["memory_gib"] = _peak_memory(self.accelerator.device) / 2**30
        self._logged_at, self._logged_samples = now, self.samples_seen
        if self.accelerator.is_main_process:
            record = {"step": self.step, "samples_seen": self.samples_seen, **extra, **values}
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        self.accelerator.log(values, step=self.step)

    def image_path(self) -> Path:
        """Where this step's picture goes."""
        (self.out / "samples").mkdir(exist_ok=True)
        return self.out / "samples" / f"step-{self.step}.png"


@contextlib.contextmanager
def averaged_weights(ema: EMAModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """With the averages of `ema` in the place of `parameters`, which come back at the end."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def progress_bar(accelerator: Accelerator, total: int, done: int) -> tqdm:
    """A bar over optimizer steps, on the main process; twice a second on a terminal, twice a minute in a log."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, disable=not accelerator.is_main_process, mininterval=interval, maxinterval=60
    )


def code_version() -> str:
    """The package's version, with the commit where the code is a git checkout."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return metadata.version("nsvq") + (f"+{git.stdout.strip()}" if git.returncode == 0 else "")


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def _sync(folder: Path) -> None:
    """Have every file below `folder` on the disk before it takes its final name."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
