"""Code replacement (NSVQ, arXiv 2606.11363, C.3): a code that won nothing in an epoch moves onto an active one."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def replace_dead_codes(
    table: Tensor, counts: Tensor, *, weights: Tensor | None = None, noise: float, seed: int, **followers
) -> Tensor:
    """c_j <- c_s(j) + N(0, noise^2) for each code j with usage below 1; s(j) is an active code drawn by `weights` [K],
    the usage where none are given. table [K, d]; counts [K], summed over all ranks; `followers` as in `write_rows`.
    Draws depend on `seed` alone, so that all ranks end with the same table. Returns the rows that were replaced."""
    dead = torch.nonzero(counts < 1).flatten()
    active = torch.nonzero(counts >= 1).flatten()
    if len(dead) == 0 or len(active) == 0:
        return dead[:0]
    generator = torch.Generator().manual_seed(seed)
    # Inverse CDF in float64, because torch.multinomial takes at most 2^24 codes and float32 loses rare ones.
    cumulative = (counts if weights is None else weights)[active].cpu().double().cumsum(0)
    draws = torch.rand(len(dead), dtype=torch.float64, generator=generator) * cumulative[-1]
    sources = active[torch.searchsorted(cumulative, draws).clamp_(max=len(active) - 1).to(active.device)]
    offsets = noise * torch.randn(len(dead), table.shape[1], generator=generator)
    write_rows(table, dead, table[sources] + offsets.to(table), **followers)
    return dead


@torch.no_grad()
def write_rows(
    table: Tensor, rows: Tensor, values: Tensor, *, averages: Iterable[Tensor] = (), optimizer: Optimizer | None = None
) -> None:
    """table[rows] = values, in `averages` (EMA copies of the table) too; the `optimizer`'s moments of these rows are
    cleared, because they belong to the place that the rows left."""
    table[rows] = values
    for average in averages:
        average[rows] = values.to(average)
    for name, moment in (optimizer.state.get(table, {}) if optimizer is not None else {}).items():
        if name != "step":
            moment[rows] = 0
