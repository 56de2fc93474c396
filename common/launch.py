"""How a script starts and ends: errors as one line, exit codes, launchers, and memory."""

import ctypes
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from nsvq.errors import Stopped, UsageError, UserError

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # set by torchrun and by MPIs
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_CHECKPOINT_SECONDS = 300  # that a launcher should leave its processes after SIGTERM; torchrun leaves 30 by default

# For every `Accelerator`. Ranks wait for one that prepares data, which takes hours for ImageNet; NCCL gives up after
# ten minutes by default, and takes all ranks along.
LONG_WAIT = InitProcessGroupKwargs(timeout=timedelta(hours=24))


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` and a `Stopped` become one line on stderr and their exit code."""
    exit_code = 0
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding does not have
        check_launcher()
        end_with_the_launcher()
        main()
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        exit_code = stopped.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0]
        print(f"error: the GPU's memory is too small, or another process uses it ({what})", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({error}): make room, and give the same command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    leave_the_group()  # of other errors this rank may be alone to know
    if exit_code:
        sys.exit(exit_code)


def leave_the_group() -> None:
    """End the threads of the process group while Python is whole: one of gloo's that still frees a tensor as Python
    ends aborts the process, and a finished run fails. They end with the last object that knows the group."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()  # DistributedDataParallel is part of a cycle


def check_launcher() -> None:
    """Raises `UsageError` where several CPU processes were asked for and each would train alone. `accelerate launch
    --cpu --num_processes N` starts one, and says nothing. The processes of torchrun do not look for each other on a
    machine without an accelerator, unless accelerate is told to use the CPU."""
    started = any(name in os.environ for name in _RANKS)
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        alone = "MASTER_ADDR" in os.environ and not started  # an address is set for more than one process only
    else:
        alone = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    if alone:
        what = "this launcher does not start several CPU processes that know each other"
        command = f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N {sys.argv[0]} ..."
        raise UsageError(f"{what}; this does: {command}")


def shutdown_advice() -> str | None:
    """What to say where a launcher leaves too little time for a checkpoint after SIGTERM, else None."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torch/distributed/launcher/api.py
    seconds = float(os.environ.get(name, 30))
    if "TORCHELASTIC_RUN_ID" not in os.environ or seconds >= _CHECKPOINT_SECONDS:
        return None
    return f"after SIGTERM the launcher leaves {seconds:g} s for a checkpoint: export {name}=600 before it starts"


def end_with_the_launcher() -> None:
    """Get SIGTERM when the launcher ends, if one started this process: `accelerate launch` does not pass signals on,
    and a run whose launcher was stopped would go on unseen. Linux only."""
    parent = psutil.Process().parent()
    words = " ".join(parent.cmdline()[:3]) if parent is not None else ""
    if sys.platform == "linux" and any(name in words for name in ("accelerate", "torchrun", "torch.distributed")):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_freed_memory(device_type: str) -> None:
    """On the device type "cpu", keep what this process frees for its next step: glibc's malloc gives large blocks back
    to the kernel, and each step would fault the pages of its activations in again. Does nothing without glibc."""
    libc = ctypes.CDLL(None) if device_type == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)  # blocks of any size come from the heap,
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # which stays as large as it was
