"""Run a study: train tokenizers that differ in what the study asks about, measure them, and write one page on it. A
study may also train generators on each tokenizer, and measure their samples.

python benchmarks/evidence.py --study configs/evidence/ratio.yaml --data ../shared/data/imagenet20-128
python benchmarks/evidence.py --study configs/evidence/ratio.yaml --data DIR --runs vq simvq nsvq --seeds 0 1 --jobs 2
The same command goes on where it stopped. A finished run is a record in docs/evidence/records, named after what went
into it, so that studies share runs; the page is docs/evidence/<study>.md. --jobs 0 writes it from the records alone.
"""

import json
import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from evidence_page import write_page
from evidence_study import CURVES, Generator, generator_config, read_study, record_key, training_config
from measure import machine, metrics_of
from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.run import code_version
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class EvidenceConfig(configs.Config):
    """Run a study and write its page."""

    study: Path = Field(description="The study, a file of configs/evidence.")
    data: DataConfig = Field(default_factory=DataConfig, description="The images.")
    out: Path = Field(Path("runs/evidence"), description="Folder of the runs.")
    pages: Path = Field(Path("docs/evidence"), description="Folder of the pages and of records/.")
    runs: list[str] = Field([], description="Train only these; none given: all of the study's.")
    seeds: list[int] = Field([], description="Seeds to train; none given: the study's.")
    jobs: int = Field(
        1,
        ge=0,
        description="Runs at once, each on a GPU of its own where there are several and no launcher is given; "
        "0 only writes the page.",
    )
    limit: int | None = Field(None, ge=1, description="Test images to measure; null is all of them.")
    features: str = Field("none", description="As --features of eval/reconstruction.py.")
    lpips: str = Field("none", description="As --lpips of eval/reconstruction.py.")
    lpips_weights: Path | None = Field(
        None, description="Weights of LPIPS, for measuring and for training with it; null downloads them."
    )
    launcher: str = Field("", description="What starts a script, such as 'accelerate launch --num_processes 4'.")


class Stage:
    """What a run trains on its tokenizer: `values`, its config, and what measures its samples."""

    def __init__(self, generator: Generator, seed: int, config: EvidenceConfig):
        self.stage, self.values = generator.stage, generator_config(generator, seed, config.data, config.features)
        self.measured = ["--features", config.features]
        for key, value in generator.samples.items():
            self.measured += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def run_script(name: str, script: str, options: list, folder: Path, launcher: str, environment: dict[str, str]) -> None:
    """Run one of the project's scripts; its output goes to <folder>.log. Raises `UserError` where it fails."""
    command = [str(word) for word in [*(shlex.split(launcher) or [sys.executable]), ROOT / script, *options]]
    with open(folder.with_suffix(".log"), "a") as log:
        code = subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log).returncode
    if code:
        raise UserError(f"{name}: {shlex.join(command)} ended with {code}; see {log.name}")


