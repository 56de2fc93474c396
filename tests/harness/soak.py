"""Kill the trainers with SIGKILL again and again, and compare with a run that nobody disturbed.

python tests/harness/soak.py [--kills 20] [--folder /tmp/soak]         (`make soak`; some minutes on two cores)

Kills fall on random moments of a run, every other one into the writing of a checkpoint. Each time the same command goes
on. At the end the weights, the state and the metrics of both runs must be equal to the bit, and of the samples that
each attempt loaded none may be lost or another one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import VQModel
from instrumented import attempts, samples
from PIL import Image
from safetensors.torch import load_file

from nsvq.common import checkpoints

ROOT = Path(__file__).parents[2]
IMAGES, BATCH = 46, 8  # of these, 44 are trained on: epochs end within batches
RUN = {
    "batch_size": BATCH,
    "accumulation": 2,
    "workers": 1,
    "log_every": 5,
    "sample_every": 1000,
    "checkpoint_every": 3,
    "keep_checkpoints": 2,
    "trackers": [],
    "mixed_precision": "no",
}
TOKENIZER = {
    "model": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_groups": 4,
    },
    "quantizer": {"name": "vq", "codebook_size": 64},
    "nsvq": {"replace": {"after": 0}, "freeze": {"latest": 10, "warmup": 4, "ramp": 2}},
    "loss": {"perceptual": "none"},
    "discriminator": {"channels": 8, "layers": 1},
    "schedule": {"epochs": 24},
    "optim": {"ema_decay": 0.9},
    "validation": {"every": 4, "images": 2, "probe_images": 2, "statistics_images": 16},
    "run": RUN,
}
DIFFUSION = {
    "steps": 132,
    "model": {"size": "tiny", "depth": 2, "width": 32, "heads": 2},
    "optim": {"lr": 1e-3, "warmup_steps": 4, "ema_decay": 0.9},
    "sampling": {"images": 2, "steps": 2},
    "run": RUN,
}
AUTOREGRESSIVE = {
    "schedule": {"steps": 132},
    "model": {"size": "tiny", "depth": 2, "width": 32, "heads": 2},
    "optim": {"lr": 1e-3, "ema_decay": 0.9},
    "sampling": {"images": 2},
    "run": RUN,
}
STEPS = 132


def prepare(folder: Path) -> dict[str, list[str]]:
    """Images, a tokenizer and configs below `folder`; the arguments of each stage, but for --out."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / "images" / ("ant", "bee")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=32,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vq")
    shared = ["--data", str(folder / "images"), "--data.image_size", "16", "--data.holdout", "0.05"]
    for name, config in (("tokenizer", TOKENIZER), ("diffusion", DIFFUSION), ("autoregressive", AUTOREGRESSIVE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return {
        "tokenizer": ["--config", str(folder / "tokenizer.yaml"), *shared],
        "diffusion": [
            "--config",
            str(folder / "diffusion.yaml"),
            *shared,
            "--tokenizer",
            str(folder / "vq"),
            "--cache",
            str(folder / "latents"),
        ],
        "autoregressive": [
            "--config",
            str(folder / "autoregressive.yaml"),
            *shared,
            "--tokenizer",
            str(folder / "vq"),
            "--cache",
            str(folder / "codes"),
        ],
    }


def start(stage: str, arguments: list[str], out: Path) -> subprocess.Popen:
    spec = json.dumps({"stage": stage, "record": str(out) + "-record"})
    command = [sys.executable, str(ROOT / "tests" / "harness" / "instrumented.py"), spec, *arguments, "--out", str(out)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, out: Path) -> None:
    if process.wait() != 0:
        sys.exit(f"{out} ended with exit code {process.returncode}:\n{Path(f'{out}.log').read_text()[-3000:]}")


def position(out: Path) -> int:
    """Position of the last micro-batch that was loaded, or -1."""
    try:
        with open(f"{out}-record-0", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 400))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])[0] if lines else -1


