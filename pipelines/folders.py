"""Pipeline folders and Hub repositories with classes of this project, read with the code that is installed here: what
they ship is not run. The rest is diffusers' own reader, so that its options mean the same for all folders."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, LDMPipeline
from huggingface_hub import snapshot_download

from nsvq.diffusion.dit import PipelineDiT

SHIPPED_DIT = "nsvq_dit"  # the name of diffusion/dit.py in a folder
_HUB = ("cache_dir", "revision", "token", "local_files_only", "force_download")
LDM_NAMES = {"transformer": "unet", "vae": "vqvae"}  # what `LDMPipeline` calls its parts


class InstalledCode(DiffusionPipeline):
    """To stand before a class of diffusers' pipelines: its reader then finds this project's classes in place of those
    that a folder ships."""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **options) -> dict[str, Any]:
        index = super().load_config(pretrained_model_name_or_path, **options)
        if index.get("transformer", [None])[0] == SHIPPED_DIT:
            index["transformer"] = [PipelineDiT.__module__, PipelineDiT.__name__]
        return index | {"_class_name": cls.__name__}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **changes):
        """A pipeline of this class with the parts of another, which share their memory, and the names of its classes.
        `changes`: other parts, or a `dtype`, which the parts take for both; without it they stay as they are."""
        dtype = changes.pop("dtype", changes.pop("torch_dtype", None))
        ours = {theirs: name for name, theirs in LDM_NAMES.items()}
        parts = {ours.get(name, name): part for name, part in pipeline.components.items()}
        made = cls(**{"id2label": pipeline.config.get("id2label") or _words(pipeline)} | parts | changes)
        if placed := getattr(pipeline, "hf_device_map", None):  # the parts bring their hooks
            by_part = isinstance(placed, dict)
            made.hf_device_map = {ours.get(name, name): place for name, place in placed.items()} if by_part else placed
        return made if dtype is None else made.to(dtype)


def refuse_options(unknown: dict[str, Any], safe_serialization: bool) -> None:
    """Raises `ValueError` for what `save_pretrained` of our pipelines does not do."""
    if unknown or not safe_serialization:
        given = ", ".join(unknown or ["safe_serialization=False"])
        raise ValueError(f"not supported: {given}; weights are always safetensors, in diffusers' own shards")


def _words(pipeline: DiffusionPipeline) -> dict[str, str] | None:
    """Names of classes as `DiTPipeline` keeps them, word by word; None where it has none."""
    names: dict[str, str] = {}
    for word, label in getattr(pipeline, "labels", {}).items():
        names[str(label)] = f"{names[str(label)]}, {word}" if str(label) in names else word
    return dict(sorted(names.items(), key=lambda item: int(item[0]))) or None


def read_index(source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """model_index.json as it is, of a folder or Hub id; `options` are those of `from_pretrained`."""
    return DiffusionPipeline.load_config(source, **{key: options[key] for key in _HUB if key in options})


def local_folder(source: str | Path, index: dict[str, Any], options: dict[str, Any]) -> str:
    """The folder of a Hub id whose pipeline has classes of this project, with which diffusers' download cannot deal;
    other sources as they are."""
    modules = [str(value[0]) for value in index.values() if isinstance(value, list) and value]
    if Path(source).is_dir() or not any(module.startswith("nsvq") for module in modules):
        return str(source)
    hub = {key: options[key] for key in _HUB if key in options}
    return snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], **hub)


def read_ldm(folder: str, options: dict[str, Any]) -> LDMPipeline:
    """An `LDMPipeline` with options in the names of `DiTPipeline`'s parts."""
    renamed = {LDM_NAMES.get(name, name): value for name, value in options.items()}
    for key in {"dtype", "torch_dtype"} & renamed.keys():
        if isinstance(renamed[key], dict):
            renamed[key] = {LDM_NAMES.get(name, name): value for name, value in renamed[key].items()}
    return LDMPipeline.from_pretrained(folder, **renamed)
