"""What a finished run of both stages gives: one table of its measurements, and where everything is.

python pipelines/summary.py --out runs/quickstart
Reads <out>/reconstruction.json and <out>/generation.json, and writes them into the model card of <out>/pipeline, and
with pictures and curves into the page <out>/report.html.
"""

import sys
from pathlib import Path

from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.eval.page import read_result, write_page
from nsvq.pipelines.card import compared_with, write_card

ROWS = {  # of each result: what to show, and how
    "reconstruction": {"psnr": "{:.2f} dB", "ssim": "{:.3f}"}
    | dict.fromkeys(("utilization", "perplexity_fraction"), "{:.1%}")
    | dict.fromkeys(("bits_per_token", "tokens_per_image"), "{:.0f}")
    | dict.fromkeys(("rfid", "rfd_"), "{:.2f}"),
    "generation": dict.fromkeys(("fid", "fd_", "is", "precision", "recall"), "{:.2f}") | {"class_accuracy": "{:.1%}"},
}


class SummaryConfig(configs.Config):
    """Show what a run of both stages gave."""

    out: Path = Field(description="Folder with nsvq/, the generator's, reconstruction.json and generation.json.")
    generator: str = Field("dit", description="Folder of the generator's run in it.")


def rows(result: dict) -> list[tuple[str, str]]:
    """(name, value) of the numbers that matter most; what was skipped, with the reason."""
    found = {
        name: style.format(value)
        for key, style in ROWS[result["kind"]].items()
        for name, value in result["metrics"].items()
        if value is not None and name.startswith(key) and "_std" not in name
    }
    skipped = {name: f"skipped: {why}" for name, why in result["skipped"].items() if name in ("rfid", "fid")}
    return [*found.items(), *skipped.items()]


def main() -> None:
    config = configs.parse(SummaryConfig, sys.argv[1:])
    results = {kind: read_result(config.out / f"{kind}.json") for kind in ROWS}
    write_card(config.out / "pipeline", {kind.capitalize(): result for kind, result in results.items()})
    page = config.out / "report.html"
    write_page(page, list(results.values()), [config.out / "nsvq", config.out / config.generator])
    lines = []
    for kind, result in results.items():
        images = result["counts"].get("samples") or result["counts"]["images"]
        lines += ["", f"{kind}, {images} images, {compared_with(result)}"]
        lines += [f"  {name:<28} {value}" for name, value in rows(result)]
    samples = {run: (config.out / run / "samples").glob("*.png") for run in ("nsvq", config.generator)}
    latest = {run: max(files, key=lambda path: path.stat().st_mtime) for run, files in samples.items()}
    places = {
        "reconstructions (originals above)": latest["nsvq"],
        "samples during training": latest[config.generator],
        "samples by class": config.out / "generation.png",
        "all of it as one page": page,
        "metrics": f"{config.out / 'nsvq/metrics.jsonl'} {config.out / config.generator / 'metrics.jsonl'}",
        "tokenizer": config.out / "tokenizer",
        "pipeline, with its model card": config.out / "pipeline",
    }
    lines += ["", *(f"{name:<34} {place}" for name, place in places.items())]
    print("\n".join(lines))


if __name__ == "__main__":
    launch.run(main)
