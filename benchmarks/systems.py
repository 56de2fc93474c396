"""Train a list of tokenizer systems on the same data, seeds and budget, measure them, and write one table and one plot.

python benchmarks/systems.py --data ../shared/data/imagenet20-128 --out runs/systems
python benchmarks/systems.py --data DIR --out runs/systems --systems vq simvq nsvq --seeds 0 1 --epochs 28
The same command goes on where it stopped. Results: <out>/table.md and <out>/plot.svg; one run is in
<out>/<system>-seed<N>. The network, the losses and the budget are those of configs/benchmarks/photos64.yaml (--base).
"""

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import yaml
from pydantic import Field

from common import config as configs
from common import launch
from common.data import DataConfig
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
GRIDS = {
    2**8: [8, 6, 5],
    2**10: [8, 5, 5, 5],
    2**12: [7, 5, 5, 5, 5],
    2**14: [8, 8, 8, 6, 5],
    2**16: [8, 8, 8, 5, 5, 5],
}
SYSTEMS = ("vq", "ema", "ema-revive", "fc", "fc_l2", "simvq", "simvq-nsvq", "nsvq", "ns-vq", "transvq", "lc", "fvq",
           "vp", "fsp", "fsq", "lfq", "bsq", "ibq")  # fmt: skip


class BenchmarkConfig(configs.Config):
    """Compare tokenizer systems at equal data, seeds and budget."""

    data: DataConfig = Field(DataConfig(), description="The images.")
    out: Path = Field(Path("runs/systems"), description="Folder of all runs, the table and the plot.")
    base: Path = Field(
        Path("configs/benchmarks/photos64.yaml"), description="What all systems have in common, as a training config."
    )
    systems: list[Literal[SYSTEMS]] = Field(list(SYSTEMS), min_length=1, description="Which ones, in this order.")
    seeds: list[int] = Field([0], min_length=1, description="One run of each system for each seed.")
    codebook_size: Literal[256, 1024, 4096, 16384, 65536] = Field(1024, description="K, or the grid nearest to it.")
    codebook_lr: float = Field(
        3e-3, gt=0, description="Learning rate of free tables (vq, nsvq, fc, ns-vq); others have the network's."
    )
    epochs: float | None = Field(None, gt=0, description="schedule.epochs, where the base's is not meant.")
    lc_features: Path | None = Field(
        None, description="Features of lc (tokenizer/make_codebook.py); null leaves lc out."
    )
    limit: int | None = Field(None, ge=1, description="Test images to measure; null is all of them.")
    features: str = Field("none", description="As --features of eval/reconstruction.py.")
    lpips: Literal["vgg", "alex", "squeeze", "none"] = Field("none", description="Backbone of LPIPS.")
    lpips_weights: Path | None = Field(None, description="Its weights; null downloads them.")
    launcher: str = Field("", description="What starts a script, such as 'accelerate launch --num_processes 4'.")


def system(name: str, config: BenchmarkConfig, base_dim: int) -> dict:
    """What sets a system apart, as sections of a training config."""
    k = config.codebook_size
    bits = int(math.log2(k))
    grid = {"levels": GRIDS[k]}
    table = {"optim": {"codebook_lr": config.codebook_lr}}
    pulled = {"loss": {"nonstationary_weight": 0.1}, "schedule": {"freeze": True}}
    special = {
        "vq": table,
        "nsvq": pulled | table | {"schedule": {"freeze": True, "replace": True}},
        "simvq-nsvq": pulled | {"quantizer": {"name": "simvq", "codebook_size": k}},
        "ema-revive": {"quantizer": {"name": "ema", "codebook_size": k, "revive_below": 0.05}},
        "fc": table | {"dim": 8},
        "fc_l2": {"dim": 8},
        "ns-vq": table | {"loss": {"nonstationary_weight": 1.0, "temperature": 1.0}},
        "ibq": {"dim": 64, "loss": {"codebook_weight": 0.25, "commitment_weight": 1.0}},  # it collapses at 8
        "lc": {"quantizer": {"name": "lc", "features": str(config.lc_features and config.lc_features.resolve())}},
        "fsq": {"quantizer": {"name": "fsq"} | grid, "dim": len(GRIDS[k])},
        "fsp": {"quantizer": {"name": "fsp"} | grid, "dim": len(GRIDS[k])},
        "lfq": {"quantizer": {"name": "lfq"}, "dim": bits},
        "bsq": {"quantizer": {"name": "bsq"}, "dim": bits},
        "vp": {"dim": {256: 3, 1024: 4}.get(k, 5)},
    }.get(name, {})
    return {
        "model": {"latent_channels": special.get("dim", base_dim)},
        "quantizer": special.get("quantizer", {"name": name, "codebook_size": k}),
        "loss": {"nonstationary_weight": 0.0} | special.get("loss", {}),
        "schedule": {"freeze": False, "replace": False} | special.get("schedule", {}),
        "optim": special.get("optim", {}),
    }


def training_config(name: str, seed: int, folder: Path, config: BenchmarkConfig) -> dict:
    """The whole config of one run."""
    values = configs.read_yaml(config.base)
    parts = system(name, config, values["model"]["latent_channels"])
    if config.epochs is not None:
        parts["schedule"]["epochs"] = config.epochs
    parts |= {
        "data": configs.to_dict(config.data) | {"image_size": values["data"]["image_size"]},
        "run": {"seed": seed},
    }
    for section, given in parts.items():
        values[section] = values.get(section, {}) | given
    return values | {"out": str(folder)}


