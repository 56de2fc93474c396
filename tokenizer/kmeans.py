"""k-means on points that may lie on several ranks and be read as a stream (k-means++, Lloyd)."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nsvq.tokenizer import ranks
from nsvq.tokenizer.codebook import nearest_code

_SEEDING_POINTS = 16  # a code, which the start is drawn from


@torch.no_grad()
def kmeans(
    batches: Callable[[], Iterable[Tensor]],
    k: int,
    *,
    seed: int,
    start: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-3,
    on_iteration: Callable[[Tensor], None] = lambda centroids: None,
) -> Tensor:
    """Centroids [K, d] float32 of the points that `batches()` goes through, tensors [n, d], on all ranks together
    (of which each has a batch, if only of none).

    Starts from `start`, else by k-means++ on the first points of rank 0 (where it has too few, of the others too),
    their squared distances clipped at the 90th percentile (VP-VAE's code). Ends when no iteration is left or the
    centroids move by less than `tolerance` of their deviation in all (Frobenius norm). A centroid without points goes
    beside one of the fullest. Raises `ValueError` on all ranks for fewer points than centroids."""
    generator = torch.Generator().manual_seed(seed)
    centroids = _seed(batches, k, generator) if start is None else start
    for _ in range(iterations):
        sums, counts = centroids.new_zeros(centroids.shape).double(), centroids.new_zeros(k).double()
        for points in batches():
            points = points.to(centroids)
            nearest = nearest_code(points, centroids)
            sums.index_add_(0, nearest, points.double())
            counts += torch.bincount(nearest, minlength=k)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids.double()).float()
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            fullest = counts.topk(min(len(empty), k - len(empty))).indices
            beside = moved[fullest[torch.arange(len(empty), device=fullest.device) % len(fullest)]]
            noise = torch.randn(beside.shape, generator=generator).to(beside)
            moved[empty] = beside + 1e-3 * moved[counts > 0].std(correction=0) * noise
        shift, deviation = (moved - centroids).norm(), (moved - moved.mean(0)).square().mean().sqrt()
        centroids = moved
        on_iteration(centroids)
        if float(shift) <= tolerance * float(deviation):
            break
    return centroids


def _seed(batches: Callable[[], Iterable[Tensor]], k: int, generator: torch.Generator) -> Tensor:
    found, count = [], 0
    for points in batches():
        found.append(points.float())
        count += len(points)
        if count >= _SEEDING_POINTS * k:
            break
    points = torch.cat(found)[: _SEEDING_POINTS * k] if found else torch.zeros(0, 1)
    with ranks.unequal():
        counts = ranks.counts(points)
        if (total := sum(counts)) < k:
            raise ValueError(f"k-means needs at least as many points as centroids: {total} < {k}")
        if counts[0] < k:
            points = ranks.rows(points, torch.arange(min(total, _SEEDING_POINTS * k), device=points.device))
    first = int(torch.randint(max(len(points), 1), (), generator=generator))
    draws = torch.rand(k - 1, generator=generator, dtype=torch.float64).tolist()
    centroids = _plus_plus(points, first, draws) if ranks.world()[0] == 0 else points.new_empty(k, points.shape[1])
    if dist.is_initialized():
        dist.broadcast(centroids, 0)
    return centroids


def _plus_plus(points: Tensor, first: int, draws: list[float]) -> Tensor:
    centered = points - points.mean(0)
    norms = centered.square().sum(1)
    chosen = [first]
    distances = points.new_full((len(points),), torch.inf)
    for draw in draws:
        last = chosen[-1]
        to_last = torch.addmv(norms + norms[last], centered, centered[last], alpha=-2)  # one pass over the points
        distances = torch.minimum(distances, to_last.clamp_(min=0))
        distances[last] = 0
        clipped = distances.clamp(max=distances.kthvalue(math.ceil(0.9 * len(points))).values)
        cumulative = clipped.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(cumulative, draw * cumulative[-1])), len(points) - 1))
    return points[chosen].clone()
