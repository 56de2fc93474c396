"""Make the frozen codebook of VQGAN-LC (arXiv 2406.11837): k-means of a vision encoder's pooled patch features.

CLIP ViT-L/14, all features together; the paper's, K / classes codes for each class; any encoder of transformers;
your own features [N, D]:
python tokenizer/make_codebook.py --codes 65536 --output features/clip-65536.safetensors
python tokenizer/make_codebook.py --codes 100000 --per_class true --output features/clip-100000.safetensors
python tokenizer/make_codebook.py --codes 1024 --data DATA --encoder FOLDER --output FILE
python tokenizer/make_codebook.py --codes 1024 --data DATA --encoder FILE.py --layer NAME --output FILE
python tokenizer/make_codebook.py --codes 1024 --features features.safetensors --output FILE

The same command goes on where it stopped: features are kept in <output>.parts/ in shards, with the centroids so far.
Features are the last layer's patch tokens, for CLIP after its final norm and projection, averaged over 4 x 4 patches.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.metrics import warn
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError
from nsvq.files import atomic_file
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.quantizers.lc import load_features
from nsvq.tokenizer.teachers import Registered, load_vision_model

SHARD_IMAGES = 4096
BATCH_IMAGES = 64


class CodebookConfig(configs.Config):
    """Cluster a vision encoder's features into the codes of VQGAN-LC."""

    data: DataConfig = Field(DataConfig(image_size=224), description="The images; image_size is the encoder's.")
    encoder: str = Field(
        "openai/clip-vit-large-patch14",
        description="A vision model of transformers (id or folder), or a Python file that registers a network.",
    )
    layer: str | None = Field(None, description="Of a Python file's network: the part that gives patch features.")
    features: Path | None = Field(None, description="A safetensors file with features [N, D] in place of an encoder.")
    codes: int = Field(100_000, ge=2, description="K.")
    per_class: bool = Field(False, description="Cluster each class on its own, into K / classes codes.")
    pool: int = Field(4, ge=1, description="Side of the square of patches that is averaged.")
    images: int | None = Field(None, ge=1, description="Training images to encode; null is all of them.")
    iterations: int = Field(100, ge=1, description="Most iterations of k-means.")
    seed: int = Field(0, ge=0, description="Seed of the start of k-means.")
    workers: int = Field(4, ge=0, description="Data loading processes.")
    output: Path = Field(description="The codebook, a .safetensors file for quantizer.features.")

    @model_validator(mode="after")
    def _fits(self) -> "CodebookConfig":
        if self.encoder.endswith(".py") != (self.layer is not None):
            raise ValueError("layer is needed for a Python file (.py), and has no meaning for a model of transformers")
        return self


