"""Codes of a data set as plain NumPy, for trainers elsewhere; those here keep a token cache themselves.

accelerate launch tokenizer/write_codes.py --tokenizer DIR --data DATA --output FOLDER [--cache_crops 10]

FOLDER/codes.npy     [N, views, h, w], uint16 for K <= 65,536 and else int32; views as in tokenizer/latents.py
FOLDER/labels.npy    int64 [N] (-1: none)
FOLDER/about.json    the tokenizer's hash, K, classes, views and more
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib import format as npy
from pydantic import Field
from safetensors.torch import load_file

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.run import on_main_process
from nsvq.data.config import DataConfig
from nsvq.data.understood import announce
from nsvq.errors import UsageError
from nsvq.files import atomic_file
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.latents import LatentCache
from nsvq.tokenizer.pretrained import Tokenizer


class EncodeConfig(configs.Config):
    """Encode images into codes, as NumPy arrays."""

    tokenizer: Path = Field(description="Folder or Hub id of a VQModel.")
    data: DataConfig = Field(default_factory=DataConfig, description="The images, in the tokenizer's own size.")
    output: Path = Field(description="Folder of the arrays.")
    split: Literal["train", "test"] = Field("train", description="Split of the data to encode.")
    cache: Path | None = Field(
        None, description="Token cache to take them from, filled if need be; null: <output>/shards, deleted at the end."
    )
    cache_images: int | None = Field(None, ge=1, description="Images to encode; null is all of them.")
    cache_crops: int = Field(1, ge=1, description="Crops of an image to encode: the centre one, then ADM's random.")
    workers: int = Field(4, ge=0, description="Data loading processes per rank.")


def write_codes(config: EncodeConfig, accelerator: Accelerator) -> None:
    """Raises `UsageError` where the arrays are there already, and what `open_cache` raises."""
    if (about := config.output / "about.json").exists():
        raise UsageError(f"--output {config.output} holds codes already: delete it, or give a new name")
    tokenizer = Tokenizer.from_pretrained(config.tokenizer).to(accelerator.device)
    data, shards = config.data, config.cache or config.output / "shards"
    if "image_size" not in data.model_fields_set:
        data = data.model_copy(update={"image_size": tokenizer.image_size or data.image_size})
    announce(data, accelerator)
    cache = open_cache(
        shards,
        tokenizer,
        data,
        accelerator,
        workers=config.workers,
        limit=config.cache_images,
        crops=config.cache_crops,
        kind="codes",
        split=config.split,
    )

    def write() -> None:
        _write_arrays(cache, config.output)
        made = {**cache.manifest["key"], "codebook_size": tokenizer.codebook_size, "classes": cache.classes}
        made |= {"images": len(cache), "bad_images": cache.manifest["bad_images"], "views": cache.views}
        with atomic_file(about) as part:
            part.write_text(json.dumps(made, indent=2))
        if config.cache is None:
            shutil.rmtree(shards)
        print(f"{config.output}: {len(cache)} images x {cache.views} views of {cache.shape} codes")

    on_main_process(accelerator, write)


def _write_arrays(cache: LatentCache, folder: Path) -> None:
    """All images of a cache of codes, in its order: folder/codes.npy [N, views, H, W] and labels.npy int64 [N] (-1:
    none)."""
    header = {"descr": np.dtype(cache.manifest["dtype"]).str, "fortran_order": False}
    with atomic_file(folder / "codes.npy") as part, open(part, "wb") as file:
        npy.write_array_header_1_0(file, header | {"shape": (len(cache), cache.views, *cache.shape)})
        for path in cache.files:
            file.write(load_file(path)["codes"].numpy().tobytes())
    with atomic_file(folder / "labels.npy") as part, open(part, "wb") as file:
        np.save(file, torch.cat([load_file(path)["labels"] for path in cache.files]).numpy())


def main() -> None:
    config = configs.parse(EncodeConfig, sys.argv[1:])
    write_codes(config, Accelerator(kwargs_handlers=[launch.LONG_WAIT]))


if __name__ == "__main__":
    launch.run(main)
