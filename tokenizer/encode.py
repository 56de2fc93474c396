"""Fill the token cache, with latents or codes: every training image through the frozen tokenizer once, over all ranks,
in shards. A start after an interruption keeps the shards that are complete.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from nsvq.data.batches import batches_in_order
from nsvq.data.config import DataConfig
from nsvq.data.sources import Split, open_split
from nsvq.errors import UsageError, UserError
from nsvq.files import atomic_file
from nsvq.tokenizer.latents import LatentCache, shard_hash, tensor_name
from nsvq.tokenizer.pretrained import Tokenizer

SHARD_IMAGES = 2048  # 256 MiB at 16 x 16 x 128
BATCH_IMAGES = 32
_CODES_CHECKED = 1024
_FORMAT = 2
_KEY_NAMES = {
    "tokenizer": "another tokenizer",
    "data": "other data",
    "image_size": "another image size",
    "flips": "another data.flip",
    "limit": "another cache_images",
    "crops": "another cache_crops",
    "latents": "another setting of latents",
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
    crops: int = 1,
    kind: Literal["continuous", "quantized", "codes"] = "continuous",
    verify: bool = False,
) -> LatentCache:
    """The cache at `folder`, encoded first as far as it is not complete. Called on all ranks, which share the work.

    Of each image it holds ADM's centre crop and `crops` - 1 of ADM's random crops, and of each crop, with `data.flip`,
    the mirror image. `kind` says what of it: its latents, these quantized, or the indices of their codes. `limit` takes
    that many images of the training split, spread at random, instead of all. `verify` compares the shards of a complete
    cache with their checksums.

    Raises `UserError` where `folder` holds tokens of another tokenizer, data, size or kind, where the disk is too
    small, where too many images are bad, and where a shard is damaged; `UsageError` where the image size is no multiple
    of the tokenizer's f, and where `quantized` latents would not decode to their own codes.
    """
    folder = Path(folder)
    if data.image_size % tokenizer.downsampling:
        raise UsageError(
            f"data.image_size = {data.image_size} must be a multiple of the tokenizer's f = {tokenizer.downsampling}"
        )
    if kind == "quantized":
        _check_codes(tokenizer)
    with accelerator.main_process_first():
        images = open_split(data, "train")
    key = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "data": images.fingerprint,
        "image_size": data.image_size,
        "flips": 2 if data.flip else 1,
        "limit": limit,
        "crops": crops,
        "latents": kind,
    }
    _refuse_stale(folder, key)
    accelerator.wait_for_everyone()
    if not (folder / "manifest.json").exists():
        _encode(folder, tokenizer, data, images, accelerator, key, workers)
        return LatentCache(folder)
    cache = LatentCache(folder)
    if verify:
        damaged = gather_object(cache.damaged(accelerator.process_index, accelerator.num_processes))
        if damaged:
            raise UserError(
                f"{folder}: {', '.join(damaged[:3])} not what was written: delete manifest.json and these "
                "shards, and start again"
            )
    return cache


def _check_codes(tokenizer: Tokenizer) -> None:
    """Raises `UsageError` where the decoder, which quantizes, would see a code as another one."""
    codes = tokenizer.codebook[:_CODES_CHECKED]
    again = tokenizer.codebook[tokenizer.quantize(codes.T[None, :, None])[0, 0]]
    # Clones that replacement left may stand for each other: a distance of nearly zero is not exact in float32.
    if not torch.allclose(again, codes, rtol=0, atol=1e-2 * float(codes.std())):
        raise UsageError(
            "latents: quantized needs a tokenizer whose codes are their own nearest codes, and this one "
            "compares latents elsewhere: use latents: continuous"
        )


def _refuse_stale(folder: Path, key: dict) -> None:
    if (folder / "manifest.json").exists():
        found = [json.loads((folder / "manifest.json").read_text())["key"]]
    else:
        found = [json.loads(_metadata(path)["key"]) for path in folder.glob("shard-*.safetensors")]
    for other in found:
        if what := [text for name, text in _KEY_NAMES.items() if other.get(name) != key[name]]:
            held = f"{folder} holds {tensor_name(other)} of {', '.join(what)}"
            raise UserError(f"{held}: delete that folder, or give another --cache")


def _encode(
    folder: Path,
    tokenizer: Tokenizer,
    data: DataConfig,
    images: Split,
    accelerator: Accelerator,
    key: dict,
    workers: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    side = data.image_size // tokenizer.downsampling
    views, channels = key["crops"] * key["flips"], tokenizer.codebook.shape[1]
    shape = (views, side, side) if key["latents"] == "codes" else (views, channels, side, side)
    dtype = _dtype(tokenizer, key)
    count, shards = _image_jobs(folder, data, images, accelerator, key, workers)
    if accelerator.is_main_process:
        _announce(folder, dtype.itemsize * math.prod(shape), key, count)
    accelerator.wait_for_everyone()

    bad: list[str] = []
    interval = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(desc="tokens", unit="img", disable=not accelerator.is_main_process, mininterval=interval, maxinterval=60)
    for name, batches in shards:
        bad += _write_shard(folder / name, tokenizer, batches, shape, dtype, key, bar, accelerator.device)
        if len(bad) > data.max_bad_fraction * count:  # can't come right any more
            raise _too_many_bad(len(bad), count, data, bad)
    bar.close()
    accelerator.wait_for_everyone()
    manifest = _manifest(folder, shape, dtype, key, images.classes)
    if manifest["bad_images"] > data.max_bad_fraction * (manifest["count"] + manifest["bad_images"]):
        raise _too_many_bad(manifest["bad_images"], manifest["count"] + manifest["bad_images"], data, bad)
    if accelerator.is_main_process:
        with atomic_file(folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest, indent=2))
    accelerator.wait_for_everyone()


def _too_many_bad(count: int, total: int, data: DataConfig, names: list[str]) -> UserError:
    such = f", such as {', '.join(names[:3])}" if names else ""
    return UserError(
        f"{count} of {total} images of {data.source} do not decode{such}: more than "
        f"data.max_bad_fraction = {data.max_bad_fraction}"
    )


def _dtype(tokenizer: Tokenizer, key: dict) -> torch.dtype:
    """The smallest type that holds the tokens."""
    if key["latents"] != "codes":
        return torch.float16
    return torch.uint16 if tokenizer.codebook_size <= 2**16 else torch.int32


def _announce(folder: Path, each: int, key: dict, count: int) -> None:
    """Say what the cache takes, `each` bytes an image. Raises `UserError` where the disk has less."""
    views = f"{key['crops']} crops x {key['flips']} flips" if key["crops"] > 1 else f"{key['flips']} flips"
    done = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    needed, free = count * each - done, shutil.disk_usage(folder).free
    print(f"token cache {folder}: {count} images x {views}, {count * each / 2**30:.2f} GiB", flush=True)
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**30:.1f} GiB more for tokens, and its disk has "
            f"{free / 2**30:.1f} GiB free: give a --cache on a larger one, or fewer --cache_images"
        )


# Which shards there are to write, as (file name, batches); batches are those of data/batches.py


def _image_jobs(folder, data, images, accelerator, key, workers) -> tuple[int, Iterator]:
    """How many images there are in all, and this rank's part of the missing shards."""
    order, limit = np.arange(len(images)), key["limit"]
    if limit is not None and limit < len(order):
        order = np.sort(np.random.default_rng(0).permutation(len(order))[:limit])
    parts = np.split(order, range(SHARD_IMAGES, len(order), SHARD_IMAGES))
    names = [f"shard-{i:06d}-of-{len(parts):06d}.safetensors" for i in range(len(parts))]
    missing = [i for i, name in enumerate(names) if not (folder / name).exists()]
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    def jobs():
        for i in mine:
            how = {"batch_size": BATCH_IMAGES, "workers": workers, "crops": key["crops"]}
            yield names[i], batches_in_order(images, parts[i], data.image_size, **how)

    return len(order), jobs()


