"""A run's folder: resolved config, metrics, checkpoints. The only clock is the number of samples seen.

<out>/config.yaml  <out>/metrics.jsonl  <out>/checkpoints/step-N/  <out>/samples/step-N.png
<out>/stopped is there while a run that a signal ended waits to be started again; <out>/.lock is locked while one runs.
"""

import contextlib
import errno
import fcntl
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import (
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    is_wandb_available,
    set_seed,
)
from pydantic import Field
from torchvision.utils import save_image
from tqdm import tqdm

from nsvq.common import checkpoints
from nsvq.common import config as configs
from nsvq.common.fsdp import load_module, load_optimizer, unwrapped, whole
from nsvq.common.launch import LONG_WAIT, keep_freed_memory, shutdown_advice
from nsvq.common.metrics import MetricsLog, surviving, warn
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.files import atomic_file


class RunConfig(configs.Config):
    """What all trainers share about a run: seed, precision, and when to log, save and draw."""

    seed: int = Field(0, ge=0, description="Seed of weights, data order, augmentation and noise.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("bf16", description="Autocast type of the networks alone.")
    batch_size: int = Field(128, ge=1, description="Images per optimizer step, over all ranks and micro-batches.")
    accumulation: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Micro-batches of a rank's share of a batch; auto: the fewest that a GPU's memory holds."
    )
    workers: int = Field(4, ge=0, description="Data loading processes per rank, or 0.")
    log_every: int = Field(100, ge=1, description="Optimizer steps between two lines of metrics.jsonl.")
    sample_every: int = Field(5_000, ge=1, description="Optimizer steps between two pictures in <out>/samples.")
    checkpoint_every: int = Field(5_000, ge=1, description="Optimizer steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_every: int | None = Field(None, ge=1, description="Steps between two checkpoints kept for good; null: none.")
    resume_from: Path | None = Field(
        None,
        description="Checkpoint (a folder step-N) of another run to begin from; rates, losses and so on may differ.",
    )
    skip_limit: int = Field(20, ge=1, description="Steps in a row that may be skipped as not finite.")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="Trackers, or [].")


# Keys that may change between two starts of the same run: they change none of the weights that it has by then, and
# later ones by rounding at most.
_FREE_KEYS: tuple[str, ...] = ("out:", "sampling.", "cache:", "cache_verify:", "export_every:", "steps:")
_FREE_KEYS += ("run.accumulation", "run.log_every", "run.sample_every", "run.checkpoint_every", "run.keep_checkpoints")
_FREE_KEYS += ("run.keep_every", "run.workers", "run.skip_limit", "run.trackers", "data.max_bad_fraction")
_FREE_KEYS += ("run.resume_from",)
_FREE_KEYS += ("model.gradient_checkpointing:", "model.compile:", "held_out.", "validation.features")


