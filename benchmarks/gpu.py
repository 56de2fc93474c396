"""Everything that only an NVIDIA GPU can show, as one report to paste into an issue: runs/gpu/report.md.

make gpu                                                            # all of it; at most 30 minutes on an H100, computed
make smoke OPTIONS="--loss.perceptual_weights vgg16.pth"            # the default recipe alone, before a day's training
python benchmarks/gpu.py --parts kernels precision
A part that fails is a row of the report, and the others go on. Options of tokenizer/train.py go to the smoke run. Ends
with 0 where all is well, 1 where something is not, 2 without a GPU. --toy runs small parts on any device, for tests.
"""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from measure import metrics_of

from nsvq.common import counting, plan
from nsvq.common.run import code_version
from nsvq.tokenizer.codebook import nearest_code, search_with_nonstationary_loss

ROOT = Path(__file__).parents[1]
COMMAND_SECONDS = 3600  # that a command may take: the smoke run, half of it on an A10 by the plan
SMALL = ["--config", "configs/quickstart/nsvq.yaml", "--schedule.epochs", "13"]
TOY_MODEL = ["--model.channels", "8", "--model.norm_groups", "4", "--data.image_size", "16", "--run.batch_size", "8"]
TOY_MODEL += ["--schedule.epoch_samples", "16", "--quantizer.codebook_size", "64", "--run.workers", "0"]
TOY_MODEL += ["--validation.images", "8", "--validation.statistics_images", "16", "--validation.probe_images", "4"]
TOY_MODEL += ["--run.log_every", "2", "--discriminator.layers", "1", "--discriminator.channels", "8"]
TOY_MODEL += ["--schedule.epochs", "4", "--nsvq.freeze.latest", "1", "--nsvq.freeze.warmup", "1"]


@dataclass
class Row:
    """A number, what it has to be, and whether it is."""

    part: str
    what: str
    value: str
    bound: str
    good: bool


class Failed(Exception):
    """A command that ended with another code than 0, or not in time; the end of what it said."""


@dataclass
class Setting:
    device: torch.device
    toy: bool
    folder: Path
    options: list[str]  # for the smoke run's tokenizer


def run(*words: object, environment: dict[str, str] | None = None) -> str:
    """What a command printed. Raises `Failed`."""
    try:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {COMMAND_SECONDS} s") from None
    if done.returncode:
        raise Failed("\n".join(done.stdout.splitlines()[-15:]))
    return done.stdout


# The parts


def suite(setting: Setting) -> Iterator[Row]:
    """The tests on the CPU, since many ask for equal bits, and those of the kernels on the GPU."""
    which = {"on the CPU": ["tests/test_files.py"] if setting.toy else []}
    if setting.device.type == "cuda":
        which["of the kernels"] = ["tests/tokenizer/test_codebook_triton.py"]
    for name, files in which.items():
        hidden = {} if "kernels" in name else {"CUDA_VISIBLE_DEVICES": ""}
        last = run("-m", "pytest", "-p", "no:cacheprovider", *files, environment=hidden).strip().splitlines()[-1]
        yield Row("suite", f"tests {name}", last, "0 failed", "failed" not in last)


