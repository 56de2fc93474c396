"""Turn a data set into webdataset shards of images that are resized once, for training that decodes less.

python data/make_shards.py --data SOURCE --data.image_size 256 --output DIR [--workers 16]
accelerate launch tokenizer/train.py --data DIR --data.class_names DIR/classes.txt

DIR/{train,test}-*.tar   an image and its class a sample, in shuffled order; training images are resized (short side =
                         image_size, or with --random_crops what ADM's random crops of a generator's cache_crops need,
                         a quarter more), test images are cropped as evaluation crops them
DIR/classes.txt          class names in label order, where the data has classes
DIR/bad-images.txt       the images that did not decode
DIR/manifest.json        what the shards were made of

The same command goes on after an interruption: shards that are complete stay.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from torch.utils.data import Dataset
from tqdm import tqdm

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.config import Config
from nsvq.data.bad_images import BadImages
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, center_crop, random_crop_source, resize_short_side
from nsvq.data.loading import batches_of, make_loader
from nsvq.data.sources import Split, open_split
from nsvq.errors import UserError
from nsvq.files import atomic_file

_LOADED_AT_ONCE = 16


class ShardConfig(Config):
    """Write a data set as shards of resized images."""

    output: Path = Field(description="Folder of the shards.")
    data: DataConfig = Field(default_factory=DataConfig)
    format: Literal["jpg", "png"] = Field("jpg", description="Of the resized images; png keeps every value.")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality; colours keep their full resolution.")
    random_crops: bool = Field(
        False, description="Keep training images large enough for ADM's random crops: short side image_size / 0.8."
    )
    shard_images: int = Field(1_000, ge=1, description="Images in a shard.")
    workers: int = Field(4, ge=0, description="Decoding processes.")


def make_shards(config: ShardConfig) -> dict[str, int]:
    """Write what is missing; returns the numbers of "train", "test" and "bad" images. Raises `UserError` where the
    folder holds shards of something else, the disk is full, or too many images are bad."""
    splits = {name: open_split(config.data, name) for name in ("train", "test")}
    about = {"data": {name: split.fingerprint for name, split in splits.items()}, "image_size": config.data.image_size}
    about |= config.model_dump(include={"format", "quality", "random_crops", "shard_images"}) | {"subsampling": 0}
    size = config.data.image_size
    short = random_crop_source(size) if config.random_crops else size
    resize = {"train": partial(resize_short_side, size=short), "test": partial(center_crop, size=size)}
    bad, counts = BadImages(config.data.max_bad_fraction), dict.fromkeys(splits, 0)
    try:
        manifest = config.output / "manifest.json"
        before = json.loads(manifest.read_text()) if manifest.exists() else about
        if changed := configs.differences(before, about):
            other = f"{config.output} holds other shards ({'; '.join(changed[:3])})"
            raise UserError(f"{other}: delete it, or give another --output")
        _write(manifest, json.dumps(about, indent=2))
        for name, split in splits.items():
            order = np.random.default_rng(0).permutation(len(split))
            parts = np.split(order, range(config.shard_images, len(order), config.shard_images))
            for i, part in enumerate(tqdm(parts, desc=name, unit="shard")):
                shard = f"{name}-{i:06d}.tar"
                done = config.output / f".{shard}.json"
                if not done.exists():
                    _write(done, json.dumps(_write_shard(config.output / shard, split, part, resize[name], config)))
                found = json.loads(done.read_text())
                counts[name] += found["images"]
                bad.update({"label": [None] * found["images"], "bad": found["bad"]})
                bad.check()
        for file, lines in {"classes.txt": splits["train"].classes, "bad-images.txt": bad.bad}.items():
            if lines or file == "bad-images.txt":
                _write(config.output / file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UserError(f"cannot write to {config.output} ({error}); the same command goes on from here") from None
    return counts | {"bad": bad.check(final=True)}


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as part:
        part.write_text(text)


def _write_shard(path: Path, split: Split, order: np.ndarray, resize: Callable, config: ShardConfig) -> dict:
    """How many images it holds, and the ids of those that did not decode. The file takes its name when it is whole."""
    bad, images = [], 0
    encoded = _Encoded(split, resize, config)
    loader = make_loader(encoded, config.workers, sampler=order.tolist(), batch_size=_LOADED_AT_ONCE, collate_fn=list)
    prefix = hashlib.sha256(path.name.encode()).hexdigest()[:6]  # keys differ between shards
    with atomic_file(path) as part, tarfile.open(part, "w") as tar:
        for batch in batches_of(loader):
            for id, image, label in batch:
                if image is None:
                    bad.append(id)
                    continue
                fields = {config.format: image} | ({"cls": str(label).encode()} if split.classes else {})
                for field, data in fields.items():
                    member = tarfile.TarInfo(f"{prefix}{images:06d}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                images += 1
    return {"images": images, "bad": bad}


@dataclass
class _Encoded(Dataset):
    """index -> (id, encoded image or None, label)."""

    split: Split
    resize: Callable
    config: ShardConfig

    def __getitem__(self, index: int) -> tuple[str, bytes | None, int]:
        try:
            image, label = self.split.load(index)
        except BadImage as error:
            return error.id, None, -1
        buffer = io.BytesIO()
        kind = "JPEG" if self.config.format == "jpg" else "PNG"
        self.resize(image).save(buffer, kind, quality=self.config.quality, subsampling=0)
        return self.split.id(index), buffer.getvalue(), label


def main() -> None:
    config = configs.parse(ShardConfig, sys.argv[1:])
    counts = make_shards(config)
    print(f"{config.output}: {counts['train']} training and {counts['test']} test images, {counts['bad']} bad ones")


if __name__ == "__main__":
    launch.run(main)