def make_accelerator(config: RunConfig, out: Path, *, may_shard: bool = False) -> Accelerator:
    """The accelerator of a run, its seed set alike on every rank (so that weights start equal). Raises `UsageError`
    where it was launched with FSDP and the trainer cannot shard its networks, or with FSDP1."""
    # Its successor, forward_sync_buffers, is newer than the oldest torch that the project runs on.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
        step_scheduler_with_optimizer=False,
        # The loss is a mean over the micro-batch of this rank; buffers are constant, so none is broadcast.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            LONG_WAIT,
        ],
    )
    if "wandb" in config.trackers and not is_wandb_available():
        raise UsageError("run.trackers asks for wandb, which is not installed: pip install wandb")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not may_shard:
            why = "these networks are small, and FSDP has nothing to gain"
            raise UsageError(f"{why}: launch with DDP (configs/accelerate/four-gpus.yaml)")
        if not accelerator.is_fsdp2:
            raise UsageError("FSDP1 is not supported: set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
        # Parameters stay float32, as in DDP: autocast casts what it should, and leaves the rest as it is.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.is_main_process and (advice := shutdown_advice()):
        warn(advice)
    keep_freed_memory(accelerator.device.type)
    set_seed(config.seed)
    return accelerator


def micro_batch_size(config: RunConfig, accelerator: Accelerator) -> int:
    """Images in one micro-batch of one rank, before "auto" has found a smaller one. Raises `UsageError` where the
    global batch does not divide evenly."""
    size, ranks = config.batch_size, accelerator.num_processes
    parts = 1 if config.accumulation == "auto" else config.accumulation
    if size % (ranks * parts):
        what = f"ranks x run.accumulation = {ranks} x {parts}"
        raise UsageError(f"run.batch_size = {size} must be a multiple of {what}")
    return size // (ranks * parts)


class Run:
    """The output folder `out` of a training run, and where in it the run stands.

    `modules` and `optimizers` by name, as accelerate prepared them, are in a checkpoint beside the trainer's own state.
    `inputs`: config key -> fingerprint of what it points to, which may lie elsewhere at the next start.
    Attributes: `step` (optimizer steps done) and `samples_seen` (global, over all ranks).
    Raises `UsageError` where `out` holds a run of another config, or one that another process trains."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Any,
        out: Path,
        name: str,
        modules: dict,
        optimizers: dict,
        inputs: dict[str, str] | None = None,
    ):
        self.accelerator, self.out, self.settings = accelerator, Path(out), config.run
        self._modules, self._optimizers, self._inputs = modules, optimizers, inputs or {}
        self._resolved, self._config = config, configs.to_dict(config)
        self._checkpoints = self.out / "checkpoints"
        self.step = self.samples_seen = 0
        self._retry_at: int | None = None
        self._log = MetricsLog(accelerator, self.out / "metrics.jsonl")
        self.counting_flops = self._log.counting_flops
        on_main_process(accelerator, lambda: self._claim(name))
        if config.run.trackers and not accelerator.is_main_process:
            accelerator.init_trackers(name)

    def _claim(self, name: str) -> None:
        path = self.out / "config.yaml"
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock()
            (self.out / "stopped").unlink(missing_ok=True)
            before = configs.read_yaml(path) if path.exists() else {}
            if before and (changed := self._changes(before)):
                what = f"holds a run of another config ({'; '.join(changed[:4])})"
                raise UsageError(f"{self.out} {what}; choose another --out, or delete that folder")
            kept = before.get("inputs") or {}
            for key in sorted(key for key in kept if self._inputs.get(key, kept[key]) != kept[key]):
                print(f"note: {key} is not what it was at this run's start: it goes on with what is there", flush=True)
            self._inputs = kept | self._inputs  # what only the first start reads
            about = {"nsvq": code_version(), "command": shlex.join(sys.argv), **self._about()}
            with atomic_file(path) as part:
                part.write_text(yaml.safe_dump(about, sort_keys=False))
        except OSError as error:
            raise UsageError(f"cannot write to out = {self.out}: {error.strerror}") from None
        try:
            if self.settings.trackers:
                self.accelerator.init_trackers(name)
        except OSError as error:
            raise UsageError(f"cannot write to {self.out / 'logs'}: {error.strerror}") from None

    def _lock(self) -> None:
        """Two trainers in one folder would write each other's checkpoints. The lock ends with this process, however it
        ends, and data loading processes that outlive it do not hold it."""
        self._locked = open(self.out / ".lock", "a")  # noqa: SIM115, closed with the run
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                advice = "wait for its end, stop it, or choose another --out"
                raise UsageError(f"another process trains in {self.out}: {advice}") from None
            self.warn(f"{self.out} cannot be locked ({error.strerror}): start no second training in it")

    def close(self) -> None:
        """Leave the folder to other processes; to be called where the training ends, however it ends."""
        if self.accelerator.is_main_process:
            self._locked.close()

    # Checkpoints

    def checkpoint_due(self) -> bool:
        """Whether one is to be written after this step: as planned, or again after a failed write."""
        return self.step % self.settings.checkpoint_every == 0 or self.step == self._retry_at

    def save(self, state: dict) -> None:
        """Write `checkpoints/step-N`: modules, optimizers, and `state` (tensors and plain values; equal on all ranks,
        or split over them). A failed write leaves the older checkpoints and the run as they were; the next try is due
        soon."""
        failure: list[Any] = [None]
        contents = self._contents(state)
        if self.accelerator.is_main_process:
            try:
                self._write(self._checkpoints / f"step-{self.step}", contents)
                checkpoints.prune(self._checkpoints, self.settings.keep_checkpoints, self.settings.keep_every)
            except OSError as error:
                failure = [str(error)]
        self._retry_at = None
        if failure := broadcast_object_list(failure)[0]:
            self._retry_at = self.step + max(1, self.settings.checkpoint_every // 10)
            later = f"training goes on, the next try is at step {self._retry_at}"
            self.warn(f"no checkpoint at step {self.step} ({failure}); {later}")

    def _contents(self, state: dict) -> tuple[dict, dict]:
        """Weights by module, and everything else, whole; a collective call."""
        scaler = self.accelerator.scaler
        clock = {"step": self.step, "samples_seen": self.samples_seen}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        state = clock | {"optimizers": optimizers, "scaler": scaler and scaler.state_dict()} | state
        weights = {name: unwrapped(m).state_dict() for name, m in self._modules.items()}
        return whole((weights, state), keep=self.accelerator.is_main_process)

    def _write(self, folder: Path, contents: tuple[dict, dict]) -> None:
        checkpoints.write(folder, *contents, {"nsvq": code_version(), **self._about()})

    def _about(self) -> dict:
        return {"config": self._config, "inputs": self._inputs}

    def _changes(self, about: dict) -> list[str]:
        """Where an older start's config differs in keys that change a run's weights. Keys that it did not know have
        their defaults; inputs are compared by what they are, where that is known, and not by where they lie."""
        old = configs.with_defaults(about.get("config", {}), self._resolved)
        inputs = about.get("inputs", {})
        same = tuple(f"{key}:" for key, print in self._inputs.items() if inputs.get(key) == print)
        lines = configs.differences(old, self._config)
        return [line for line in lines if not line.startswith((*_FREE_KEYS, *same))]

    def load(self) -> dict | None:
        """Restore the newest undamaged checkpoint, or that of `resume_from` where the run has none yet, and return the
        `state` it was saved with; None where there is none.

        Lines of metrics.jsonl that are later than the checkpoint are dropped: they will be written again. Raises
        `UserError` where every checkpoint is damaged, and where the one to take is another run's, lies outside the
        run's folder, holds more than data or is one of other networks."""
        folder = on_main_process(self.accelerator, self._choose)
        if folder is None:
            if self.accelerator.is_main_process:
                self._log.drop_after(0)
            return None
        weights, state = checkpoints.read(folder)
        try:
            for name, module in self._modules.items():
                load_module(unwrapped(module), weights[name])
            for name, optimizer in self._optimizers.items():
                load_optimizer(optimizer, state["optimizers"][name])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[-1].strip()
            raise UsageError(f"{folder} is a checkpoint of other networks than this config's ({why})") from None
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self._log.start(self.samples_seen)
        if self.accelerator.is_main_process:
            self._log.drop_after(self.step)
        self.accelerator.print(f"resuming {self.out} from step {self.step} ({folder})")
        return state

    def _choose(self) -> Path | None:
        for part in self._checkpoints.glob(".step-*.part"):  # of a start that was killed while it wrote
            shutil.rmtree(part)
        if (found := checkpoints.newest_good(self._checkpoints)) is None:
            return self._choose_other(self.settings.resume_from)
        folder, manifest, damaged = found
        for line in damaged:
            self.warn(f"{line}; going on from {folder.name}")
        if changed := self._changes(manifest):
            raise UsageError(f"{folder} is a checkpoint of another config ({'; '.join(changed[:4])}): delete it")
        return folder

    def _choose_other(self, folder: Path | None) -> Path | None:
        """`folder`, a checkpoint of another run, with what this one does differently said; None where it is None."""
        if folder is None:
            return None
        try:
            changed = self._changes(checkpoints.verify(folder))
        except checkpoints.Damaged as error:
            raise UsageError(f"run.resume_from = {folder} is no whole checkpoint: {error}") from None
        print(f"note: beginning from {folder} with {'; '.join(changed) or 'the same config'}", flush=True)
        return folder

    # The end of a run before its end

    def stop(self, number: signal.Signals) -> None:
        """Raises `Stopped`; to be called after a checkpoint. <out>/stopped tells where a launcher hides exit codes."""
        message = f"{number.name} at step {self.step}; the same command goes on from the newest checkpoint"
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                (self.out / "stopped").write_text(message + "\n")
        raise Stopped(number, message)

    def give_up(self, state: dict, batches: list[dict], skipped: int) -> None:
        """Raises `UserError` after `skipped` steps in a row that were not finite. What is needed to look into it goes
        to <out>/failed: the state like a checkpoint, and the micro-batches of each rank."""
        folder, rank = self.out / "failed", self.accelerator.process_index
        failure, contents = None, self._contents(state)
        try:
            folder.mkdir(exist_ok=True)
            torch.save(batches, folder / f"step-{self.step}-batches-{rank}.pt")
            if self.accelerator.is_main_process:
                self._write(folder / f"step-{self.step}", contents)
        except (OSError, RuntimeError) as error:
            failure = error
        ids = gather_object([id for batch in batches for id in batch["id"]])
        kept = f"state and batches are in {folder}" if failure is None else f"{folder} could not be written ({failure})"
        raise UserError(
            f"loss or gradient was not finite in {skipped} steps in a row, up to step {self.step}; {kept}. The last "
            f"batch held {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}. Look at these images, or go on from "
            f"an older checkpoint in {self._checkpoints} with a lower learning rate (--run.resume_from, a new --out)"
        )

    # Randomness

    def seed_micro_batch(self, number: int, size: int) -> None:
        """Make what the networks draw (dropout, noise) a function of the seed and of the samples seen: of the global
        position at which micro-batch `number` of this rank's `size` images begins."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        position = self.samples_seen + (number * ranks + rank) * size
        torch.manual_seed(int(np.random.SeedSequence([self.settings.seed, position]).generate_state(1, np.uint64)[0]))

    # Metrics

    def log(self, values: dict[str, Any]) -> dict[str, Any]:
        """One line of metrics; numbers must be equal on all ranks or reduced. Returns them with what the log adds."""
        return self._log.write(self.step, self.samples_seen, values)

    def save_picture(self, images: torch.Tensor, per_row: int) -> None:
        """samples/step-N.png of images [B, 3, H, W] in [-1, 1], `per_row` in a row; the trackers get it too."""
        path = self.out / "samples" / f"step-{self.step}.png"
        with surviving(f"samples/{path.name}"):
            with atomic_file(path) as part:
                save_image(images, part, "png", nrow=per_row, normalize=True, value_range=(-1, 1))
            self._log.write_picture(self.step, path)

    def warn(self, text: str) -> None:
        """A warning, from the main process."""
        if self.accelerator.is_main_process:
            warn(text)


def on_main_process(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """What `work` gives there, or the `UserError` or `OSError` that it raises there, on every rank."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [work(), None]
        except (UserError, OSError) as error:
            answer = [None, error]
    result, refused = broadcast_object_list(answer)
    if refused is not None:
        raise refused
    return result


def progress_bar(accelerator: Accelerator, total: int | None, done: int, **looks: Any) -> tqdm:
    """A bar on the main process; twice a second on a terminal, twice a minute in a log. `looks`: tqdm's arguments."""
    hidden, interval = not accelerator.is_main_process, 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, disable=hidden, mininterval=interval, maxinterval=60, **looks)


def code_version() -> str:
    """The package's version, with the commit where the code is a clone: a repository that the installed package happens
    to lie in is another project's."""
    root, version = Path(__file__).parents[1], metadata.version("nsvq")
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version
    git = ["git", f"--git-dir={root / '.git'}", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=root)
    return version + (f"+{commit.stdout.strip()}" if commit.returncode == 0 else "")
