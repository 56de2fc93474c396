"""Checkpoint folders: written whole or not at all, verified when read, and read without running code from them.

<root>/step-N/*.safetensors    weights, one file a module
<root>/step-N/state.pt         everything else, as tensors and plain values (torch.load with weights_only=True)
<root>/step-N/manifest.json    size and SHA-256 of each file, and what the run says about the checkpoint; written last
"""

import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsvq.errors import UserError
from nsvq.files import atomic_folder, file_hash

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A checkpoint that is not what was written; says which file, and how it differs."""


def write(target: Path, weights: dict[str, dict[str, Tensor]], state: dict, about: dict) -> None:
    """Write the folder `target`, which appears under its name only when all of it is on the disk. `weights`: state
    dicts by module. Raises `OSError` where that fails, and leaves nothing of it then."""
    try:
        with atomic_folder(target) as part:
            for name, tensors in weights.items():
                save_file({key: value.contiguous() for key, value in tensors.items()}, part / f"{name}.safetensors")
            torch.save(state, part / "state.pt")
            files = {path.name: _digest(path) for path in sorted(part.iterdir())}
            (part / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=2))
    except (SafetensorError, RuntimeError) as error:  # how each of the two libraries tells a full disk
        raise OSError(str(error).splitlines()[0]) from None


def verify(folder: Path) -> dict:
    """The manifest of a checkpoint whose files are those that were written. Raises `Damaged` where they are not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"{MANIFEST} is not there or not readable") from None
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if different := sorted(present.symmetric_difference(files)):
        raise Damaged(f"{', '.join(different[:3])}: not both in the folder and in {MANIFEST}")
    for name, expected in files.items():
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise Damaged(f"{name} is no plain file")
        if _digest(folder / name) != expected:
            raise Damaged(f"{name} is not the file that was written (its SHA-256 differs)")
    return manifest


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(weights, state) on the CPU. Raises `UserError` where the folder holds anything but tensors and plain values."""
    try:
        weights = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return weights, torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError) as error:
        what = "it holds more than tensors and plain values: delete it"
        raise UserError(f"{folder} is refused, because {what} ({str(error).splitlines()[0]})") from None


def complete(root: Path) -> list[Path]:
    """Checkpoints below `root`, oldest first; a `step-N` is complete, if not necessarily undamaged."""
    return sorted(root.glob("step-*"), key=step)


def step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest_good(root: Path) -> tuple[Path, dict, list[str]] | None:
    """The newest undamaged checkpoint, its manifest, and a line on each newer one, which is renamed to damaged-N. None
    where there is no checkpoint. Raises `UserError` where none of them is undamaged, and where one lies elsewhere and
    is only linked here."""
    damaged: dict[Path, str] = {}
    for folder in reversed(found := complete(root)):
        if folder.resolve() != root.resolve() / folder.name:
            where = f"{folder.resolve()}, outside the run's folder"
            raise UserError(f"{folder} leads to {where}: copy it there, or delete it")
        try:
            manifest = verify(folder)
        except Damaged as error:
            damaged[folder] = f"{folder.name} is damaged: {error}"
            continue
        for bad in damaged:
            aside = root / f"damaged-{step(bad)}"
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return folder, manifest, list(damaged.values())
    if found:
        lines = "; ".join(damaged.values())
        raise UserError(f"no checkpoint in {root} can be used ({lines}): delete that folder to start over")
    return None


def prune(root: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those at multiples of `keep_every` steps."""
    for folder in complete(root)[:-keep]:
        if keep_every is None or step(folder) % keep_every:
            shutil.rmtree(folder)


def _digest(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}
