"""How a script starts and ends: errors as one line, exit codes, as many CPU processes as were asked for, and memory."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable

import psutil

from nsvq.errors import Stopped, UsageError, UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` and a `Stopped` become one line on stderr and their exit code."""
    try:
        start_cpu_ranks()
        end_with_the_launcher()
        main()
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({error}): make room, and give the same command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def start_cpu_ranks() -> None:
    """Replace this process by torchrun's where `accelerate launch` was asked for several CPU processes and started one.

    `accelerate launch --cpu --num_processes N` starts N only through MPI; without it one runs, and nothing is said.
    Returns at once in every other case. Raises `UsageError` where the number cannot be read off the command line.
    """
    environment = os.environ
    # The launcher sets the address for more than one process, and torchrun or MPI then set a rank.
    alone = "MASTER_ADDR" in environment and not any(
        name in environment for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    )
    if not alone or environment.get("ACCELERATE_USE_CPU", "False").lower() not in ("true", "1", "yes"):
        return
    command = psutil.Process().parent().cmdline()
    try:
        count = str(int(command[command.index("--num_processes") + 1]))
    except (ValueError, IndexError):
        raise UsageError("several CPU processes were asked for, but how many is not on the command line of "
                         "`accelerate launch`; give --num_processes there, or use torchrun") from None  # fmt: skip
    port = environment["MASTER_PORT"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", count, "--master_port", port]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


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
