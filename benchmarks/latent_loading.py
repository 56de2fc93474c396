"""Samples a second that training reads from a latent cache, beside what DiTs on a GPU take.

python benchmarks/latent_loading.py [--latents 128 16 16] [--images 4096] [--workers 0 2] [--batch 64] [--rounds 3]

The cache is made up, and in the page cache once it is written. A batch holds the stored latents and each sample's own
noise, which costs more than the reading; of the rounds the best one counts. What a GPU takes are three times the FLOPs
of a forward pass, as torch counts them, at 40 % of an H100's dense bf16 peak on the data sheet, a share that well-tuned
training reaches.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from nsvq.diffusion.model import SIZES, DiTConfig, make_model
from nsvq.tokenizer.latents import LatentCache, train_batches

SHARD = 1024
FLOPS = 0.4 * 989e12


def write_cache(folder: Path, shape: tuple[int, int, int], images: int) -> LatentCache:
    """Of random latents, with one view of each image."""
    shards = []
    for start in range(0, images, SHARD):
        name, count = f"shard-{start:06d}.safetensors", min(SHARD, images - start)
        rows = torch.randn(count, 1, *shape).half()
        save_file({"latents": rows, "labels": torch.arange(count) % 10}, folder / name)
        shards.append({"file": name, "count": count, "bytes": (folder / name).stat().st_size, "sha256": ""})
    statistics = {"mean": [0.0] * shape[0], "std": [1.0] * shape[0], "overall_std": 1.0}
    classes = [str(i) for i in range(10)]
    manifest = {"key": {}, "classes": classes, "shape": (1, *shape), "shards": shards, **statistics}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return LatentCache(folder)


def samples_per_second(
    cache: LatentCache, workers: int, batch_size: int, clock: Callable[[], float], batches: int = 32
) -> float:
    """From the first batches on, which start the loading processes."""
    loaded = train_batches(cache, batch_size=batch_size, seed=0, workers=workers)
    for _ in islice(loaded, 2 * workers + 1):
        pass
    start = clock()
    for _ in islice(loaded, batches):
        pass
    return batches * batch_size / (clock() - start)


def taken_per_second(size: str, shape: tuple[int, int, int]) -> float:
    """Samples that a GPU trains a DiT of this size on in a second."""
    counts = []
    for depth in (1, 2):
        model = make_model(DiTConfig(size=size, depth=depth), shape, 1000)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        counts.append(counter.get_total_flops())
    depth = DiTConfig(size=size).dimensions()[0]
    return FLOPS / (3 * (counts[0] + (depth - 1) * (counts[1] - counts[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, nargs=3, default=[128, 16, 16], help="C H W")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = tuple(options.latents)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder), shape, options.images)
        for workers in options.workers:
            clocks = {"samples/s": time.perf_counter}
            if workers == 0:
                clocks["samples per second of CPU time"] = time.process_time
            for unit, clock in clocks.items():
                rate = max(samples_per_second(cache, workers, options.batch, clock) for _ in range(options.rounds))
                print(f"workers {workers}  {rate:7.0f} {unit}", flush=True)
    for size in SIZES:
        if size != "tiny":
            print(f"DiT-{size:2} on an H100 takes {taken_per_second(size, shape):7.0f} samples/s")


if __name__ == "__main__":
    main()