def _write_shard(
    path: Path,
    tokenizer: Tokenizer,
    batches: Iterable[dict],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    key: dict,
    bar: tqdm,
    device: torch.device,
) -> list[str]:
    """Encode one shard, whose file takes its name when it is complete; returns the names of bad images."""
    name, tokens, labels, bad = tensor_name(key), [torch.zeros(0, *shape, dtype=dtype)], [], []
    sums, squares = torch.zeros(2, shape[1], dtype=torch.float64)
    for batch in batches:
        bad += batch["bad"]
        if not len(batch["label"]):
            continue
        crops = batch["image"].to(device)  # (B crops, 3, S, S)
        views = [crops, crops.flip(-1)][: key["flips"]]
        z = torch.stack([_tokens(tokenizer, view, key).cpu() for view in views], dim=1)
        z = z.reshape(len(batch["label"]), *shape)  # (B, crops flips, C, H, W), of codes without C
        tokens.append(z.to(dtype))
        if name == "latents":
            if not tokens[-1].isfinite().all():
                raise UserError("the tokenizer's latents of some images do not fit into float16, or are not numbers")
            sums += z.double().sum((0, 1, 3, 4))
            squares += z.double().square().sum((0, 1, 3, 4))
        labels.append(batch["label"])
        bar.update(len(z))
    tensors = {
        name: torch.cat(tokens),
        "labels": torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64),
    }
    if name == "latents":
        tensors |= {"sums": sums.clone(), "squares": squares.clone()}
    about = {"key": json.dumps(key), "bad": str(len(bad)), "sha256": shard_hash(tensors)}
    try:
        with atomic_file(path) as part:
            save_file(tensors, part, metadata=about)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise UserError(f"cannot write {path} ({error}); the next start goes on from the shards there are") from None
    return bad


