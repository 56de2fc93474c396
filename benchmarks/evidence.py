"""Run a study: train tokenizers that differ in what the study asks about, measure them, and write one page on it.

python benchmarks/evidence.py --study configs/evidence/methods.yaml --data ../shared/data/imagenet20-128
python benchmarks/evidence.py --study configs/evidence/systems.yaml --data DIR --runs vq simvq nsvq --seeds 0 1 --jobs 2
The same command goes on where it stopped. A finished run is a record in docs/evidence/records, named after what went
into it, so that studies share runs; the page is docs/evidence/<study>.md. --jobs 0 writes it from the records alone.
"""

import hashlib
import json
import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import machine
from pydantic import Field, model_validator

from common import config as configs
from common import launch
from common.data import DataConfig, open_split
from common.errors import UserError
from common.run import code_version
from tokenizer.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {  # of the table: metric (or its start), heading, format
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips_": ("LPIPS", "{:.3f}"),
    "rf": ("FD", "{:.1f}"),
    "quantization_error": ("quantization MSE", "{:.4f}"),
    "relative_error": ("MSE / mean z²", "{:.4f}"),
    "utilization": ("utilization", "{:.1%}"),
    "perplexity_fraction": ("perplexity / K", "{:.3f}"),
    "codebook_size": ("K", "{:.0f}"),
    "bits_per_token": ("bits a token", "{:.1f}"),
    "tokens_per_image": ("tokens", "{:.0f}"),
    "lowest_utilization": ("lowest utilization in training", "{:.1%}"),
    "drift_rms": ("drift", "{:.3f}"),
    "drift_relative": ("drift / RMS(z)", "{:.3f}"),
    "churn": ("churn", "{:.2f}"),
    "winner_mass": ("winner's mass", "{:.2f}"),
    "step_ms": ("step, ms", "{:.0f}"),
    "memory_gib": ("memory, GiB", "{:.2f}"),
}
MAIN = ["psnr", "ssim", "lpips_", "rf", "quantization_error", "relative_error", "utilization", "perplexity_fraction"]
CURVES = {"val_psnr", "val_quantization_error", "utilization", "perplexity", "epoch_commitment", "latent_rms",
          "drift_rms", "drift_relative", "churn", "winner_mass", "effective_codes"}  # fmt: skip


