"""Images a second that the training loader reads from each kind of source, and their ratio to class folders.

python benchmarks/data_loading.py [--images 1024] [--size 128] [--workers 0 2] [--rounds 3]

The images are made up: 500 x 375 pixels, as ImageNet's are on average, with noise that makes files as large as those of
photographs. All sources hold the same ones and are measured in turn; of the rounds the best one counts. Opening a
source is not measured.
"""

import argparse
import io
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from nsvq.data import make_shards, shards, synthetic
from nsvq.data.batches import train_batches
from nsvq.data.config import DataConfig


def jpeg(i: int) -> bytes:
    image = synthetic.render("train", i, 64).resize((500, 375), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(i).normal(0, 12, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_sources(folder: Path, images: int, size: int, workers: int) -> dict[str, DataConfig]:
    """The same pictures as class folders, parquet, webdataset shards, and shards of resized ones."""
    encoded = [jpeg(i) for i in range(images)]
    print(f"{images} images of 500 x 375 pixels, {sum(map(len, encoded)) / images / 1000:.0f} kB each", flush=True)
    for i, data in enumerate(encoded):
        path = folder / "folders" / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "parquet").mkdir()
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    rows = {"image": [{"bytes": data, "path": None} for data in encoded], "label": [i % 10 for i in range(images)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet" / "train.parquet")
    (folder / "shards").mkdir()
    for s in range(8):
        with tarfile.open(folder / "shards" / f"train-{s}.tar", "w") as tar:
            for i in range(s, images, 8):
                for field, data in (("jpg", encoded[i]), ("cls", str(i % 10).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    sources = {
        name: DataConfig(source=str(folder / name), image_size=size) for name in ("folders", "parquet", "shards")
    }
    resized = make_shards.ShardConfig(
        output=folder / "resized", data=sources["folders"], workers=workers, shard_images=images // 8
    )
    make_shards.make_shards(resized)
    return sources | {"resized shards": sources["shards"].model_copy(update={"source": str(folder / "resized")})}


def images_per_second(config: DataConfig, images: int, workers: int, batch_size: int = 32) -> float:
    """Of about one pass, measured from the first batch on."""
    batches = train_batches(config, batch_size=batch_size, seed=0, workers=workers)
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["label"]) for batch in islice(batches, images // batch_size))
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=128, help="side of the training crops")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = shards.CACHE = Path(folder) / "cache"
        sources = write_sources(Path(folder), options.images, options.size, max(options.workers))
        for workers in options.workers:
            best = dict.fromkeys(sources, 0.0)
            for _ in range(options.rounds):
                for name, config in sources.items():
                    best[name] = max(best[name], images_per_second(config, options.images, workers))
            for name, rate in best.items():
                print(f"workers {workers}  {name:15} {rate:7.0f} images/s  x {rate / best['folders']:.2f}", flush=True)


if __name__ == "__main__":
    main()