def kernels(setting: Setting) -> Iterator[Row]:
    """Search and NS loss against dense float64."""
    shapes = [(64, 100, 8)] if setting.toy else [(2048, 65_536, 128), (2048, 4099, 8), (1000, 16_384, 256)]
    for n, k, d in shapes:
        generator = torch.Generator().manual_seed(0)
        z, codes = (0.1 * torch.randn(rows, d, generator=generator).to(setting.device) for rows in (n, k))
        codes.requires_grad_()
        z64, codes64 = z.double(), codes.detach().double()
        distances = torch.cdist(z64, codes64, compute_mode="donot_use_mm_for_euclid_dist").square()
        least = distances.min(1, keepdim=True).values
        found = nearest_code(z, codes)
        gap = float((distances.gather(1, found[:, None]) / least).max() - 1)
        rows = {"distance above the nearest code's": (gap, 1e-5)}
        for own, temperature in ((False, 0.01 * d), (True, 0.3)):
            again, ns = search_with_nonstationary_loss(z, codes, temperature, own)
            alike = float((found == again).double().mean())
            w = (-distances / (temperature * least if own else temperature)).softmax(1).scatter(1, again[:, None], 0.0)
            loss = float((w * distances).sum() / (n * d))
            gradient = 2 / (n * d) * (w.sum(0)[:, None] * codes64 - w.T @ z64)
            of = " of own temperatures" if own else ""
            rows |= {
                f"latents whose two searches differ{of}": (1 - alike, 1e-3),
                f"error of the NS loss{of}": (abs(float(ns.loss.detach()) / loss - 1), 3e-5),
                f"error of its gradient{of}": (float((ns.gradient - gradient).norm() / gradient.norm()), 1e-4),
            }
        for what, (value, bound) in rows.items():
            name = f"N = {n}, K = {k}, d = {d}: {what}"
            yield Row("kernels", name, f"{value:.1e}", f"<= {bound:.0e}", value <= bound)


def small_run(setting: Setting, name: str, *words: str, launcher: tuple[str, ...] = ()) -> Path:
    """The quickstart's tokenizer, trained in <folder>/<name>."""
    out = setting.folder / name
    toy = TOY_MODEL if setting.toy else []
    run(*launcher, "tokenizer/train.py", *_once([*SMALL, "--run.log_every", "50", *toy, *words]), "--out", out)
    return out


def precision(setting: Setting) -> Iterator[Row]:
    """bf16 and fp16 against float32; two GPUs under DDP, or where there is one, NCCL alone, against none."""
    cases: dict[str, tuple[str, ...]] = {"no": (), "bf16": ()}
    if setting.device.type == "cuda":
        cases["fp16"] = ()
    ranks = min(2, max(1, torch.cuda.device_count()))
    launched = f"{ranks} process{'es' if ranks > 1 else ''}"
    cases[launched] = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    decibels = {}
    for name, launcher in cases.items():
        words = ["--run.mixed_precision", {launched: "bf16"}.get(name, name)]
        last = metrics_of(small_run(setting, f"precision-{name.replace(' ', '-')}", *words, launcher=launcher))[-1]
        decibels[name] = last["val_psnr"]
        gap = abs(decibels[name] - decibels["no"])
        yield Row(
            "precision", f"{name}: test PSNR beside float32's", f"{last['val_psnr']:.2f} dB", "+- 0.7", gap <= 0.7
        )
        skipped = last["skipped_steps"]
        yield Row("precision", f"{name}: steps skipped", str(skipped), "<= 20", skipped <= 20)


