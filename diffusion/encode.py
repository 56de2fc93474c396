"""Fill the latent cache: every training image through the frozen tokenizer once, over all ranks, in shards.

A start after an interruption keeps the shards that are complete.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data import BadImage, DataConfig, Images, Stream, eval_batches, open_split
from common.errors import UsageError, UserError
from common.images import center_crop, to_tensor
from common.loading import batches_of, make_loader
from diffusion.latents import LatentCache
from tokenizer import Tokenizer

SHARD_IMAGES = 2048  # 256 MiB at 16 x 16 x 128
BATCH_IMAGES = 32
_FORMAT = 1
_KEY_NAMES = {
    "tokenizer": "another tokenizer",
    "data": "other data",
    "image_size": "another image size",
    "flips": "another data.flip",
    "limit": "another cache_images",
    "format": "another version of this program",
}


def open_cache(
    folder: Path,
    tokenizer: Tokenizer,
    data: DataConfig,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    limit: int | None = None,
) -> LatentCache:
    """The cache at `folder`, encoded first as far as it is not complete. Called on all ranks, which share the work.

    Images are cropped by ADM's centre crop. `limit` takes that many of the training split, spread at random, instead of
    all. Raises `UserError` where `folder` holds latents of another tokenizer, data, size or limit, where the disk is
    too small, and where too many images are bad; `UsageError` where the image size is no multiple of the tokenizer's f.
    """
    folder = Path(folder)
    if data.image_size % tokenizer.downsampling:
        raise UsageError(f"data.image_size = {data.image_size} must be a multiple of the tokenizer's f = "
                         f"{tokenizer.downsampling}")  # fmt: skip
    with accelerator.main_process_first():
        images = open_split(data, "train")
    key = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "data": images.fingerprint,
        "image_size": data.image_size,
        "flips": 2 if data.flip else 1,
        "limit": limit,
    }
    _refuse_stale(folder, key)
    accelerator.wait_for_everyone()
    if not (folder / "manifest.json").exists():
        _encode(folder, tokenizer, data, images, accelerator, key, workers)
    return LatentCache(folder)


def _refuse_stale(folder: Path, key: dict) -> None:
    if (folder / "manifest.json").exists():
        found = [json.loads((folder / "manifest.json").read_text())["key"]]
    else:
        found = [json.loads(_metadata(path)["key"]) for path in folder.glob("shard-*.safetensors")]
    for other in found:
        if what := [text for name, text in _KEY_NAMES.items() if other.get(name) != key[name]]:
            raise UserError(f"{folder} holds latents of {', '.join(what)}: delete that folder, or give another --cache")


def _encode(folder: Path, tokenizer: Tokenizer, data: DataConfig, images: Images | Stream, accelerator: Accelerator,
            key: dict, workers: int) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    side = data.image_size // tokenizer.downsampling
    shape = (key["flips"], tokenizer.codebook.shape[1], side, side)
    jobs = _stream_jobs if isinstance(images, Stream) else _image_jobs
    count, shards = jobs(folder, data, images, accelerator, key["limit"], workers)
    if accelerator.is_main_process:
        _announce(folder, shape, count)
    accelerator.wait_for_everyone()

    bad: list[str] = []
    interval = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(
        desc="latents", unit="img", disable=not accelerator.is_main_process, mininterval=interval, maxinterval=60
    )
    for name, batches in shards:
        bad += _write_shard(folder / name, tokenizer, batches, shape, key, bar, accelerator.device)
        if count is not None and len(bad) > data.max_bad_fraction * count:  # can't come right any more
            raise _too_many_bad(len(bad), count, data, bad)
    bar.close()
    accelerator.wait_for_everyone()
    manifest = _manifest(folder, shape, key, images.classes)
    if manifest["bad_images"] > data.max_bad_fraction * (manifest["count"] + manifest["bad_images"]):
        raise _too_many_bad(manifest["bad_images"], manifest["count"] + manifest["bad_images"], data, bad)
    if accelerator.is_main_process:
        temporary = folder / ".manifest.json.part"
        temporary.write_text(json.dumps(manifest, indent=2))
        temporary.replace(folder / "manifest.json")
    accelerator.wait_for_everyone()


def _too_many_bad(count: int, total: int, data: DataConfig, names: list[str]) -> UserError:
    such = f", such as {', '.join(names[:3])}" if names else ""
    return UserError(f"{count} of {total} images of {data.source} do not decode{such}: more than "
                     f"data.max_bad_fraction = {data.max_bad_fraction}")  # fmt: skip


def _announce(folder: Path, shape: tuple[int, ...], count: int | None) -> None:
    """Say what the cache takes. Raises `UserError` where the disk has less."""
    each = 2 * int(np.prod(shape))
    if count is None:
        print(f"latent cache {folder}: {each / 2**10:.0f} KiB an image; the stream's length is not known", flush=True)
        return
    done = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    needed, free = count * each - done, shutil.disk_usage(folder).free
    print(f"latent cache {folder}: {count} images x {shape[0]} flips, {count * each / 2**30:.2f} GiB", flush=True)
    if needed > free:
        raise UserError(f"{folder} needs {needed / 2**30:.1f} GiB more for latents, and its disk has "
                        f"{free / 2**30:.1f} GiB free: give a --cache on a larger one, or fewer --cache_images"
                        )  # fmt: skip


# Which shards there are to write, as (file name, batches); batches are those of common/data.py


def _image_jobs(folder, data, images, accelerator, limit, workers) -> tuple[int, Iterator]:
    """How many images there are in all, and this rank's part of the missing shards."""
    order = np.arange(len(images))
    if limit is not None and limit < len(order):
        order = np.sort(np.random.default_rng(0).permutation(len(order))[:limit])
    parts = np.split(order, range(SHARD_IMAGES, len(order), SHARD_IMAGES))
    names = [f"shard-{i:06d}-of-{len(parts):06d}.safetensors" for i in range(len(parts))]
    missing = [i for i, name in enumerate(names) if not (folder / name).exists()]
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def jobs():
        for i in mine:
            rows = [parts[i][k : k + BATCH_IMAGES] for k in range(0, len(parts[i]), BATCH_IMAGES)]
            crops = _Crops(images, data.image_size)
            yield names[i], batches_of(make_loader(crops, workers, batch_sampler=rows, collate_fn=_collate))

    return len(order), jobs()


