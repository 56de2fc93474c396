"""Results as one self-contained HTML page: numbers with their protocol, pictures, code use, and the curves of training.

python eval/page.py --results reconstruction.json probe.json generation.json --runs runs/nsvq --output page.html

Everything is inside of the file, pictures too: it can be sent, and opened without a network.
"""

import base64
import json
import math
import sys
from html import escape
from pathlib import Path

from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.errors import UserError
from nsvq.files import atomic_file
from nsvq.pipelines.card import compared_with, described, table_rows

_WIDTH, _HEIGHT, _LEFT = 300, 130, 50  # of a chart, and its margin for numbers, in pixels
_POINTS = 400  # of a curve
_NO_CURVES = ("step", "samples_seen", "epoch", "replaced_codes", "bad_images")
_SVG = '<svg width="{0}" height="{1}" viewBox="0 0 {0} {1}">'  # it shrinks with the page
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #1c1c1c; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
.number { font-variant-numeric: tabular-nums; text-align: right; font-weight: 600; white-space: nowrap; }
.note { color: #666; } .warning { background: #fff3cd; padding: .3em .6em; margin: .3em 0; }
img { max-width: 100%; min-width: min(300px, 100%); image-rendering: pixelated; border: 1px solid #ddd; }
svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; } h2 { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
.charts { display: flex; flex-wrap: wrap; gap: 14px; } figure { margin: 0; } figcaption { font-size: 13px; }
.grid { display: flex; gap: 8px; } .grid > :last-child { min-width: 0; }
.rows { display: flex; flex-direction: column; justify-content: space-around;
font-size: 13px; text-align: right; max-width: 200px; } svg text { font: 10px system-ui, sans-serif; fill: #666; }
@media (max-width: 600px) { .numbers tr { display: flex; flex-wrap: wrap; justify-content: space-between; }
.numbers .note { flex: 1 0 100%; } }
"""


class PageConfig(configs.Config):
    """Results of eval/ as one HTML page."""

    results: list[Path] = Field(description="Results of the scripts of eval/.", min_length=1)
    runs: list[Path] = Field([], description="Folders of training runs, whose metrics.jsonl gives the curves.")
    output: Path = Field(description="The page, an .html file.")


def read_result(path: Path) -> dict:
    """A result of eval/. Raises `UserError` where it is absent or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        how = f"run eval/reconstruction.py or eval/generation.py with --output {path}"
        raise UserError(f"no result at {path}: {how} ({error})") from None


def write_page(path: Path, results: list[dict], runs: list[Path]) -> None:
    """Write the page of `results` (as their JSON files hold them) and of the curves of the `runs`, in one step.

    A picture that is gone is left out, and the page says so. Raises `UserError` where the page cannot be written."""
    parts = [_result(result) for result in results] + [_curves(run) for run in runs]
    text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation</title><style>{_STYLE}</style></head><body><h1>Evaluation</h1>
{"".join(parts)}
</body></html>
"""
    try:
        with atomic_file(path) as part:
            part.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _result(result: dict) -> str:
    counts, data = result["counts"], result["data"]
    measured = counts.get("samples") or counts["images"]
    what = next(result[key]["folder"] for key in ("tokenizer", "pipeline", "images") if key in result)
    of = f"{measured} images, {data['image_size']} x {data['image_size']} pixels, {escape(compared_with(result))}"
    how = f"protocol <b>{result['protocol']}</b>, nsvq {result['versions']['nsvq']}, {result['created']}"
    parts = [f"<h2>{result['kind'].capitalize()}: {escape(what)}</h2>", f"<p>{of}; {how}</p>"]
    if setting := result.get("setting"):
        parts.append(f"<p>{described(setting).capitalize()}, {result['seeds']}.</p>")
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in result["warnings"]]
    parts.append("<table class='numbers'>")
    for name, number, note in table_rows(result):
        cell = f'<td class="number">{number}</td>'
        parts.append(f'<tr><td>{escape(name)}</td>{cell}<td class="note">{escape(note)}</td></tr>')
    parts.append("</table>")
    if sweep := result.get("sweep"):
        parts.append(_sweep(sweep))
    if histogram := result.get("usage_histogram"):
        parts += ["<h3>How often codes are used</h3>", _histogram(histogram)]
    for name, file in result.get("pictures", {}).items():
        by = f" by {result['ranked_by']}" if name != "random" and "ranked_by" in result else ""
        parts += [f"<h3>Reconstructions, {name}{by} (originals above)</h3>", _picture(Path(file))]
    if grid := result.get("grid"):
        names = "".join(f"<div>{escape(name)}</div>" for name in grid["rows"])
        parts.append(f"<h3>Samples by class</h3><div class='grid'><div class='rows'>{names}</div>")
        parts.append(_picture(Path(grid["file"])) + "</div>")
    parts.append(f"<details><summary>All that made these numbers</summary><pre>{escape(json.dumps(result, indent=1))}")
    return "\n".join([*parts, "</pre></details>"])


def _picture(path: Path) -> str:
    if not path.is_file():
        return f"<p class='note'>{escape(str(path))} is gone</p>"
    return f'<div><img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></div>'


def _sweep(sweep: list[dict]) -> str:
    names, swept = list(sweep[0]["metrics"]), [key for key in sweep[0] if key not in ("metrics", "grid")]
    table = "".join(f'<th class="number">{escape(name)}</th>' for name in (*swept, *names))
    for run in sweep:
        values = [*(f"{run[key]:g}" for key in swept), *(f"{run['metrics'][name]:.5g}" for name in names)]
        table += "</tr><tr>" + "".join(f'<td class="number">{value}</td>' for value in values)
    return f"<h3>All settings</h3><div class='wide'><table><tr>{table}</tr></table></div>"


def _histogram(bars: list[dict]) -> str:
    most, width, height, parts = max(bar["codes"] for bar in bars), 44, 160, []
    for i, bar in enumerate(bars):
        tall = height * bar["codes"] / most
        left, top, middle = i * width + 4, 20 + height - tall, i * width + width / 2
        parts += [
            f'<rect x="{left}" y="{top:.1f}" width="{width - 8}" height="{tall:.1f}" fill="#4477aa"/>',
            f'<text x="{middle}" y="{top - 5:.1f}" text-anchor="middle">{bar["codes"]}</text>',
            f'<text x="{middle}" y="{height + 33}" text-anchor="middle">{bar["from"]}</text>',
        ]
    parts.append(f'<text x="4" y="{height + 49}">times used, up to the next number; height: codes</text>')
    return f"{_SVG.format(max(5, len(bars)) * width, height + 54)}{''.join(parts)}</svg>"


def _curves(run: Path) -> str:
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"no curves at {path}: give the folder of a training run ({error})") from None
    charts = []
    for name in dict.fromkeys(name for line in lines for name in line if name not in _NO_CURVES):
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if len(points) > 1:
            charts.append(_chart(name, [*points[: -1 : max(1, len(points) // _POINTS)], points[-1]]))
    return f"<h2>Training: {escape(str(run))}</h2><div class='charts'>{''.join(charts)}</div>"


def _chart(name: str, points: list[tuple[float, float]]) -> str:
    xs, ys = zip(*points, strict=True)
    left, low = xs[0], min(ys)
    across, up = xs[-1] - left or 1, max(ys) - low or 1
    shares = [((x - left) / across, 1 - (y - low) / up) for x, y in points]
    line = " ".join(f"{_LEFT + (_WIDTH - _LEFT - 4) * x:.1f},{4 + (_HEIGHT - 8) * y:.1f}" for x, y in shares)
    return (
        f"<figure><figcaption><b>{escape(name)}</b> {ys[-1]:.5g}</figcaption>"
        f"{_SVG.format(_WIDTH, _HEIGHT + 16)}"
        f'<rect x="{_LEFT - 4}" width="{_WIDTH - _LEFT + 4}" height="{_HEIGHT}" fill="#f6f6f6"/>'
        f'<polyline points="{line}" fill="none" stroke="#4477aa" stroke-width="1.5"/>'
        f'<text x="{_LEFT - 8}" y="11" text-anchor="end">{max(ys):.4g}</text>'
        f'<text x="{_LEFT - 8}" y="{_HEIGHT - 1}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT + 12}" text-anchor="end">step {xs[-1]}</text></svg></figure>'
    )


def main() -> None:
    config = configs.parse(PageConfig, sys.argv[1:])
    write_page(config.output, [read_result(path) for path in config.results], config.runs)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    launch.run(main)
