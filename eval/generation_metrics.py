"""The numbers of a generation result: those that extractors, counts and the reference allow, and their meanings.

What cannot be computed is skipped, and the result says why.
"""

import math
from collections.abc import Sequence

import torch

from nsvq.eval import feature_statistics as statistics
from nsvq.eval.feature_statistics import ISC_SPLITS, KID_SUBSET, NEIGHBOURS, FeatureSet
from nsvq.eval.features import Extractor, metric_name
from nsvq.eval.reference import ADM_ROWS
from nsvq.eval.report import rank_warnings

_NAMES = {"fid": ("fid",), "sfid": ("sfid",), "isc": ("is",), "kid": ("kid",), "prc": ("precision", "recall")}
_OF_ROWS = {  # function, least images of each set
    "kid": (statistics.kid, KID_SUBSET),
    "prc": (statistics.precision_recall, NEIGHBOURS + 1),
}
_MEANINGS = {
    "fid": "Frechet distance of samples to real images",
    "sfid": "Frechet distance in ADM's spatial features, the first 7 channels of mixed_6/conv",
    "is": "Inception Score of the samples, mean of 10 splits of shuffled samples",
    "is_std": "standard deviation over the splits",
    "precision": f"share of samples within the {NEIGHBOURS}-neighbour manifold of real images",
    "recall": f"share of real images within the {NEIGHBOURS}-neighbour manifold of samples",
    "kid": "kernel distance of samples to real images, cubic kernel, mean of 100 subsets of 1,000",
    "kid_std": "standard deviation over the 100 subsets",
}


def names_of(metrics: Sequence[str], extractor: str) -> list[str]:
    """The names of all numbers of an extractor, for a result that has to say that they were skipped."""
    return [metric_name(name, extractor) for metric in metrics for name in _NAMES[metric]]


def add_metrics(
    result: dict,
    made: FeatureSet,
    real: FeatureSet,
    extractor: Extractor,
    metrics: Sequence[str],
    protocol: str,
    device: torch.device,
) -> None:
    """Add the numbers of one extractor, or why they are skipped, and warnings. Neighbours of 50,000
    samples are looked for on `device`: on a core of the CPU it would take minutes."""
    meanings = _MEANINGS | ({"is": "Inception Score, mean of blocks of 5,000 samples"} if protocol == "adm" else {})
    for metric in metrics:
        layer = extractor.layers.get(metric)
        why = _why_not(metric, made, real, layer)
        if layer is None:
            why = f"the extractor {extractor.name} has no outputs for it"
        if why is not None:
            result["skipped"] |= dict.fromkeys(names_of([metric], extractor.name), why)
            continue
        if metric == "isc":
            numbers = dict(zip(("is", "is_std"), made.inception_score, strict=True))
        elif metric in _OF_ROWS:
            where = device if metric == "prc" else "cpu"
            numbers = _OF_ROWS[metric][0](made.rows[layer].to(where), real.rows[layer].to(where))
        else:
            numbers = {metric: statistics.frechet_distance(made.gaussians[layer], real.gaussians[layer])}
            result["warnings"] += rank_warnings(metric_name(metric, extractor.name), made, real, layer)
        if metric == "prc" and protocol == "adm" and (count := len(real.rows[layer])) != ADM_ROWS:
            means = f"protocol adm means {ADM_ROWS} real images for precision and recall"
            result["warnings"].append(f"{means}, these are {count}")
        for name, value in numbers.items():
            honest = metric_name(name, extractor.name)
            result["metrics"][honest] = value
            result["meanings"][honest] = f"{meanings[name]}; features of {extractor.name}"


def _why_not(metric: str, made: FeatureSet, real: FeatureSet, layer: str | None) -> str | None:
    """Why the two sets do not allow a metric, None where they do."""
    if metric == "isc":
        return None if made.inception_score else f"needs at least {ISC_SPLITS} samples"
    if metric not in _OF_ROWS:
        if layer not in made.gaussians:
            return f"needs at least 2 samples, there are {made.count}"
        return None if layer in real.gaussians else "the reference holds no statistics for it"
    if layer not in real.rows:
        return "the reference holds no images to compare single ones with"
    counts, least = (len(made.rows[layer]), len(real.rows[layer])), _OF_ROWS[metric][1]
    if min(counts) < least:
        return f"needs at least {least} images on each side, there are {counts[0]} and {counts[1]}"
    return None


def best_setting(runs: list[dict]) -> dict:
    """The part of the result of the setting that it is of: the only one, or, beside the sweep, the one with the least
    first Frechet distance."""
    if len(runs) == 1:
        return runs[0]
    measured = [name for name in runs[0]["metrics"] if name.startswith(("fid", "fd_"))]
    best = min(runs, key=lambda run: run["metrics"].get(measured[0], math.inf)) if measured else runs[0]
    sweep = [{**run["setting"], "metrics": run["metrics"], "grid": run["grid"]} for run in runs]
    chosen = f"the least {measured[0]}" if measured else "the first"
    warning = f"the numbers are of the setting with {chosen} of {len(runs)}, chosen on this very reference"
    return best | {"sweep": sweep, "warnings": [warning, *best["warnings"]]}