class _Crops(Dataset):
    """index -> (ADM centre crop, label), or the name of a bad image."""

    def __init__(self, images: Images, size: int):
        self.images, self.size = images, size

    def __getitem__(self, index: int):
        try:
            image, label = self.images.load(int(index))
        except BadImage as error:
            return error.id
        return center_crop(image, self.size), label


def _collate(items: list) -> dict:
    good = [item for item in items if not isinstance(item, str)]
    return {
        "image": to_tensor([image for image, _ in good]) if good else None,
        "label": torch.tensor([label for _, label in good], dtype=torch.int64),
        "bad": [item for item in items if isinstance(item, str)],
    }


def _stream_jobs(folder, data, images, accelerator, limit, workers) -> tuple[int | None, Iterator]:
    """The same for a stream, whose shards belong to one number of ranks and workers; what complete shards hold is read
    once more, but not encoded."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    layout = f"shard-{ranks}-{max(workers, 1)}"
    if accelerator.is_main_process:
        for path in set(folder.glob("shard-*.safetensors")) - set(folder.glob(f"{layout}-*.safetensors")):
            path.unlink()  # another layout's: these images would be there twice

    def jobs():
        batches = eval_batches(
            data, "train", batch_size=BATCH_IMAGES, rank=rank, world_size=ranks, workers=workers, limit=limit
        )
        for i in itertools.count():
            part = itertools.islice(batches, SHARD_IMAGES // BATCH_IMAGES)
            first = next(part, None)
            if first is None:
                return
            name = f"{layout}-{rank:04d}-{i:06d}.safetensors"
            if not (folder / name).exists():
                yield name, itertools.chain([first], part)
            for _ in part:
                pass

    return limit, jobs()


def _write_shard(path: Path, tokenizer: Tokenizer, batches: Iterable[dict], shape: tuple[int, ...], key: dict,
                 bar: tqdm, device: torch.device) -> list[str]:  # fmt: skip
    """Encode one shard, whose file takes its name when it is complete; returns the names of bad images."""
    latents, labels, bad = [], [], []
    sums, squares = torch.zeros(2, shape[1], dtype=torch.float64)
    for batch in batches:
        bad += batch["bad"]
        if not len(batch["label"]):
            continue
        image = batch["image"].to(device)
        views = [image, image.flip(-1)][: shape[0]]
        z = torch.stack([tokenizer.latents(view).float().cpu() for view in views], dim=1)  # (B, flips, C, H, W)
        if not z.half().isfinite().all():
            raise UserError("the tokenizer's latents of some images do not fit into float16, or are not numbers")
        sums += z.double().sum((0, 1, 3, 4))
        squares += z.double().square().sum((0, 1, 3, 4))
        latents.append(z.half())
        labels.append(batch["label"])
        bar.update(len(z))
    tensors = {
        "latents": torch.cat(latents) if latents else torch.zeros(0, *shape, dtype=torch.float16),
        "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
        "sums": sums.clone(),
        "squares": squares.clone(),
    }
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, temporary, metadata={"key": json.dumps(key), "bad": str(len(bad))})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the next start goes on from the shards there are") from None
    return bad


def _manifest(folder: Path, shape: tuple[int, ...], key: dict, classes: list[str]) -> dict:
    """What all shards hold together."""
    shards, bad = [], 0
    sums, squares = torch.zeros(2, shape[1], dtype=torch.float64)
    for path in sorted(folder.glob("shard-*.safetensors")):
        bad += int(_metadata(path)["bad"])
        with safe_open(path, "pt") as file:
            count = file.get_slice("labels").get_shape()[0]
            sums, squares = sums + file.get_tensor("sums"), squares + file.get_tensor("squares")
        if count:
            shards.append({"file": path.name, "count": count})
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise UserError(f"{folder}: no image of the training split decodes")
    per_channel = count * shape[0] * shape[2] * shape[3]
    mean, square = sums / per_channel, squares / per_channel
    return {
        "key": key,
        "count": count,
        "bad_images": bad,
        "shape": shape,
        "dtype": "float16",
        "mean": mean.tolist(),
        "std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
        "overall_std": (square.mean() - mean.mean().square()).clamp(min=0).sqrt().item(),
        "classes": classes,
        "shards": shards,
    }


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and start again") from None
