"""Tokens as features: how well a linear probe and k nearest neighbours tell classes from a tokenizer's codes.

accelerate launch eval/probe.py --tokenizer runs/nsvq/tokenizer --data ILSVRC/imagenet-1k --output probe.json
accelerate launch eval/probe.py --tokenizer DIR --data synthetic --train_limit 2000 --grid 2 --output probe.json

The features of an image are its code vectors, averaged over the image or over each of its quarters. Both classifiers
are fitted to the training split in float64, and measured on the test split. The protocol is in docs/evaluation.md.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.image_metrics import from_uint8, to_uint8
from nsvq.data.bad_images import BadImages
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError
from nsvq.eval import report
from nsvq.eval.autoencoders import encode
from nsvq.eval.config import ProbeConfig
from nsvq.eval.distributed import gather_by_index, in_groups
from nsvq.eval.reference import bad_images, real_batches
from nsvq.tokenizer.pretrained import Tokenizer, open_tokenizer

TEMPERATURE = 0.07  # of the neighbours' votes, as DINO has it (arXiv 2104.14294)
_AT_ONCE = 2**25  # elements of a matrix: 256 MiB in float64
_LARGEST_GRADIENT = 1e-6  # of a fitted probe

MEANINGS = {
    "linear_accuracy": "share of test images that a linear classifier of the features puts into their class",
    "linear_accuracy_train": "the same of the images that it was fitted to",
    "knn_accuracy": "share of test images that the nearest training images, by cosine, put into their class",
    "majority": "share of the largest class among the test images, which a guess would reach",
    "features": "width of the features",
}


def pooled(tokenizer: Tokenizer, images: Tensor, grid: int) -> Tensor:
    """Features [B, d grid^2] of images [B, 3, H, W] in [-1, 1]: means of code vectors over grid x grid parts. Of an
    `AutoencoderKL`, which has no codes, of its latents."""
    found = encode(tokenizer, images)
    vectors = tokenizer.codebook[found["indices"]].permute(0, 3, 1, 2) if "indices" in found else found["z"]
    return F.adaptive_avg_pool2d(vectors.double(), grid).flatten(1).float()  # (B, d, h, w) -> (B, d grid^2)


def fit_linear(features: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression by L-BFGS: features float64 [N, D], labels [N] below C = `classes` ->
    (weights [C, D], biases [C], largest element of the gradient there).

    It minimises the mean cross-entropy + l2 / 2 times the sum of squared weights, biases apart: scikit-learn's
    `LogisticRegression` at C = 1 / (N l2)."""
    weight, bias = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        max_eval=2000,
        tolerance_grad=_LARGEST_GRADIENT,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, _AT_ONCE // classes)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = l2 / 2 * weight.square().sum()
        total.backward()
        for x, y in zip(features.split(rows), labels.split(rows), strict=True):
            part = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum") / len(features)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(loss)
    loss()
    return weight.detach(), bias.detach(), max(p.grad.abs().max().item() for p in parameters)


