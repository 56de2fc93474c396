"""The README's pictures: samples of each class and reconstructions of a finished quickstart, and curves of studies.

make quickstart                                  # or with GENERATOR=autoregressive
python benchmarks/evidence.py --study configs/evidence/short.yaml
python benchmarks/pictures.py --quickstart runs/quickstart
All images are synthetic. The curves are those of docs/evidence/records.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from evidence_study import read_study, training_config
from measure import of_bench
from pydantic import Field
from torchvision.utils import save_image

from nsvq import ClassConditionalPipeline, Tokenizer
from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.data.batches import fixed_images
from nsvq.data.config import DataConfig
from nsvq.errors import UserError

STUDIES = Path("configs/evidence")


class PicturesConfig(configs.Config):
    """Draw the README's pictures."""

    quickstart: Path = Field(Path("runs/quickstart"), description="Folder of a finished quickstart.")
    records: Path = Field(Path("docs/evidence/records"), description="Folder of the studies' records.")
    out: Path = Field(Path("docs/pictures"), description="Folder of the pictures.")


def curves(study: str, names: list[str], key: str, records: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each run, (step, value of `key`): means over the seeds that have run."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    asked = read_study(STUDIES / f"{study}.yaml")
    curves = {}
    for name in names:
        by_step: dict[int, list[float]] = {}
        for seed in asked.seeds:
            values = training_config(asked, name, seed, DataConfig())
            for record in found:
                if record["config"] | {"data": None} == values | {"data": None}:
                    for line in record["curve"]:
                        if key in line:
                            by_step.setdefault(line["step"], []).append(line[key])
        curves[name] = [(step, statistics.mean(values)) for step, values in sorted(by_step.items())]
    return curves


def plot(panels: list[tuple[str, str, dict[str, list[tuple[float, float]]]]], path: Path) -> None:
    """Panels side by side: (title, unit, {name: points})."""
    matplotlib = of_bench("matplotlib")
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "nsvq"}
    figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
    for axes, (title, unit, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in found.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


@torch.no_grad()
def main() -> None:
    config = configs.parse(PicturesConfig, sys.argv[1:])
    for needed in ("tokenizer/config.json", "pipeline/model_index.json"):
        if not (config.quickstart / needed).is_file():
            what = f"{config.quickstart} is no finished quickstart (it has no {needed})"
            raise UserError(f"{what}: run `make quickstart` first, or give its OUT as --quickstart")
    config.out.mkdir(parents=True, exist_ok=True)
    ratio = {
        key: curves("ratio", ["nsvq", "nsvq-paper-fast", "nsvq-paper", "fvq", "simvq-fast"], key, config.records)
        for key in ("val_psnr", "utilization")
    }
    panels = [("validation PSNR", "dB", ratio["val_psnr"]), ("codes in use in an epoch", "share", ratio["utilization"])]
    plot(panels, config.out / "ratio.svg")
    used = curves("short", ["nsvq", "vq"], "utilization", config.records)
    plot([("codes in use in an epoch", "share", used)], config.out / "collapse.svg")

    tokenizer = Tokenizer.from_pretrained(config.quickstart / "tokenizer")
    images = fixed_images(DataConfig(source="synthetic", image_size=64), "test", 10)
    shown = torch.cat([images, tokenizer.decode(tokenizer.encode(images))])
    save_image(shown / 2 + 0.5, config.out / "reconstructions.png", nrow=10)

    pipeline = ClassConditionalPipeline.from_pretrained(config.quickstart / "pipeline")
    labels = [label for _ in range(2) for label in pipeline.id2label]
    steps = {} if isinstance(pipeline, TokenPipeline) else {"num_inference_steps": 25}
    samples = pipeline(labels, guidance_scale=3.0, **steps, seeds=range(len(labels)), output_type="pt")
    save_image(samples.images, config.out / "samples.png", nrow=len(pipeline.id2label))
    for file in sorted(config.out.iterdir()):
        print(f"{file}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    launch.run(main)
