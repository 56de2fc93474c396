"""Files and folders: written whole or not at all, and named by what they hold."""

import hashlib
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to: it takes the name, in place of what is there, when the block ends well and its
    bytes are on the disk, and is gone when it does not. What a kill leaves of it is overwritten by the next start.
    `shared`: other processes may write the file at the same time, and so each has a path of its own, which stays after
    a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")) if shared else part_of(path)
    try:
        part.unlink(missing_ok=True)
        part.touch()
        plain = part.stat().st_mode
        yield part
        _open_up(part, plain)
        _sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """The same for a folder, which starts empty, and whose files are on the disk before it has its name."""
    part = part_of(target)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        plain = part.stat().st_mode
        yield part
        for path in [*part.rglob("*"), part]:
            if path.is_file():
                _open_up(path, plain)
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def part_of(path: Path) -> Path:
    """Where `path` stands while it is written."""
    return path.with_name(f".{path.name}.part")


def _open_up(file: Path, plain: int) -> None:
    """Let those read and write `file` who may by `plain`, the mode that the umask gives: some libraries leave a file to
    its owner alone."""
    file.chmod(stat.S_IMODE(file.stat().st_mode) | plain & 0o666)


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(module: nn.Module, prefix: str = "") -> str:
    """SHA-256 over `prefix` and the names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