def nearest_classes(features: Tensor, labels: Tensor, queries: Tensor, classes: int, neighbours: int) -> Tensor:
    """The class [M] of each of `queries` [M, D]: the `neighbours` of `features` [N, D] with the largest cosine vote for
    their `labels` [N] with weight exp(cosine / 0.07), as in DINO (arXiv 2104.14294)."""
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    found = []
    for part in queries.split(max(1, _AT_ONCE // len(features))):
        cosines, nearest = (part @ features.T).topk(neighbours, dim=1)
        votes = part.new_zeros(len(part), classes)
        found.append(votes.scatter_add_(1, labels[nearest], (cosines / TEMPERATURE).exp()).argmax(1))
    return torch.cat(found)


def evaluate(config: ProbeConfig, accelerator: Accelerator) -> dict | None:
    """Measure `config.tokenizer` over all ranks; returns the result on the main process, None on the others. Raises
    `UserError` or `UsageError` for a tokenizer, data or sizes that do not work."""
    tokenizer = open_tokenizer(config.tokenizer).to(accelerator.device)
    data = report.data_for(tokenizer, config.data)
    classes = open_split(data, "train").classes
    if len(classes) < 2:
        raise UserError(f"{data.source} has fewer than two classes to tell apart (data.label_column names labels)")
    if open_split(data, "test").classes != classes:
        raise UserError(f"the test split of {data.source} has other classes than its training split")
    result: dict[str, Any] = {"kind": "probe", "protocol": "ours", **report.no_numbers()}
    limits, rows, counts = {"train": config.train_limit, "test": config.limit}, {}, {}
    for split, limit in limits.items():
        rows[split], counts[split] = _features(tokenizer, data, split, limit, config, accelerator)
    if rows["train"] is None:
        return None
    for split, found in rows.items():
        if not len(found.get("label", ())):
            raise UserError(f"the {split} split of {data.source} holds no labelled image that decodes")
    count = len(rows["train"]["label"])
    if config.neighbours > count:
        raise UsageError(f"--neighbours {config.neighbours}: there are only {count} training images")
    _add_accuracies(result, rows, len(classes), config, accelerator.device)
    return result | {
        "counts": {"images": len(rows["test"]["label"]), **counts["test"]},
        "train_counts": {"images": count, **counts["train"]},
        "data": report.about_data(data, "test"),
        "train_data": report.about_data(data, "train"),
        "tokenizer": {"folder": config.tokenizer, "sha256": tokenizer.fingerprint()},
        "pooled": "mean code vectors" if tokenizer.codebook_size else "mean latents, as there are no codes",
        "precision": "float32, and float64 from the features on",
        **report.provenance(accelerator, config.model_copy(update={"data": data})),
    }


def _features(
    tokenizer: Tokenizer, data: DataConfig, split: str, limit: int | None, config: ProbeConfig, accelerator: Accelerator
) -> tuple[dict[str, Tensor] | None, dict]:
    """Rows "features", "label", "index" of a split's labelled images, on the main process; and what did not decode."""
    bad, batches = BadImages(data.max_bad_fraction, accelerator), []
    for batch in real_batches(data, split, limit, accelerator, f"{split} features", **config.loading):
        bad.update(batch)
        if len(batch["image"]):
            images = from_uint8(to_uint8(batch["image"].to(accelerator.device)))
            features = in_groups(lambda group: pooled(tokenizer, group, config.grid), images)
            labelled = batch["label"] >= 0
            found = {"features": features.cpu(), "label": batch["label"], "index": batch["index"]}
            batches.append({name: values[labelled] for name, values in found.items()})
    unreadable = bad_images(bad)
    return gather_by_index(accelerator, batches), unreadable


def _add_accuracies(result: dict, rows: dict[str, dict], classes: int, config: ProbeConfig, device) -> None:
    features = [part["features"].to(device).double() for part in rows.values()]
    (x, test_x), (y, test_y) = features, (part["label"].to(device) for part in rows.values())
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std == 0] = 1  # a feature that never changes says nothing, whatever its scale
    x, test_x = (x - mean) / std, (test_x - mean) / std
    weight, bias, gradient = fit_linear(x, y, classes, config.l2)
    if gradient > _LARGEST_GRADIENT:
        result["warnings"].append(f"the linear probe has not converged (gradient {gradient:.1e}): raise --l2")
    nearest = nearest_classes(x, y, test_x, classes, config.neighbours)
    right = {
        "linear_accuracy": F.linear(test_x, weight, bias).argmax(1) == test_y,
        "linear_accuracy_train": F.linear(x, weight, bias).argmax(1) == y,
        "knn_accuracy": nearest == test_y,
        "majority": test_y == test_y.bincount().argmax(),
    }
    metrics = {name: each.double().mean().item() for name, each in right.items()}
    report.add(result, metrics | {"features": x.shape[1]}, MEANINGS)


def main() -> None:
    config = configs.parse(ProbeConfig, sys.argv[1:])
    accelerator = report.start(config.output)
    result = evaluate(config, accelerator)
    if result is not None:
        report.write(config.output, result)
        trained, counts, data = result["train_counts"], result["counts"], result["data"]
        of = f"{counts['images']} test images of {data['source']}, {data['image_size']} px"
        print(report.table(f"{of}, fitted to {trained['images']} training images, by {config.tokenizer}", result))
        print(f"wrote {config.output}")


if __name__ == "__main__":
    launch.run(main)
