"""Samples of a pipeline: which image is what, drawn in groups that no batch size or number of ranks changes.

Sample i has the seed S + i and a class that i alone decides. Groups are of one size, are always drawn as a whole, and
group g belongs to rank g mod N: so the same command gives the same images, also after a kill, and a smaller set is the
beginning of a larger one. Kept samples are PNG files, one each; those that are there are not drawn again.
"""

import inspect
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.common import config as configs
from nsvq.common.image_metrics import to_uint8
from nsvq.errors import UsageError, UserError
from nsvq.eval.given_images import GivenImages
from nsvq.files import atomic_file
from nsvq.pipelines.autoregressive import CLASS_NAME
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.pretrained import TRAINING_FILE, VQ_MODELS

Source: TypeAlias = DiffusionPipeline | GivenImages


@dataclass
class Sampling:
    """How samples are drawn. `label`: sample number -> class id, or None for "no class"; `precision`: autocast type of
    the transformer; `guide`: transformer for autoguidance; `tokens`: guidance_schedule, guidance_power, temperature,
    top_k and top_p of an autoregressive pipeline, to which interval, steps and guide mean nothing; `resize`: the size
    to measure them at. Of given images, whose guidance_scale is None, label and resize alone mean something."""

    guidance_scale: float | None
    guidance_interval: tuple[float, float]
    steps: int
    seed: int
    precision: str
    label: Callable[[int], int | None]
    guide: ModelMixin | None = None
    tokens: dict[str, Any] | None = None
    resize: int | None = None

    @property
    def setting(self) -> dict[str, float]:
        """What sets it apart from others of a sweep, and from samples of another size."""
        swept = {k: self.tokens[k] for k in ("temperature", "top_k")} if self.tokens else {"steps": self.steps}
        drawn = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale, **swept}
        return drawn | ({"resize": self.resize} if self.resize else {})

    @property
    def name(self) -> str:
        """Names this setting among those of a sweep."""
        return "-".join(f"{name.removesuffix('_scale')}-{value:g}" for name, value in self.setting.items())


def load_pipeline(folder: str) -> DiffusionPipeline:
    """Read a pipeline (folder or Hub id): ours, with classes or none, or any of diffusers that takes `class_labels`.
    Raises `UserError` where there is none."""
    try:
        index = DiffusionPipeline.load_config(folder)
        ours = _made_here(folder, index)
        pipeline = (ClassConditionalPipeline if ours else DiffusionPipeline).from_pretrained(folder)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        folders = "the <out>/pipeline folder of a finished run"
        give = f"give {folders}, or a class-conditional pipeline of diffusers"
        raise UserError(f"no pipeline at {folder}: {give} ({str(error).splitlines()[0]})") from None
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{folder} holds a {type(pipeline).__name__}, which takes no class_labels")
    return pipeline


def _made_here(source: str, index: dict) -> bool:
    """Whether a pipeline with that model_index.json is one of this project: on a VAE without a codebook, which others'
    may have, nsvq.json tells."""
    name = index["_class_name"]
    name = name if isinstance(name, str) else name[-1]  # the module before it, where that is shipped
    decoder = {"DiTPipeline": "vae", "LDMPipeline": "vqvae", CLASS_NAME[1]: "vae"}.get(name)
    if decoder is None or index[decoder][1] in VQ_MODELS:
        return decoder is not None
    if Path(source).is_dir():
        return (Path(source) / TRAINING_FILE).is_file()
    try:
        return bool(hf_hub_download(source, TRAINING_FILE))
    except EntryNotFoundError:
        return False


def is_ours(pipeline: DiffusionPipeline) -> bool:
    """Whether it takes seeds and more options than stock ones, and decodes apart from sampling."""
    return hasattr(pipeline, "id2label")


def class_names(pipeline: Source) -> list[str]:
    """The classes in the order of their ids 0 to C - 1; of given images, the ids. Raises `UserError` where a pipeline's
    ids have gaps."""
    if isinstance(pipeline, GivenImages):
        return [str(i) for i in range(max(pipeline.labels, default=-1) + 1)]
    if is_ours(pipeline):
        names = pipeline.id2label
    else:  # stock pipelines keep {name: id}, with a name for each synonym
        count = pipeline.transformer.config.num_embeds_ada_norm
        names = {i: str(i) for i in range(count)} | {i: name for name, i in reversed(pipeline.labels.items())}
    if sorted(names) != list(range(len(names))):
        raise UserError(f"the class ids of the pipeline, {sorted(names)}, are not 0 to {len(names) - 1}")
    return [names[i] for i in range(len(names))]