class Study(configs.Config):
    """What a study trains and shows."""

    title: str = Field(description="Heading of its page.")
    question: str = Field(description="What it asks, and what is equal for all of its runs: the page's first lines.")
    base: Path = Field(description="Training config of what all runs have in common,")
    common: dict[str, Any] = Field({}, description="and what the study changes in it for all of them.")
    seeds: list[int] = Field([0], min_length=1, description="One training of each run for each.")
    runs: dict[str, dict[str, Any]] = Field(min_length=1, description="Name: what sets it apart, as a training config.")
    against: str | None = Field(None, description="Run that the others are compared with, seed by seed.")
    columns: list[str] = Field(MAIN, min_length=1, description="Of the table.")
    curves: list[str] = Field([], description="Keys of metrics.jsonl to plot over the training.")

    @model_validator(mode="after")
    def _known(self) -> "Study":
        for given, known in ((self.columns, COLUMNS), (self.curves, CURVES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        if self.against is not None and self.against not in self.runs:
            raise ValueError(f"against: {self.against!r} is not one of the runs")
        return self


class EvidenceConfig(configs.Config):
    """Run a study and write its page."""

    study: Path = Field(description="The study, a file of configs/evidence.")
    data: DataConfig = Field(default_factory=DataConfig, description="The images.")
    out: Path = Field(Path("runs/evidence"), description="Folder of the runs.")
    pages: Path = Field(Path("docs/evidence"), description="Folder of the pages and of records/.")
    runs: list[str] = Field([], description="Train only these; none given: all of the study's.")
    seeds: list[int] = Field([], description="Seeds to train; none given: the study's.")
    jobs: int = Field(
        1, ge=0, description="Runs at once, each on a GPU of its own where there are several and no launcher is given; "
        "0 only writes the page.")  # fmt: skip
    limit: int | None = Field(None, ge=1, description="Test images to measure; null is all of them.")
    features: str = Field("none", description="As --features of eval/reconstruction.py.")
    lpips: str = Field("none", description="As --lpips of eval/reconstruction.py.")
    lpips_weights: Path | None = Field(
        None, description="Weights of LPIPS, for measuring and for training with it; null downloads them."
    )
    launcher: str = Field("", description="What starts a script, such as 'accelerate launch --num_processes 4'.")


def merged(base: dict, changes: dict) -> dict:
    """`base` with the leaves of `changes`; a quantizer of another name takes over none of the base's options."""
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and ("name" not in value or key != "quantizer")
        result[key] = merged(old, value) if same else value
    return result


def training_config(study: Study, name: str, seed: int, data: DataConfig, lpips_weights: Path | None = None) -> dict:
    """The training config of one run, as written: no defaults in it, and no `out`."""
    values = merged(merged(configs.read_yaml(study.base), study.common), study.runs[name])
    values = merged(values, {"data": configs.to_dict(data) | {"image_size": values["data"]["image_size"]}})
    values = merged(values, {"run": {"seed": seed}})
    if lpips_weights is not None and values.get("loss", {}).get("perceptual", "vgg") != "none":
        values = merged(values, {"loss": {"perceptual_weights": str(lpips_weights)}})
    configs.validate(TrainConfig, values, source=f"run {name!r}")
    return values


def record_key(values: dict, fingerprint: str, measured: list[str]) -> str:
    """Names what decides a run's numbers: config, data (by what is in it, not where it lies), what is measured."""
    content = values | {"data": values["data"] | {"source": fingerprint}}
    return hashlib.sha256(json.dumps([content, measured], sort_keys=True).encode()).hexdigest()[:16]


def train_and_measure(name: str, values: dict, folder: Path, measured: list[str], launcher: str,
                      environment: dict[str, str]) -> dict:  # fmt: skip
    """One run from its config to its record. Raises `UserError` where a script fails; its output is in <folder>.log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values | {"out": str(folder)}, sort_keys=False))
    start = shlex.split(launcher) or [sys.executable]
    train = [*start, ROOT / "tokenizer" / "train.py", "--config", folder / "study.yaml"]
    result = folder / "reconstruction.json"
    measure = [*start, ROOT / "eval" / "reconstruction.py", "--tokenizer", folder / "tokenizer", "--workers", 0]
    measure += ["--data.source", values["data"]["source"], "--output", result, *measured]
    for script in [train, measure]:
        command = [str(word) for word in script]
        with open(folder.with_suffix(".log"), "a") as log:
            code = subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log).returncode
        if code:
            raise UserError(f"{name}: {shlex.join(command)} ended with {code}; see {log.name}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads(result.read_text())["metrics"] | training_metrics(lines, values["run"]["batch_size"])
    metrics["relative_error"] = metrics["quantization_error"] / metrics["latent_rms"] ** 2
    shutil.rmtree(folder / "checkpoints")
    curve = [{k: _short(v) for k, v in line.items() if k in CURVES | {"step", "phase"}} for line in lines]
    return {"name": name, "code": code_version(), "machine": machine(_device()), "config": values,
            "measured": measured, "metrics": metrics, "curve": curve}  # fmt: skip


def training_metrics(lines: list[dict], batch_size: int) -> dict[str, float]:
    """Numbers of a run that only its log has. Drift and churn are means over the second half of stage 1."""
    found = {
        "step_ms": 1000 * batch_size / max(line["images_per_second"] for line in lines),  # the least disturbed
        "memory_gib": max(line["memory_gib"] for line in lines),
        "latent_rms": lines[-1]["latent_rms"],
    }
    stage1 = [line for line in lines if line["phase"] == "stage1"]
    for key in ("drift_rms", "drift_relative", "churn", "winner_mass"):
        values = [line[key] for line in stage1[len(stage1) // 2 :] if key in line]
        found |= {key: statistics.mean(values)} if values else {}
    used = [line["utilization"] for line in lines if "utilization" in line]
    return found | ({"lowest_utilization": min(used)} if used else {})


def table(rows: dict[str, list[dict]], columns: list[str]) -> str:
    """Markdown: one line a run; means over seeds, with the standard deviation where there are several."""
    names = {}
    for column in columns:
        found = {m for runs in rows.values() for run in runs for m in run if _is(m, column)}
        names |= {m: COLUMNS[column] for m in sorted(found)}
    lines = ["| run | seeds | " + " | ".join(heading for heading, _ in names.values()) + " |",
             "|---" * (len(names) + 2) + "|"]  # fmt: skip
    for name, runs in rows.items():
        cells = [_spread([run[m] for run in runs if m in run], style) for m, (_, style) in names.items()]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is(metric: str, column: str) -> bool:
    return metric == column or (column in ("lpips_", "rf") and metric.startswith(column))


def _spread(values: list[float], style: str) -> str:
    if not values:
        return "-"
    deviation = f" ± {style.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else ""
    return style.format(statistics.mean(values)) + deviation


def comparison(by_seed: dict[str, dict[int, dict]], against: str) -> str:
    """Markdown: each run minus (or divided by) `against` at the same seed; mean and standard deviation over seeds."""
    distances = sorted({m for runs in by_seed.values() for run in runs.values() for m in run if m.startswith("rf")})
    parts = {"psnr": ("PSNR, dB", float.__sub__, "{:+.2f}")}
    parts |= {"relative_error": ("MSE / mean z²", float.__truediv__, "{:.2f}x")}
    parts |= {m: ("FD", float.__truediv__, "{:.2f}x") for m in distances}
    lines = [f"| against {against} | seeds | " + " | ".join(heading for heading, _, _ in parts.values()) + " |",
             "|---" * (len(parts) + 2) + "|"]  # fmt: skip
    for name, runs in by_seed.items():
        pairs = [(run, by_seed[against][seed]) for seed, run in runs.items() if seed in by_seed.get(against, {})]
        if name == against or not pairs:
            continue
        cells = [_spread([f(float(a[m]), float(b[m])) for a, b in pairs], style) for m, (_, f, style) in parts.items()]
        lines.append(f"| {name} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(by_seed: dict[str, dict[int, dict]], curves: dict[str, list[list[dict]]], keys: list[str], path: Path) -> None:
    """SVG: a dot a run and seed for PSNR, FD, relative error and utilization, then a panel for each key of the logs."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "nsvq"}  # text as text, and equal files twice
    found = [run for runs in by_seed.values() for run in runs.values()]
    distances = sorted({m for run in found for m in run if m.startswith("rf")})
    metrics = [m for m in ("psnr", "relative_error", "utilization", *distances) if all(m in run for run in found)]
    rows = 1 + -(-len(keys) // 2)
    figure = Figure(figsize=(12, max(2.5, 0.32 * len(by_seed) + 1) + 3.2 * (rows - 1)), layout="constrained")
    heights = [max(2.5, 0.32 * len(by_seed) + 1)] + [3.2] * (rows - 1)
    parts = figure.subfigures(rows, 1, height_ratios=heights, squeeze=False)[:, 0]
    names = list(by_seed)
    for axes, metric in zip(parts[0].subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        for i, name in enumerate(names):
            axes.plot([run[metric] for run in by_seed[name].values()], [i] * len(by_seed[name]), "o", alpha=0.7)
        axes.set_xlabel(next(heading for column, (heading, _) in COLUMNS.items() if _is(metric, column)))
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
    parts[0].axes[0].invert_yaxis()
    for row, part in enumerate(parts[1:]):
        shown = keys[2 * row : 2 * row + 2]
        for axes, key in zip(part.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for i, name in enumerate(names):
                for number, lines in enumerate(curves[name]):
                    points = [(line["step"], line[key]) for line in lines if key in line] or [(float("nan"),) * 2]
                    label = name if number == 0 else None
                    axes.plot(*zip(*points, strict=True), color=f"C{i % 10}", label=label, linewidth=1)
            axes.set_title(key)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        part.axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def write_page(study: Study, config: EvidenceConfig, records: dict[str, dict[int, dict]], measured: list[str]) -> Path:
    """<pages>/<study>.md and .svg from records by run and seed. Returns the page."""
    command = ["python", "benchmarks/evidence.py", "--study", config.study, "--data", config.data.source, *measured]
    if config.lpips_weights and "--lpips_weights" not in measured:
        command += ["--lpips_weights", config.lpips_weights]
    by_seed = {name: {seed: r["metrics"] for seed, r in runs.items()} for name, runs in records.items() if runs}
    page = config.pages / f"{config.study.stem}.md"
    lacking = [f"{name} ({', '.join(map(str, missing))})" for name, runs in records.items()
               if (missing := [seed for seed in study.seeds if seed not in runs])]  # fmt: skip
    found = [r for runs in records.values() for r in runs.values()]
    parts = [f"# {study.title}", study.question, f"    {shlex.join(map(str, command))}"]
    if lacking:
        parts.append(f"Not run yet, by seed: {'; '.join(lacking)}.")
    if found:
        plot(by_seed, {n: [r["curve"] for r in runs.values()] for n, runs in records.items()}, study.curves,
             page.with_suffix(".svg"))  # fmt: skip
        parts.append(table({name: list(runs.values()) for name, runs in by_seed.items()}, study.columns))
        if study.against in by_seed:
            parts.append(comparison(by_seed, study.against))
        parts.append(f"![dots and curves]({page.stem}.svg)")
        parts.append("\n".join(f"- {name}: `{_flat(study.runs[name])}`" for name in records))
        common = f" with {_flat(study.common)}" if study.common else ""
        parts.append(f"Base: `{study.base}`{common}. Code: {', '.join(sorted({r['code'] for r in found}))}. Machine: "
                     f"{'; '.join(sorted({r['machine'] for r in found}))}.")  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n")
    return page


def _flat(changes: dict, prefix: str = "") -> str:
    """A nested config on one line."""
    leaves = []
    for key, value in changes.items():
        leaves.append(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} {value}")
    return ", ".join(leaves) or "as the base"


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    config = configs.parse(EvidenceConfig, sys.argv[1:])
    study = configs.validate(Study, configs.read_yaml(config.study), source=str(config.study))
    if unknown := set(config.runs) - set(study.runs):
        raise UserError(f"no such runs: {', '.join(sorted(unknown))}; there are {', '.join(study.runs)}")
    chosen = config.seeds or study.seeds
    study.seeds = sorted({*study.seeds, *chosen})
    fingerprint = open_split(config.data, "train").fingerprint
    measured = ["--features", config.features, "--lpips", config.lpips]
    measured += ["--limit", str(config.limit)] if config.limit else []
    if config.lpips != "none" and config.lpips_weights:
        measured += ["--lpips_weights", str(config.lpips_weights)]

    records: dict[str, dict[int, dict]] = {name: {} for name in study.runs}
    waiting = []
    for seed in study.seeds:  # all runs of one seed before the next
        for name in study.runs:
            values = training_config(study, name, seed, config.data, config.lpips_weights)
            file = config.pages / "records" / f"{record_key(values, fingerprint, measured)}.json"
            if file.exists():
                records[name][seed] = json.loads(file.read_text())
            elif seed in chosen and (not config.runs or name in config.runs):
                waiting.append((name, seed, values, file))
    page = write_page(study, config, records, measured)
    if not config.jobs:
        print(page)
        return

    slots: queue.Queue[int] = queue.Queue()
    for slot in range(config.jobs):
        slots.put(slot)

    def job(name: str, values: dict, file: Path) -> dict:
        slot = slots.get()
        environment = {}
        if config.jobs > 1 and torch.cuda.device_count() > 1 and not config.launcher:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        if config.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // config.jobs))
        try:
            if file.exists():  # another run of this study has the same config
                return json.loads(file.read_text())
            record = train_and_measure(name, values, config.out / file.stem, measured, config.launcher, environment)
        finally:
            slots.put(slot)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record) + "\n")
        return record

    failed = []
    with ThreadPoolExecutor(config.jobs) as pool:
        running = {pool.submit(job, name, values, file): (name, seed) for name, seed, values, file in waiting}
        for done in as_completed(running):
            name, seed = running[done]
            try:
                records[name][seed] = done.result()
            except UserError as error:
                failed.append(f"seed {seed}: {error}")
                continue
            write_page(study, config, records, measured)
            print(f"{name}, seed {seed}: {records[name][seed]['metrics']}", flush=True)
    print(page)
    if failed:
        raise UserError("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    launch.run(main)
