"""The page of a study, from the metrics and curves of its runs: a table, a comparison seed by seed, plots."""

import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path

from evidence_study import COLUMNS, Study
from measure import of_bench


def table(rows: dict[str, list[dict]], columns: list[str]) -> str:
    """Markdown: one line a run; means over seeds, with the standard deviation where there are several."""
    names = {}
    for column in columns:
        found = {m for runs in rows.values() for run in runs for m in run if _is(m, column)}
        names |= {m: (_heading(m, column), COLUMNS[column][1]) for m in sorted(found)}
    lines = [
        "| run | seeds | " + " | ".join(heading for heading, _ in names.values()) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, runs in rows.items():
        cells = [_spread([run[m] for run in runs if m in run], style) for m, (_, style) in names.items()]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is(metric: str, column: str) -> bool:
    return metric == column or (column in ("lpips_", "rf", "fd_at_", "accuracy_at_") and metric.startswith(column))


def _heading(metric: str, column: str) -> str:
    return COLUMNS[column][0].format(metric.removeprefix(column))


def _distances(runs: Iterable[dict]) -> dict[str, str]:
    """The Frechet distances that runs have, with their headings."""
    names = sorted({m for run in runs for m in run})
    return {m: _heading(m, column) for column in ("rf", "fd_at_") for m in names if _is(m, column)}


def _spread(values: list[float], style: str) -> str:
    if not values:
        return "-"
    deviation = f" ± {style.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else ""
    return style.format(statistics.mean(values)) + deviation


def comparison(by_seed: dict[str, dict[int, dict]], against: str, peers: dict[str, str]) -> str:
    """Markdown: each row minus (or divided by) its peer, which is of the run `against`, at the same seed; mean and
    standard deviation over seeds."""
    distances = _distances(run for runs in by_seed.values() for run in runs.values())
    parts = {"psnr": ("PSNR, dB", float.__sub__, "{:+.2f}")}
    parts |= {"relative_error": ("MSE / mean z²", float.__truediv__, "{:.2f}x")}
    parts |= {m: (heading, float.__truediv__, "{:.2f}x") for m, heading in distances.items()}
    lines = [
        f"| against {against} | seeds | " + " | ".join(heading for heading, _, _ in parts.values()) + " |",
        "|---" * (len(parts) + 2) + "|",
    ]
    for name, runs in by_seed.items():
        peer = by_seed.get(peers[name], {})
        pairs = [(run, peer[seed]) for seed, run in runs.items() if seed in peer]
        if name == peers[name] or not pairs:
            continue
        cells = [
            _spread([f(float(a[m]), float(b[m])) for a, b in pairs if m in a and m in b], style)
            for m, (_, f, style) in parts.items()
        ]
        lines.append(f"| {name} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(by_seed: dict[str, dict[int, dict]], curves: dict[str, list[list[dict]]], keys: list[str], path: Path) -> None:
    """SVG: a dot a run and seed for PSNR, FD, relative error and utilization, then a panel for each key of the logs."""
    matplotlib = of_bench("matplotlib")
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "nsvq"}  # text as text, and equal files twice
    found = [run for runs in by_seed.values() for run in runs.values()]
    headings = {m: COLUMNS[m][0] for m in ("psnr", "relative_error", "utilization")} | _distances(found)
    metrics = [m for m in headings if all(m in run for run in found)]
    rows = 1 + -(-len(keys) // 2)
    figure = Figure(figsize=(12, max(2.5, 0.32 * len(by_seed) + 1) + 3.2 * (rows - 1)), layout="constrained")
    heights = [max(2.5, 0.32 * len(by_seed) + 1)] + [3.2] * (rows - 1)
    parts = figure.subfigures(rows, 1, height_ratios=heights, squeeze=False)[:, 0]
    names = list(by_seed)
    for axes, metric in zip(parts[0].subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        for i, name in enumerate(names):
            axes.plot([run[metric] for run in by_seed[name].values()], [i] * len(by_seed[name]), "o", alpha=0.7)
        axes.set_xlabel(headings[metric])
        if metric == "relative_error":
            axes.set_xscale("log")
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


def write_page(study: Study, records: dict[str, dict[int, dict]], command: list, page: Path) -> None:
    """`page` and its .svg from records by run and seed; `command` is what makes it."""
    by_seed = {name: {seed: r["metrics"] for seed, r in runs.items()} for name, runs in records.items() if runs}
    lacking = [
        f"{name} ({', '.join(map(str, missing))})"
        for name, runs in records.items()
        if (missing := [seed for seed in study.seeds if seed not in runs])
    ]
    found = [r for runs in records.values() for r in runs.values()]
    parts = [f"# {study.title}", study.question, f"    {shlex.join(map(str, command))}"]
    if lacking:
        parts.append(f"Not run yet, by seed: {'; '.join(lacking)}.")
    if found:
        plot(
            by_seed,
            {n: [r["curve"] for r in runs.values()] for n, runs in records.items()},
            study.curves,
            page.with_suffix(".svg"),
        )
        parts.append(table({name: list(runs.values()) for name, runs in by_seed.items()}, study.columns))
        if study.against:
            parts.append(comparison(by_seed, study.against, study.peers()))
        parts.append(f"![dots and curves]({page.stem}.svg)")
        machines = sorted({r["machine"] for r in found})
        rows = study.rows()
        of_run = {
            run: [r for row, rs in records.items() if rows[row][0] == run for r in rs.values()] for run in study.runs
        }
        parts.append(
            "\n".join(f"- {name}: `{_flat(study.runs[name])}`{_on(runs, machines)}" for name, runs in of_run.items())
        )
        common = _with(study.common)
        for name, generator in study.generators.items():
            common += f"; on it {name}: `{generator.config}`{_with(generator.common)}"
            common += f", measured with {_flat(generator.samples)}"
        names = [f"({i}) {m}" if machines[1:] else m for i, m in enumerate(machines, 1)]
        parts.append(
            f"Base: `{study.base}`{common}. Code: {', '.join(sorted({r['code'] for r in found}))}. Machine: "
            f"{'; '.join(names)}."
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n")


def _on(runs: Iterable[dict], machines: list[str]) -> str:
    """The numbers of the machines that these ran on, where there are several: metrics differ a little between them."""
    numbers = sorted({str(machines.index(run["machine"]) + 1) for run in runs})
    return f" on machine {', '.join(numbers)}" if numbers and machines[1:] else ""


def _with(common: dict) -> str:
    return f" with {_flat(common)}" if common else ""


def _flat(changes: dict, prefix: str = "") -> str:
    """A nested config on one line."""
    leaves = []
    for key, value in changes.items():
        shown = "null" if value is None else value
        leaves.append(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key} {shown}")
    return ", ".join(leaves) or "as the base"