def image_size(pipeline: Source) -> int:
    """Side of the images, in pixels."""
    if isinstance(pipeline, GivenImages):
        return pipeline.size
    side = pipeline.side if isinstance(pipeline, TokenPipeline) else pipeline.transformer.config.sample_size
    widths = pipeline.vae.config.get("encoder_block_out_channels") or pipeline.vae.config.block_out_channels
    return side * 2 ** (len(widths) - 1)


def group_size(device: torch.device, tokens: bool) -> int:
    """How many samples are drawn at once. On a GPU more, where they are made token by token: each step of a transformer
    then has little to do but to start."""
    return 64 if tokens and device.type != "cpu" else 16


def groups(samples: int, rank: int, world_size: int, size: int) -> Iterator[range]:
    """The groups of sample numbers that a rank draws; the last one has `size`, too, beyond `samples`."""
    return (range(start, start + size) for start in range(rank * size, samples, world_size * size))


@torch.no_grad()
def draw(pipeline: Source, how: Sampling, samples: range) -> Tensor:
    """The samples of these numbers as 8-bit images [B, 3, S, S] on the pipeline's device; of given images those that
    there are."""
    if isinstance(pipeline, GivenImages):
        return _resized(pipeline.load(samples), how.resize)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how.precision)
    options: dict[str, Any] = {"guidance_scale": how.guidance_scale}
    options |= how.tokens or {"num_inference_steps": how.steps}
    labels, seeds = [how.label(sample) for sample in samples], [how.seed + sample for sample in samples]
    autocast = torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None)
    if is_ours(pipeline):
        if not how.tokens:
            options |= {"guidance_interval": how.guidance_interval, "guide": how.guide}
        with autocast:
            latents = pipeline(labels, seeds=seeds, output_type="latent", **options).images
        images = pipeline.decode(latents)  # the decoder is float32 in every precision
    else:
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        with autocast, torch.random.fork_rng([pipeline.device] if pipeline.device.type == "cuda" else []):
            torch.manual_seed(seeds[0])  # stock pipelines draw the noise of stochastic samplers from here
            images = pipeline(labels, output_type="pt", **options).images.float()
    return _resized(to_uint8(images * 2 - 1), how.resize)


def _resized(images: Tensor, size: int | None) -> Tensor:
    """8-bit images at another size, by Pillow's bicubic filter, which is antialiased."""
    if size in (None, images.shape[-1]):
        return images
    pixels = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    resized = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous().to(images.device)


class SampleFolder:
    """Samples as PNG files in `folder`, 000000.png and so on. `about`: what made them, as JSON values. Raises
    `UsageError` where the folder holds samples of something else."""

    def __init__(self, folder: Path, about: dict):
        self.folder, path = folder, folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            changed = configs.differences(json.loads(path.read_text()), json.loads(json.dumps(about)))
            if changed:
                what = f"samples of other settings ({'; '.join(changed[:4])})"
                raise UsageError(f"{folder} holds {what}: delete it, or give another --output")
        else:
            with atomic_file(path) as part:
                part.write_text(json.dumps(about, indent=2))

    def load(self, samples: range) -> Tensor | None:
        """These samples uint8 [B, 3, S, S], or None where one of them is absent or damaged."""
        try:
            images = [np.asarray(Image.open(self._path(sample)).convert("RGB")) for sample in samples]
        except (OSError, SyntaxError):
            return None
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def save(self, samples: range, images: Tensor) -> None:
        """Write uint8 images [B, 3, S, S], each in one step."""
        for sample, image in zip(samples, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            with atomic_file(self._path(sample)) as part:
                Image.fromarray(image).save(part, "png", compress_level=1)

    def pack(self, path: Path, count: int, labels: list[int] | None) -> None:
        """Write `count` samples in ADM's format, one in memory at a time: uint8 arr_0 [N, S, S, 3], and arr_1 [N] where
        they have labels."""
        first = np.asarray(Image.open(self._path(0)))
        with atomic_file(path) as part, zipfile.ZipFile(part, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
                npy.write_array_header_1_0(array, header)
                for sample in range(count):
                    array.write(np.asarray(Image.open(self._path(sample))).tobytes())
            if labels is not None:
                with file.open("arr_1.npy", "w") as array:
                    npy.write_array(array, np.array(labels, np.int64))

    def _path(self, sample: int) -> Path:
        return self.folder / f"{sample:06}.png"
