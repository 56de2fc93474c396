"""Statistics of image features, streamed: float64 sums that add up over batches and ranks, and what is made of them.

A Frechet distance needs the count, the sum and the second moment of the features, and the Inception Score a few sums
for each split: neither keeps a feature. KID, precision and recall compare single features, and so keep one row an image
(float32, in the main process's memory). torch-fidelity defines the metrics, and its functions compute those of rows.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

KID_SUBSET = 1000  # images a subset, torch-fidelity's default
NEIGHBOURS = 3
ISC_SPLITS, _ISC_SEED = 10, 2020  # torch-fidelity's defaults
_ADM_ISC_BLOCK = 5000


@dataclass
class Gaussian:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


@dataclass
class FeatureSet:
    """What is known of the features of a set of images.

    `count`: images, None where a file does not say. `gaussians`: {layer: Gaussian}. `rows`: {layer: [N, D] float32}, in
    the order of the images, for the metrics that need single features; on the main process only. `inception_score`:
    (mean, standard deviation) over its splits, None where there are too few images."""

    count: int | None
    gaussians: dict[str, Gaussian]
    rows: dict[str, Tensor] = field(default_factory=dict)
    inception_score: tuple[float, float] | None = None


class Moments:
    """Count, sum and second moment of rows [B, D], in float64 on the rows' device."""

    def __init__(self):
        self.count = 0
        self.sum: Any = 0.0  # tensors from the first row on
        self.second: Any = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.second = self.second + rows.T @ rows

    def total(self, accelerator: Accelerator) -> tuple[int, Gaussian | None]:
        """(count, Gaussian) over all ranks, None of fewer than two rows. A collective call."""
        count = sum(gather_object([self.count]))
        if count < 2:
            return count, None
        mean, second = _total(self.sum, accelerator) / count, _total(self.second, accelerator)
        return count, Gaussian(mean, (second - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), arXiv 1706.08500, eq. 6.

    The trace of the root is the nuclear norm of S_a^(1/2) S_b^(1/2), which stays exact where a covariance has not full
    rank; square roots of the eigenvalues of S_a S_b turn rounding errors of 1e-16 there into 1e-8 each."""
    roots = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = torch.linalg.eigh(covariance)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.item()


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over splits of the images, from sums alone (arXiv 1606.03498).

    `splits` [N]: the split of each image, which `isc_splits` gives."""

    def __init__(self, splits: Tensor):
        self.splits, self.number = splits, int(splits.max()) + 1
        self.probability: Any = 0.0  # tensors from the first image on
        self.negentropy: Any = 0.0

    def add(self, logits: Tensor, index: Tensor) -> None:
        """Logits [B, C] of the images with the numbers `index` [B]."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        one_hot = torch.nn.functional.one_hot(self.splits[index], self.number).to(p)  # (B, splits)
        self.probability = self.probability + one_hot.T @ p
        self.negentropy = self.negentropy + one_hot.T @ (p * log_p).sum(1)

    def total(self, accelerator: Accelerator) -> tuple[float, float]:
        """(mean, standard deviation) of the splits' scores over all ranks. A collective call."""
        probability, negentropy = _total(self.probability, accelerator), _total(self.negentropy, accelerator)
        counts = torch.bincount(self.splits, minlength=self.number).double()
        q = probability / counts[:, None]
        scores = (negentropy / counts - torch.special.xlogy(q, q).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def _total(value: Tensor | float, accelerator: Accelerator) -> Tensor:
    """The sum of float64 tensors over all ranks, on the CPU; a number stands for a rank that has had no image."""
    shape = max(gather_object([tuple(value.shape) if isinstance(value, Tensor) else ()]))
    summed = value if isinstance(value, Tensor) else torch.zeros(shape, dtype=torch.float64)
    return accelerator.reduce(summed.to(accelerator.device), "sum").cpu()


def isc_splits(count: int, adm: bool = False) -> Tensor | None:
    """The split [N] of each of `count` images: torch-fidelity's ten of shuffled images, or ADM's of 5,000 consecutive
    ones. None where there are too few images for it."""
    if adm:
        return torch.arange(count) // _ADM_ISC_BLOCK
    if count < ISC_SPLITS:
        return None
    order = np.random.RandomState(_ISC_SEED).permutation(count)
    splits = torch.empty(count, dtype=torch.int64)
    for i in range(ISC_SPLITS):
        splits[order[i * count // ISC_SPLITS : (i + 1) * count // ISC_SPLITS]] = i
    return splits


def kid(made: Tensor, real: Tensor) -> dict[str, float]:
    """Kernel distance (arXiv 1801.01401) of rows [N, D], N >= 1000 on each side: cubic kernel, 100 subsets of 1,000."""
    result = kid_features_to_metric(made, real, kid_subset_size=KID_SUBSET, verbose=False)
    return {"kid": result[KEY_METRIC_KID_MEAN], "kid_std": result[KEY_METRIC_KID_STD]}


def precision_recall(made: Tensor, real: Tensor) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991) of rows [N, D] with 3 neighbours, N >= 4 on each side. Distances
    are computed on the rows' device."""
    # In parts: all distances of 50,000 against 50,000 images at once would take 10 GB, several times.
    result = prc_features_to_metric(made, real, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": result[KEY_METRIC_PRECISION], "recall": result[KEY_METRIC_RECALL]}