def run(name: str, seed: int, config: BenchmarkConfig) -> Path:
    """Train and measure one system, as far as it is not done. Raises `UserError` where a script fails."""
    folder = config.out / f"{name}-seed{seed}"
    result = folder / "reconstruction.json"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "benchmark.yaml"
    wanted = training_config(name, seed, folder, config)
    if result.exists() and file.exists() and configs.read_yaml(file) == wanted:
        return folder
    file.write_text(yaml.safe_dump(wanted, sort_keys=False))
    _call(config, "tokenizer/train.py", "--config", file)
    measured = ["--tokenizer", folder / "tokenizer", "--data.source", config.data.source, "--workers", 0]
    measured += ["--features", config.features, "--lpips", config.lpips, "--output", result]
    measured += ["--limit", config.limit] if config.limit else []
    measured += ["--lpips_weights", config.lpips_weights] if config.lpips_weights else []
    _call(config, "eval/reconstruction.py", *measured)
    return folder


def _call(config: BenchmarkConfig, script: str, *arguments) -> None:
    command = [*(shlex.split(config.launcher) or [sys.executable]), str(ROOT / script), *map(str, arguments)]
    if code := subprocess.run(command).returncode:
        raise UserError(f"{shlex.join(command)} ended with {code}")


def measurements(folder: Path) -> dict[str, float]:
    """The numbers of one finished run."""
    metrics = json.loads((folder / "reconstruction.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    batch = configs.read_yaml(folder / "benchmark.yaml")["run"]["batch_size"]
    fastest = max(line["images_per_second"] for line in lines)  # least disturbed by validation and by other programs
    metrics["step_ms"] = 1000 * batch / fastest
    metrics["memory_gib"] = max(line["memory_gib"] for line in lines)
    return metrics


COLUMNS = {  # of the table: metric (or its start), heading, format
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips_": ("LPIPS", "{:.3f}"),
    "rf": ("FD", "{:.2f}"),
    "utilization": ("utilization", "{:.1%}"),
    "perplexity_fraction": ("perplexity / K", "{:.3f}"),
    "codebook_size": ("K", "{:.0f}"),
    "bits_per_token": ("bits a token", "{:.1f}"),
    "tokens_per_image": ("tokens", "{:.0f}"),
    "step_ms": ("step, ms", "{:.0f}"),
    "memory_gib": ("memory, GiB", "{:.2f}"),
}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one line a system; means over seeds, with the standard deviation of PSNR where there are several."""
    names = {}
    for start, (heading, style) in COLUMNS.items():
        names |= {m: (heading, style) for row in rows.values() for m in row[0] if m.startswith(start)}
    lines = [
        "| system | " + " | ".join(heading for heading, _ in names.values()) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, runs in rows.items():
        cells = [style.format(statistics.mean(run[m] for run in runs)) for m, (_, style) in names.items()]
        if len(runs) > 1:
            cells[0] += f" ± {statistics.stdev(run['psnr'] for run in runs):.2f}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, list[dict[str, float]]]) -> str:
    """SVG: PSNR over perplexity / K, a point a run and a name a system."""
    width, height, edge = 720, 480, 60
    points = [(name, run["perplexity_fraction"], run["psnr"]) for name, runs in rows.items() for run in runs]
    low, high = math.floor(min(p[2] for p in points)), math.ceil(max(p[2] for p in points) + 1e-9)

    def x(value: float) -> float:
        return edge + value * (width - 2 * edge)

    def y(value: float) -> float:
        return height - edge - (value - low) / max(high - low, 1) * (height - 2 * edge)

    text = '<text x="{:.0f}" y="{:.0f}" text-anchor="{}">{}</text>'.format
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts.append(f'<path d="M{x(tick):.0f} {y(low):.0f}V{y(high):.0f}" stroke="#ddd"/>')
        parts.append(text(x(tick), y(low) + 18, "middle", f"{tick:g}"))
    for tick in range(low, high + 1):
        parts.append(f'<path d="M{x(0):.0f} {y(tick):.0f}H{x(1):.0f}" stroke="#ddd"/>')
        parts.append(text(x(0) - 8, y(tick) + 4, "end", tick))
    parts += [text(width / 2, height - 15, "middle", "perplexity / K"), text(x(0), edge - 20, "middle", "PSNR, dB")]
    seen = set()
    for name, used, psnr in points:
        parts.append(f'<circle cx="{x(used):.1f}" cy="{y(psnr):.1f}" r="4" fill="#1f5fa8"/>')
        if name not in seen:
            parts.append(text(x(used) + 7, y(psnr) + 4, "start", escape(name)))
        seen.add(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    config = configs.parse(BenchmarkConfig, sys.argv[1:])
    rows, failed = defaultdict(list), []
    for name in config.systems:
        if name == "lc" and config.lc_features is None:
            print("lc is left out: it needs --lc_features (tokenizer/make_codebook.py)", file=sys.stderr)
            continue
        for seed in config.seeds:
            try:
                rows[name].append(measurements(run(name, seed, config)))
            except UserError as error:
                failed.append(f"{name}, seed {seed}: {error}")
                continue
            (config.out / "table.md").write_text(table(rows))
            (config.out / "plot.svg").write_text(plot(rows))
    if any(rows.values()):
        print((config.out / "table.md").read_text())
        print(f"{config.out / 'table.md'}  {config.out / 'plot.svg'}")
    if failed:
        raise UserError("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    launch.run(main)
