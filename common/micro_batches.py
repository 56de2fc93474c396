"""How many micro-batches a rank cuts its share of a batch into, where the config leaves it to the GPU's memory.

They are tried before the first step, from the fewest on, with everything in memory that a step finds there. A try
leaves nothing behind: weights stay, buffers and random states come back, and the trainer's `heaviest` undoes the rest.
The choice is kept in <out>/micro_batch.json, so that a run that goes on there computes in the same order."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from torch import Tensor, nn

from nsvq.common.fsdp import unwrapped
from nsvq.common.metrics import warn
from nsvq.errors import UserError
from nsvq.files import atomic_file

_SPARE = 0.05  # of the GPU's memory, for fragments, and for what only other steps need
# What libraries say besides: cuDNN looks for another way where a convolution's memory runs out, and says that none is.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine to execute this computation")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether too little memory is what `error` says, or may mean."""
    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or any(text in str(error) for text in _OUT_OF_MEMORY)


def next_accumulation(share: int, accumulation: int) -> int | None:
    """The next larger number of equal micro-batches of a rank's `share` of a batch; None after one image each."""
    return next((n for n in range(accumulation + 1, share + 1) if share % n == 0), None)


def advice(share: int, accumulation: int) -> str:
    """What to do where the micro-batches of a rank's `share` do not fit."""
    if (more := next_accumulation(share, accumulation)) is None:
        return "one image does not fit into the GPU's memory: take a smaller model, or split it (fsdp2.yaml)"
    what = f"micro-batches of {share // accumulation} images do not fit into the GPU's memory"
    return f"{what}: --run.accumulation {more}, or more; another program may use the GPU, too"


def fewest(share: int, fits: Callable[[int], bool], accelerator: Accelerator, out: Path) -> int:
    """The fewest equal micro-batches of `share` images for which fits(number) is true on every rank, or what an earlier
    start on the same GPUs kept in the folder `out`. A collective call. Raises `UserError` where none are."""
    cuda = accelerator.device.type == "cuda"
    gpu = torch.cuda.get_device_name(accelerator.device) if cuda else accelerator.device.type
    here, path = {"gpu": gpu, "ranks": accelerator.num_processes, "share": share}, out / "micro_batch.json"
    kept = [_read(path, here) if accelerator.is_main_process else None]
    if (number := broadcast_object_list(kept)[0]) is None:
        number = 1
        while not _everywhere(fits(number), accelerator):
            if (more := next_accumulation(share, number)) is None:
                raise UserError(advice(share, number))
            number = more
        release_memory()
        if cuda:
            torch.cuda.reset_peak_memory_stats(accelerator.device)  # that of the run is what its metrics show
        if accelerator.is_main_process:
            with contextlib.suppress(OSError), atomic_file(path) as part:
                part.write_text(json.dumps(here | {"accumulation": number}) + "\n")
    accelerator.print(f"run.accumulation auto: {number}, micro-batches of {share // number} images a rank ({gpu})")
    return number


def _read(path: Path, here: dict) -> int | None:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept["accumulation"] if here.items() <= kept.items() else None


def _everywhere(fits: bool, accelerator: Accelerator) -> bool:
    return not accelerator.reduce(torch.tensor(float(not fits), device=accelerator.device), "sum").item()


def fits(work: Callable[[], None], modules: list[nn.Module], parameters: list[Tensor], device: torch.device) -> bool:
    """Whether memory suffices for `work`, forward and backward of `modules`, beside two moments and an average of all
    `parameters`. No rank may wait for others in it, since these may have run out of memory."""
    buffers = [buffer for module in modules for buffer in unwrapped(module).buffers()]
    before = [buffer.cpu().clone() for buffer in buffers]
    cudnn = torch.backends.cudnn
    benchmark, cudnn.benchmark = cudnn.benchmark, False  # what it chose while memory is held would stay for the run
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _held(parameters, device):
            work()
        return True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if not isinstance(error, torch.OutOfMemoryError):
            warn(f"taken for too little memory: {str(error).splitlines()[0]}")
    finally:
        cudnn.benchmark = benchmark
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        for module in modules:
            module.zero_grad(set_to_none=True)
    torch.compiler.reset()  # or it would compile the next size for sizes of any kind
    release_memory()
    return False


@contextlib.contextmanager
def _held(parameters: list[Tensor], device: torch.device) -> Iterator[None]:
    """With what optimizers and averages will take, and the spare part, in use."""
    size = 3 * sum(p.numel() * p.element_size() for p in parameters)
    if device.type == "cuda":
        size += int(_SPARE * torch.cuda.mem_get_info(device)[1])
    held = torch.empty(size, dtype=torch.uint8, device=device)
    yield
    del held