def train_and_measure(name: str, values: dict, folder: Path, measured: list[str], *how: Any) -> dict:
    """One tokenizer from its config to its record. `how`: launcher and environment. Raises `UserError` where a script
    fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(values | {"out": str(folder)}, sort_keys=False))
    run_script(name, "tokenizer/train.py", ["--config", folder / "study.yaml"], folder, *how)
    result = folder / "reconstruction.json"
    options = ["--tokenizer", folder / "tokenizer", *same_data(values), "--workers", 0]
    run_script(name, "eval/reconstruction.py", [*options, "--output", result, *measured], folder, *how)
    lines = metrics_of(folder)
    metrics = json.loads(result.read_text())["metrics"] | training_metrics(lines, values["run"]["batch_size"])
    metrics["relative_error"] = metrics["quantization_error"] / metrics["latent_rms"] ** 2
    shutil.rmtree(folder / "checkpoints")
    return _record(name, values, measured, metrics, _curve(lines))


def generate_and_measure(
    name: str, stage: str, tokenizer: Path, record: dict, values: dict, folder: Path, measured: list[str], *how: Any
) -> dict:
    """A generator on a trained tokenizer, whose record gets the numbers of the samples, and the generator's curve."""
    folder.mkdir(parents=True, exist_ok=True)
    written = values | {"out": str(folder), "tokenizer": str(tokenizer)}
    (folder / "study.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    run_script(name, f"{stage}/train.py", ["--config", folder / "study.yaml"], folder, *how)
    result = folder / "generation.json"
    options = ["--pipeline", folder / "pipeline", *same_data(values), "--workers", 0]
    run_script(name, "eval/generation.py", [*options, "--output", result, *measured], folder, *how)
    for part in ("checkpoints", "latents", "codes"):
        shutil.rmtree(folder / part, ignore_errors=True)
    lines = [_with_distance(line) for line in metrics_of(folder)]
    config, measured = record["config"] | {stage: values}, [*record["measured"], *measured]
    metrics = record["metrics"] | sample_metrics(json.loads(result.read_text()))
    steps = max(line["step"] for line in lines)
    metrics["minutes"] = steps * values["run"]["batch_size"] / max(line["images_per_second"] for line in lines) / 60
    if bits := [line["held_out_bits"] for line in lines if "held_out_bits" in line]:
        metrics["held_out_bits"] = bits[-1]
    return _record(name, config, measured, metrics, _curve(lines))


def same_data(values: dict) -> list:
    """Options that measure on the data that `values`, a training config, names: its splits and columns, too. The size
    is the tokenizer's."""
    named = {f"--data.{key}": value for key, value in values["data"].items() if key != "image_size"}
    return [word for key, value in named.items() for word in (key, "null" if value is None else value)]


def _with_distance(line: dict) -> dict:
    """A line of metrics whose Frechet distance is called so in all features."""
    distances = [value for name, value in line.items() if name == "fid" or name.startswith("fd_")]
    return line | ({"fd": distances[0]} if distances else {})


def sample_metrics(result: dict) -> dict[str, float]:
    """Frechet distance and share of the class asked for, at each guidance scale of a generation result."""
    found = {}
    for setting in result.get("sweep") or [result["setting"] | {"metrics": result["metrics"]}]:
        scale, metrics = f"{setting['guidance_scale']:g}", setting["metrics"]
        distances = [value for name, value in metrics.items() if name.startswith(("fid", "fd_"))]
        found |= {f"fd_at_{scale}": value for value in distances[:1]}
        if "class_accuracy" in metrics:
            found[f"accuracy_at_{scale}"] = metrics["class_accuracy"]
    if "class_accuracy_real" in result["metrics"]:
        found["accuracy_real"] = result["metrics"]["class_accuracy_real"]
    return found


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


def _curve(lines: list[dict]) -> list[dict]:
    return [{k: _short(v) for k, v in line.items() if k in CURVES | {"step", "phase"}} for line in lines]


def _record(name: str, values: dict, measured: list[str], metrics: dict, curve: list[dict]) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "name": name,
        "code": code_version(),
        "machine": machine(device),
        "config": values,
        "measured": measured,
        "metrics": metrics,
        "curve": curve,
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    config = configs.parse(EvidenceConfig, sys.argv[1:])
    study = read_study(config.study)
    if unknown := set(config.runs) - set(study.runs):
        raise UserError(f"no such runs: {', '.join(sorted(unknown))}; there are {', '.join(study.runs)}")
    chosen = config.seeds or study.seeds
    study.seeds = sorted({*study.seeds, *chosen})
    fingerprint = open_split(config.data, "train").fingerprint
    measured = ["--features", config.features, "--lpips", config.lpips]
    measured += ["--limit", str(config.limit)] if config.limit else []
    if config.lpips != "none" and config.lpips_weights:
        measured += ["--lpips_weights", str(config.lpips_weights)]

    rows = study.rows()
    records: dict[str, dict[int, dict]] = {row: {} for row in rows}
    waiting = []
    for seed in study.seeds:  # all runs of one seed before the next
        for row, (run, generator) in rows.items():
            values = training_config(study, run, seed, config.data, config.lpips_weights)
            files, after = [record_key(values, fingerprint, measured)], None
            if generator:
                after = Stage(study.generators[generator], seed, config)
                files.append(record_key(after.values, fingerprint, [*files, after.stage, *after.measured]))
            files = [config.pages / "records" / f"{key}.json" for key in files]
            if files[-1].exists():
                records[row][seed] = json.loads(files[-1].read_text())
            elif seed in chosen and (not config.runs or run in config.runs):
                waiting.append((row, seed, values, after, files))
    page = config.pages / f"{config.study.stem}.md"
    command = ["python", "benchmarks/evidence.py", "--study", config.study, "--data", config.data.source, *measured]
    if config.lpips_weights and "--lpips_weights" not in measured:
        command += ["--lpips_weights", config.lpips_weights]
    write_page(study, records, command, page)
    if not config.jobs:
        print(page)
        return

    slots: queue.Queue[int] = queue.Queue()
    for slot in range(config.jobs):
        slots.put(slot)

    training = {files[0]: threading.Lock() for *_, files in waiting}  # runs with one config share their training

    def job(name: str, values: dict, after: Stage | None, files: list[Path]) -> dict:
        slot = slots.get()
        environment = {}
        if config.jobs > 1 and torch.cuda.device_count() > 1 and not config.launcher:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        if config.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // config.jobs))
        how = (config.launcher, environment)
        folder, *samples_folder = (config.out / file.stem for file in files)
        try:
            with training[files[0]]:
                if files[0].exists() and (after is None or (folder / "tokenizer").exists()):
                    record = json.loads(files[0].read_text())
                else:
                    record = train_and_measure(name, values, folder, measured, *how)
                    write(files[0], record)
            if after:
                what = (after.values, *samples_folder, after.measured, *how)
                record = generate_and_measure(name, after.stage, folder / "tokenizer", record, *what)
                write(files[1], record)
        finally:
            slots.put(slot)
        return record

    def write(file: Path, record: dict) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record) + "\n")

    failed = []
    with ThreadPoolExecutor(config.jobs) as pool:
        running = {pool.submit(job, name, *rest): (name, seed) for name, seed, *rest in waiting}
        for done in as_completed(running):
            name, seed = running[done]
            try:
                records[name][seed] = done.result()
            except UserError as error:
                failed.append(f"seed {seed}: {error}")
                continue
            write_page(study, records, command, page)
            print(f"{name}, seed {seed}: {records[name][seed]['metrics']}", flush=True)
    print(page)
    if failed:
        raise UserError("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    launch.run(main)