def kill(process: subprocess.Popen, out: Path, target: int, while_writing: bool, rng: random.Random) -> bool:
    """SIGKILL when the run has loaded the sample at `target`, at a random moment or in the next writing of a
    checkpoint. Says whether a checkpoint was half written then."""

    def parts() -> list[Path]:
        return list((out / "checkpoints").glob(".step-*.part"))

    while position(out) < target:
        if process.poll() is not None:
            sys.exit(f"{out} ended before it was killed:\n{Path(f'{out}.log').read_text()[-3000:]}")
        time.sleep(0.001)
    if while_writing:
        while not parts() and process.poll() is None:
            pass
        time.sleep(rng.uniform(0, 0.002))
    else:
        time.sleep(rng.uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return bool(parts())


def equal(a: object, b: object) -> bool:
    """Whether two nested states hold the same values, tensors to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("images_per_second", "memory_gib")} for row in rows]


def compare(whole: Path, killed: Path) -> None:
    """Raises `AssertionError` where the two runs differ in weights, state, metrics or samples."""
    records = [f"{out}-record" for out in (whole, killed)]
    last = [checkpoints.newest_good(out / "checkpoints")[0] for out in (whole, killed)]
    assert [folder.name for folder in last] == [f"step-{STEPS}"] * 2
    assert equal(*map(checkpoints.read, last)), "the last checkpoints differ"
    for path in whole.rglob("*.safetensors"):
        assert path.parent.parent.name == "checkpoints" or equal(
            load_file(path), load_file(killed / path.relative_to(whole))
        ), f"{path.name} differs"
    assert metrics(whole) == metrics(killed), "the metrics differ"
    expected, found = ({p: ids[p] for p in range(STEPS * BATCH)} for ids in map(samples, records))
    assert expected == found, "the samples differ"
    images = len(set(expected.values()))
    for epoch in range(STEPS * BATCH // images):
        seen = {expected[p] for p in range(epoch * images, (epoch + 1) * images)}
        assert len(seen) == images, f"epoch {epoch} shows some image twice"
    for first, seen in attempts(records[1]):
        assert [p for p, _ in seen] == list(range(first, first + len(seen))), "an attempt jumped"
        assert first % (RUN["checkpoint_every"] * BATCH) == 0, "an attempt began elsewhere than at a checkpoint"


def whole_run(stage: str, folder: Path) -> Path:
    """Where the run that nobody disturbs goes."""
    return folder / f"{stage}-whole"


def disturb(stage: str, arguments: list[str], folder: Path, kills: int, seed: int = 0) -> int:
    """How many of `kills` fell into the writing of a checkpoint. Raises `AssertionError` where the run does not end as
    that in `whole_run` did."""
    rng, killed = random.Random(seed), folder / f"{stage}-killed"
    landed, window = 0, (STEPS - 6) * BATCH / kills
    for number in range(kills):
        target = int(rng.uniform(number, number + 1) * window)
        half_written = kill(start(stage, arguments, killed), killed, target, number % 2 == 0, rng)
        landed += half_written
        where = ", in the writing of a checkpoint" if half_written else ""
        print(f"{stage}: kill {number + 1} of {kills} at step {position(killed) // BATCH}{where}", flush=True)
    finish(start(stage, arguments, killed), killed)
    compare(whole_run(stage, folder), killed)
    return landed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each trainer")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for stage, arguments in prepare(folder).items():
            began, whole = time.monotonic(), whole_run(stage, folder)
            finish(start(stage, arguments, whole), whole)
            landed = disturb(stage, arguments, folder, options.kills)
            if landed == 0:
                sys.exit(f"{stage}: no kill fell into the writing of a checkpoint; give more --kills")
            print(
                f"{stage}: {options.kills} kills, {landed} of them in the writing of a checkpoint; weights, "
                "state, metrics and samples equal those of an undisturbed run; "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