def load_encoder(name: str, layer: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, S, S] in [-1, 1] -> patch features [B, D, h, w], of a Python file's network what its part `layer`
    gives. Raises `UserError` for an unknown one."""
    advice = "give --encoder FOLDER, or your own features with --features FILE"
    model = load_vision_model(name, advice) if layer is None else Registered(name, layer=layer)
    return torch.no_grad()(model.to(device).forward)


def encode_images(config: CodebookConfig, parts: Path, device: torch.device) -> None:
    """Write what is missing of <parts>/shard-*.safetensors: features float16 [n, D], labels int64 [n]. Raises
    `UserError` where too many images do not decode."""
    if (parts / "encoded").exists():
        return
    encode = load_encoder(config.encoder, config.layer, device)
    how = {"batch_size": BATCH_IMAGES, "workers": config.workers, "limit": config.images}
    batches = eval_batches(config.data, "train", **how)
    bad = BadImages(config.data.max_bad_fraction)
    progress = tqdm(desc="encode", unit="img", mininterval=0.5 if sys.stderr.isatty() else 30)
    for number in itertools.count():
        path = parts / f"shard-{number:06d}.safetensors"
        images = itertools.islice(batches, SHARD_IMAGES // BATCH_IMAGES)
        features, labels = [], []
        for batch in images:
            progress.update(len(batch["image"]))
            bad.update(batch)
            bad.check()
            if path.exists() or not len(batch["image"]):
                labels.append(batch["label"])  # read again, but not encoded again
                continue
            pooled = F.avg_pool2d(encode(batch["image"].to(device)), config.pool)  # (B, D, h, w)
            features.append(pooled.permute(0, 2, 3, 1).flatten(0, 2).half().cpu())
            labels.append(batch["label"].repeat_interleave(pooled[0, 0].numel()))
        if features:
            _write(path, {"features": torch.cat(features), "labels": torch.cat(labels)})
        if not labels:
            break
    if count := bad.check(final=True):
        warn(f"{count} images do not decode, such as {', '.join(bad.bad[:3])}: the codebook is made without them")
    (parts / "encoded").touch()


def read_parts(parts: Path, label: int | None = None) -> Iterator[Tensor]:
    """Features [n, D] shard by shard, of one class where `label` is given."""
    for path in sorted(parts.glob("shard-*.safetensors")):
        shard = load_file(path)
        yield shard["features"] if label is None else shard["features"][shard["labels"] == label]


def cluster(
    batches: Callable[[], Iterator[Tensor]], codes: int, config: CodebookConfig, state: Path, device: torch.device
) -> Tensor:
    """k-means on `device` that writes its centroids to `state` after each iteration, and goes on from there."""
    saved = load_file(state, str(device)) if state.exists() else {}  # k-means runs where its start is
    done = int(saved.get("iterations", 0))

    def keep(centroids: Tensor) -> None:
        nonlocal done
        done += 1
        _write(state, {"centroids": centroids.contiguous(), "iterations": torch.tensor(done)})

    try:
        points = lambda: (part.float() for part in batches() if len(part))  # noqa: E731
        how = {"seed": config.seed, "start": saved.get("centroids"), "iterations": config.iterations - done}
        return kmeans(points, codes, on_iteration=keep, **how)
    except ValueError as error:
        raise UserError(f"{error}; give more --images or fewer --codes") from None


def make(config: CodebookConfig, parts: Path, device: torch.device) -> Tensor:
    """The codebook [K, D]."""
    if config.features is not None:
        points = load_features(config.features).to(device)
        return cluster(lambda: iter(points.split(2**18)), config.codes, config, parts / "centroids.safetensors", device)
    encode_images(config, parts, device)
    if not config.per_class:
        batches = lambda: (points.to(device) for points in read_parts(parts))  # noqa: E731
        return cluster(batches, config.codes, config, parts / "centroids.safetensors", device)
    classes = len(open_split(config.data, "train").classes)
    if not classes or config.codes % classes:
        raise UsageError(f"--per_class needs --codes that {classes} classes divide, not {config.codes}")
    found = []
    for label in tqdm(range(classes), "classes"):
        points = torch.cat(list(read_parts(parts, label))).to(device)
        state = parts / f"centroids-{label:06d}.safetensors"
        found.append(cluster(partial(iter, [points]), config.codes // classes, config, state, device))
    return torch.cat(found)


def main() -> None:
    config = configs.parse(CodebookConfig, sys.argv[1:])
    if config.output.suffix != ".safetensors":
        raise UsageError(f"--output {config.output}: give the name of a .safetensors file")
    if config.features is not None and config.per_class:
        raise UsageError("--per_class needs images with classes; --features has none")
    parts = config.output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    wanted = configs.to_dict(config) | {"output": None, "workers": None}
    wanted["data"] = wanted["data"] | {"max_bad_fraction": None}  # it decides when it ends, not what comes out
    key = parts / "config.json"
    if key.exists() and (changed := configs.differences(json.loads(key.read_text()), wanted)):
        what = f"was begun with other options ({'; '.join(changed)})"
        raise UserError(f"{parts} {what}: delete it, or give another --output")
    key.write_text(json.dumps(wanted))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _write(config.output, {"features": make(config, parts, device).cpu()})
    shutil.rmtree(parts)
    print(f"{config.codes} codes: {config.output}")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as part:
        save_file(tensors, part)


if __name__ == "__main__":
    launch.run(main)
