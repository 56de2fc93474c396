"""python tests/harness/instrumented.py SPEC [arguments of the trainer]: records each sample that it trains on.

SPEC is JSON: {"stage": "tokenizer", "diffusion" or "autoregressive", "record": FILE, "signal_at": position,
"nan_at": [positions], "shard": whether networks are split by FSDP2, "fits": [largest micro-batch of each rank]}.
FILE-rank gets a line [start] for each time that the rank begins to read, and [position, ids] for each micro-batch. The
rank that loads the sample at `signal_at` gets SIGTERM; the samples at `nan_at` are not numbers. With `fits`, memory
runs out at the end of larger micro-batches.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

from nsvq.common import launch, run
from nsvq.common.trainer import Trainer

OUTLIVED = "threads of the process group outlived the run"  # and may abort the process as Python ends


class Sharding(Accelerator):
    """Splits networks over CPU processes, which a launch with FSDP does on GPUs only."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=True,  # the launcher's default
        )


def instrument(
    trainer: type[Trainer], record: str, signal_at: int = -1, nan_at: Sequence[int] = (), fits: Sequence[int] = ()
) -> None:
    """Wrap `trainer.batches`, and with `fits` its step."""
    original = trainer.batches
    if fits:
        trainer.step, trainer.tries_micro_batches = limited(trainer.step, fits), lambda self: True

    def recorded(self, start):
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batch_size = self.micro_batch

        def write(line: list) -> None:
            with open(f"{record}-{rank}", "a") as file:
                file.write(json.dumps(line) + "\n")

        write([start])
        position = start + rank * batch_size
        for batch in original(self, start):
            write([position, batch["id"]])
            here = range(position, position + batch_size)
            for bad in set(nan_at).intersection(here):
                batch["image" if "image" in batch else "latents"][bad - position] = float("nan")
            if signal_at in here:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            position += batch_size * world_size

    trainer.batches = recorded


def limited(step, fits: Sequence[int]):
    """`step`, at whose end rank r has run out of memory where it got more than fits[r] samples."""

    def run(self, batch):
        terms = step(self, batch)
        if len(next(iter(batch.values()))) > fits[self.accelerator.process_index]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return terms

    return run


def gloo_threads() -> list[str]:
    """The names of the threads of process groups in this process. Empty but on Linux."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def trainer_of(stage: str) -> type[Trainer]:
    """The trainer of "tokenizer", "diffusion" or "autoregressive"."""
    return getattr(import_module(f"nsvq.{stage}.trainer"), f"{stage.capitalize()}Trainer")


def attempts(record: str, rank: int = 0) -> list[tuple[int, list[tuple[int, str]]]]:
    """For each time that a rank began to read: its start, and (position, id) of each sample that it loaded."""
    found = []
    for line in map(json.loads, Path(f"{record}-{rank}").read_text().splitlines()):
        if len(line) == 1:
            found.append((line[0], []))
        else:
            found[-1][1].extend((line[0] + i, id) for i, id in enumerate(line[1]))
    return found


def samples(record: str) -> dict[int, str]:
    """The id at each position over all ranks. Raises `AssertionError` where two attempts disagree."""
    ids: dict[int, str] = {}
    for file in sorted(Path(record).parent.glob(Path(record).name + "-*")):
        for _, seen in attempts(record, int(file.name.rpartition("-")[2])):
            for position, id in seen:
                assert ids.setdefault(position, id) == id, f"position {position} was {ids[position]} and then {id}"
    return ids


if __name__ == "__main__":
    spec = json.loads(sys.argv.pop(1))
    stage, shard = spec.pop("stage"), spec.pop("shard", False)
    if shard:
        run.Accelerator = Sharding
    instrument(trainer_of(stage), **spec)
    exit_code = 0
    try:
        launch.run(import_module(f"nsvq.{stage}.train").main)
    except SystemExit as end:
        exit_code = end.code
    if shard:  # DTensor's caches know the group to the end; on GPUs, where users split networks, no thread is gloo's
        sys.stdout.flush()
        os._exit(exit_code)
    assert 0 < exit_code < 128 or not gloo_threads(), OUTLIVED  # after an error they may live
    sys.exit(exit_code)