def resume(setting: Setting) -> Iterator[Row]:
    """SIGKILL after the first checkpoint, and the same command again."""
    out = setting.folder / "killed"
    toy, every = (TOY_MODEL, "4") if setting.toy else ([], "200")
    words = _once([*SMALL, "--run.log_every", "50", "--run.checkpoint_every", every, *toy, "--out", str(out)])
    with open(setting.folder / "killed.log", "w") as log:
        command = [sys.executable, "tokenizer/train.py", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + COMMAND_SECONDS
        while process.poll() is None and time.monotonic() < end and not any((out / "checkpoints").glob("step-*")):
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = run("tokenizer/train.py", *words)
    found = re.search(r"from step (\d+)", said)
    yield Row("resume", "goes on from step", found[1] if found else "0", "> 0", found is not None)
    steps = [row["step"] for row in metrics_of(out)]
    whole = steps == sorted(set(steps)) and (out / "tokenizer" / "config.json").exists()
    yield Row("resume", "metrics have each step once, and the tokenizer is there", str(whole), "True", whole)


def smoke(setting: Setting) -> Iterator[Row]:
    """Both stages of the default recipe on synthetic data, at full size, beside what common/plan.py computes."""
    tokenizer, dit = setting.folder / "smoke-tokenizer", setting.folder / "smoke-dit"
    epoch, steps, cached = ("16", "4", "32") if setting.toy else ("12800", "400", "12800")
    shared = ["--data.source", "synthetic", "--run.log_every", "2" if setting.toy else "20"]
    words = ["--schedule.epochs", "5", "--nsvq.freeze.latest", "3", "--nsvq.freeze.warmup", "1"]
    words += ["--nsvq.freeze.ramp", "1", "--nsvq.replace.after", "1"]
    words += ["--validation.images", "512", "--validation.statistics_images", "2048"]
    small = ["--config", "configs/imagenet128/dit-b.yaml"]
    if setting.toy:
        words += [*TOY_MODEL, "--loss.perceptual", "none"]
        small += ["--model.size", "tiny", "--model.depth", "1", "--run.batch_size", "8", "--run.workers", "0"]
        small += ["--data.image_size", "16", "--sampling.steps", "2", "--sampling.images", "4"]
    words += ["--schedule.epoch_samples", epoch]
    run("tokenizer/train.py", *_once([*shared, *words]), "--out", tokenizer, *setting.options)
    small += ["--tokenizer", str(tokenizer / "tokenizer"), "--cache_images", cached, "--steps", steps]
    run("diffusion/train.py", *small, *shared, "--optim.warmup_steps", "50", "--out", dit)
    for name, out, result in (("tokenizer", tokenizer, "tokenizer"), ("DiT-B", dit, "pipeline")):
        rows = metrics_of(out)
        speed = sorted(row["images_per_second"] for row in rows if "images_per_second" in row)
        there = any((out / result).glob("*.json"))
        yield Row("smoke", f"{name}: exported", str(there), "True", there)
        yield Row("smoke", f"{name}: steps skipped", str(rows[-1]["skipped_steps"]), "0", not rows[-1]["skipped_steps"])
        expected = _expected(name) if not setting.toy else None
        middle = speed[len(speed) // 2]
        bound = f">= half of {expected.images_per_second:,.0f}" if expected else "none"
        good = not expected or middle >= expected.images_per_second / 2
        yield Row("smoke", f"{name}: speed", f"{middle:,.1f} images/s", bound, good)
        if "mfu" in rows[-1]:
            yield Row("smoke", f"{name}: share of peak FLOP/s", f"{rows[-1]['mfu']:.1%}", "none", True)
        if expected and "memory_reserved_gib" in rows[-1]:
            reserved, most = rows[-1]["memory_reserved_gib"], 1.1 * expected.memory / plan.GIB
            yield Row("smoke", f"{name}: reserved memory", f"{reserved:.1f} GiB", f"<= {most:.1f}", reserved <= most)


def _once(words: list[str]) -> list[str]:
    """Options of which the last of each name counts."""
    named: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            named[word] = values = []
        else:
            values.append(word)
    return [word for name, values in named.items() for word in (name, *values)]


def _expected(name: str) -> plan.Outcome | None:
    """What common/plan.py computes for this GPU, where it knows it."""
    words = re.split("[ -]", torch.cuda.get_device_name())
    gpu = next((known for known in plan.MEMORY if known in words), None)
    if gpu is None:
        return None
    made = plan.read(plan.CONFIGS / f"{plan.STAGES[name]}.yaml", [])
    return plan.outcome(made, counting.count(made.make), gpu, 1)


SIZES = {"memory": (20, 8), "tokenizer": (32, 8), "dit": (64, 16)}  # in COMMANDS: on a card of 80 GB, on a smaller one
COMMANDS = [
    "benchmarks/codebook.py --sizes 16384 65536 --dims 8 128 --latents 32768 --rounds 5 --memory_limit {memory}",
    "benchmarks/tiles.py",
    "benchmarks/tokenizer_step.py --rounds 5 --batch {tokenizer}",
    "benchmarks/dit.py --sizes B --dtypes bfloat16 --tasks training --batch {dit}",
    "benchmarks/dit.py --sizes B --dtypes bfloat16 --tasks training --batch {dit} --compile",
    "benchmarks/dit.py --sizes B --dtypes bfloat16 --tasks sampling --batch 16",
    "benchmarks/autoregressive.py --sizes B --dtype bfloat16 --batch 32 --rounds 3 --peers dense generate",
    "benchmarks/layer.py",
    "benchmarks/data_loading.py --workers 0 4",
    "benchmarks/latent_loading.py --workers 0 4",
]
TOY_COMMANDS = [
    "benchmarks/tiles.py --latents 16 --codes 40 --dim 16 --rounds 1",
    "benchmarks/latent_loading.py --latents 2 4 4 --images 64 --workers 0 --batch 8 --rounds 1",
]


def benchmarks(setting: Setting) -> Iterator[Row]:
    """Each against its peer; the tables follow in the report."""
    on_gpu = setting.device.type == "cuda"
    small = on_gpu and torch.cuda.get_device_properties(setting.device).total_memory < 70 * plan.GIB
    sizes = {name: of_cards[small] for name, of_cards in SIZES.items()}
    for command in TOY_COMMANDS if setting.toy else [command.format(**sizes) for command in COMMANDS]:
        try:
            said = run(*command.split(), environment=None if on_gpu else {"TRITON_INTERPRET": "1"})
            yield Row("benchmarks", command, said, "it runs", True)
        except Failed as failed:
            yield Row("benchmarks", command, str(failed), "it runs", False)


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    part.__name__: part for part in (kernels, smoke, precision, resume, benchmarks, suite)
}


# The report


def machine(device: torch.device) -> list[str]:
    """Card, driver and versions."""
    lines = [f"- code: nsvq {code_version()}", f"- Python {platform.python_version()} on {platform.platform()}"]
    names = ("torch", "triton", "accelerate", "diffusers", "transformers")
    lines.append("- " + ", ".join(f"{name} {metadata.version(name)}" for name in names if _there(name)))
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
        except (OSError, IndexError):
            driver = "driver unknown: nvidia-smi does not answer"
        lines.insert(
            0, f"- {about.name}, {about.total_memory / plan.GIB:.1f} GiB, sm_{about.major}{about.minor}; {driver}"
        )
        lines.append(f"- CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    return lines


def _there(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def write(path: Path, device: torch.device, rows: list[Row], seconds: dict[str, float]) -> None:
    """The report so far: whoever stops it has what was done."""
    lines = ["# nsvq on a GPU", "", *machine(device), "", "| part | what | value | bound | |", "|---" * 5 + "|"]
    long = [row for row in rows if "\n" in row.value.strip()]
    for row in rows:
        value = "see below" if row in long else row.value.strip()
        lines.append(f"| {row.part} | {row.what} | {value} | {row.bound} | {'ok' if row.good else '**FAILED**'} |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())]
    for row in long:
        lines += ["", f"## {row.what}", "", row.value.strip() if row.good else f"```\n{row.value.strip()}\n```"]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu", help="of the runs and the report")
    parser.add_argument("--toy", action="store_true", help="small parts on any device")
    chosen, options = parser.parse_known_args()
    if not torch.cuda.is_available() and not chosen.toy:
        print("error: torch finds no NVIDIA GPU here: nothing was measured", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = chosen.folder / time.strftime("%Y%m%d-%H%M%S")  # runs of another start would be gone on with
    folder.mkdir(parents=True)
    setting, rows, seconds = Setting(device, chosen.toy, folder, options), list[Row](), dict[str, float]()
    for name in chosen.parts:
        began = time.monotonic()
        try:
            for row in PARTS[name](setting):
                rows.append(row)
                print(f"{'ok' if row.good else 'FAILED'}: {row.part}: {row.what}: {row.value[:200]}", flush=True)
        except Exception as error:  # a part's failure, of whatever kind, is what the report is for
            rows.append(Row(name, "runs to its end", f"{type(error).__name__}: {error}", "it does", False))
            print(f"FAILED: {name}: {error}", flush=True)
        seconds[name] = time.monotonic() - began
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the next part's processes
        write(chosen.folder / "report.md", device, rows, seconds)
    print(f"report: {chosen.folder / 'report.md'}")
    sys.exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    main()
