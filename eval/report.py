"""What all evaluations share: how they start, what they measure with, and the result as a file and a table."""

import hashlib
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.run import code_version
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError
from nsvq.eval.config import EvaluationConfig
from nsvq.eval.feature_statistics import FeatureSet
from nsvq.eval.features import Extractor, Unavailable, load_extractor
from nsvq.files import atomic_file, file_hash, part_of
from nsvq.tokenizer.pretrained import Tokenizer


def open_output(path: Path) -> None:
    """Have the folder of the result ready before any long work. Raises `UsageError` where it cannot be written to."""
    if path.suffix != ".json" or path.is_dir():
        raise UsageError(f"--output {path}: give the name of a .json file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part_of(path).touch()
        part_of(path).unlink()
    except OSError as error:
        raise UsageError(f"cannot write to --output {path}: {error.strerror}") from None


def exact_float32() -> None:
    """Let float32 be float32 on every GPU: TF32 convolutions move a Frechet distance in its third digit."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def data_with_size(data: DataConfig, size: int) -> DataConfig:
    """`data` at `size` pixels, unless its own `image_size` was given."""
    return data if "image_size" in data.model_fields_set else data.model_copy(update={"image_size": size})


def data_for(tokenizer: Tokenizer, data: DataConfig) -> DataConfig:
    """`data` at the tokenizer's size, unless another was given. Raises `UsageError` where that is no multiple
    of its downsampling."""
    data = data_with_size(data, tokenizer.image_size or data.image_size)
    if data.image_size % tokenizer.downsampling:
        wanted = f"a multiple of the tokenizer's downsampling, {tokenizer.downsampling}"
        raise UsageError(f"data.image_size = {data.image_size} must be {wanted}")
    return data


def no_numbers() -> dict[str, Any]:
    """The part of a result that measuring fills: {name: number}, {name: what it is}, {name: why not}, warnings."""
    return {"metrics": {}, "meanings": {}, "skipped": {}, "warnings": []}


def start(output: Path) -> Accelerator:
    """Of an evaluation that writes `output`: what cannot be written is said now, and float32 is exact."""
    open_output(output)
    exact_float32()
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[launch.LONG_WAIT])
    launch.keep_freed_memory(accelerator.device.type)
    return accelerator


def add(result: dict, metrics: dict[str, float], meanings: dict[str, str]) -> None:
    """Add numbers with their meanings."""
    result["metrics"] |= metrics
    result["meanings"] |= {name: meanings[name] for name in metrics}


def provenance(accelerator: Accelerator, config: configs.Config) -> dict:
    """What made a number, beside its inputs: command, config, machine and versions."""
    packages = ("torch", "torchvision", "diffusers", "accelerate", "torch-fidelity", "lpips", "numpy", "pillow")
    cuda = accelerator.device.type == "cuda"
    versions = {"nsvq": code_version(), "python": platform.python_version()}
    return {
        "command": shlex.join(sys.argv),
        "config": configs.to_dict(config),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ranks": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else str(accelerator.device),
        "versions": versions | {name: metadata.version(name) for name in packages},
    }


def about_data(config: DataConfig, split: str | None) -> dict:
    """Which images were measured; `split`: None where none of the data were."""
    if split is None:
        about = {"source": config.source, "split": None, "note": "not measured: the reference is a file"}
        return about | {"image_size": config.image_size}
    about = {"source": config.source, "split": split, "fingerprint": open_split(config, split).fingerprint}
    return about | {"image_size": config.image_size, "crop": "ADM centre crop"}


def load_extractors(
    config: EvaluationConfig, accelerator: Accelerator, metrics: Sequence[str], result: dict, names: Callable
) -> dict[str, Extractor]:
    """The extractors of `config` by name. One whose weights cannot be had is left out, and its numbers, `names` of it,
    are skipped in the result. A collective call."""
    extractors = {}
    for i, features in enumerate(config.features):
        if features == "none":
            continue
        try:
            extractor = load_extractor(features, config.features_weights if i == 0 else None, accelerator, metrics)
            extractors[extractor.name] = extractor
        except Unavailable as error:
            result["skipped"] |= dict.fromkeys(names(features), str(error))
    return extractors


def rank_warnings(name: str, made: FeatureSet, real: FeatureSet, layer: str) -> list[str]:
    """Why to read a Frechet distance of these sets with care: a covariance of less than full rank."""
    d = len(made.gaussians[layer].mean)
    n = min(count for count in (made.count, real.count) if count is not None)
    low = f"{n} images give a covariance of rank at most {max(n - 1, 0)} in {d} dimensions"
    warning = f"{name}: {low}, which raises the distance; compare it only at equal numbers of images"
    return [] if n > d else [warning]


def folder_hash(folder: Path) -> str | None:
    """SHA-256 over names and contents of a pipeline's files, without its card; None for a Hub id."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def write(path: Path, result: dict) -> None:
    """Write the result in one step. A metric that is not finite becomes null, with a warning beside it."""
    broken = [name for name, value in result["metrics"].items() if not math.isfinite(value)]
    warnings = result["warnings"] + [f"{name} is {result['metrics'][name]}, written as null" for name in broken]
    result = _finite(result) | {"metrics": result["metrics"] | dict.fromkeys(broken), "warnings": warnings}
    try:
        with atomic_file(path) as part:
            part.write_text(json.dumps(result, indent=2, allow_nan=False, default=str) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _finite(value: Any) -> Any:
    """JSON has no infinity, and settings of schedulers do: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, result: dict) -> str:
    """The result as aligned lines: name, number, what it is; then what was skipped and why, and the warnings."""
    metrics, skipped = result["metrics"], result["skipped"]
    whys = {why: ", ".join(name for name in skipped if skipped[name] == why) for why in skipped.values()}
    width = max(map(len, metrics), default=0)
    lines = [title]
    lines += [f"  {name:<{width}}  {value:>10.5g}  {result['meanings'][name]}" for name, value in metrics.items()]
    lines += [f"  skipped {names}: {why}" for why, names in whys.items()]
    lines += [f"  warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)