def _tokens(tokenizer: Tokenizer, images: torch.Tensor, key: dict) -> torch.Tensor:
    """As the generator is to see them."""
    if key["latents"] == "codes":
        return tokenizer.encode(images)
    z = tokenizer.latents(images)
    if key["latents"] == "continuous":
        return z.float()
    scale = tokenizer.model.config.scaling_factor
    return tokenizer.codebook[tokenizer.quantize(z / scale)].permute(0, 3, 1, 2) * scale  # (B, d, h, w)


def _manifest(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, key: dict, classes: list[str]) -> dict:
    """What all shards hold together."""
    shards, bad = [], 0
    sums, squares = torch.zeros(2, shape[1], dtype=torch.float64)
    for path in sorted(folder.glob("shard-*.safetensors")):
        about = _metadata(path)
        bad += int(about["bad"])
        with safe_open(path, "pt") as file:
            count = file.get_slice("labels").get_shape()[0]
            if tensor_name(key) == "latents":
                sums, squares = sums + file.get_tensor("sums"), squares + file.get_tensor("squares")
        if count:
            shards.append({"file": path.name, "count": count, "bytes": path.stat().st_size, "sha256": about["sha256"]})
    count = sum(shard["count"] for shard in shards)
    if not count:
        raise UserError(f"{folder}: no image of the training split decodes")
    manifest = {
        "key": key,
        "count": count,
        "bad_images": bad,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "classes": classes,
        "shards": shards,
    }
    if tensor_name(key) == "codes":
        return manifest
    per_channel = count * shape[0] * shape[2] * shape[3]
    mean, square = sums / per_channel, squares / per_channel
    return manifest | {
        "mean": mean.tolist(),
        "std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
        "overall_std": (square.mean() - mean.mean().square()).clamp(min=0).sqrt().item(),
    }


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and start again") from None
