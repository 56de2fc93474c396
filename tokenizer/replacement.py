"""Code replacement (NSVQ, arXiv 2606.11363, C.3): a code that won nothing in an epoch moves onto an active one."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def replace_dead_codes(
    table: Tensor,
    counts: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    averages: Iterable[Tensor] = (),
    noise: float,
    seed: int,
) -> Tensor:
    """c_j <- c_s(j) + N(0, noise^2) for each code j with usage below 1; s(j) is an active code drawn by usage.

    table [K, d]; counts [K], summed over all ranks; `averages` are EMA copies of the table, which follow. Adam's
    moments of a replaced row are cleared, because they belong to the place that it left. Draws depend on `seed`
    alone, so that all ranks end with the same table. Returns the rows that were replaced.
    """
    dead = torch.nonzero(counts < 1).flatten()
    active = torch.nonzero(counts >= 1).flatten()
    if len(dead) == 0 or len(active) == 0:
        return dead[:0]
    generator = torch.Generator().manual_seed(seed)
    # Inverse CDF in float64, because torch.multinomial takes at most 2^24 codes and float32 loses rare ones.
    cumulative = counts[active].cpu().double().cumsum(0)
    draws = torch.rand(len(dead), dtype=torch.float64, generator=generator) * cumulative[-1]
    sources = active[torch.searchsorted(cumulative, draws).clamp_(max=len(active) - 1).to(active.device)]
    offsets = noise * torch.randn(len(dead), table.shape[1], generator=generator)
    table[dead] = table[sources] + offsets.to(table)
    for average in averages:
        average[dead] = table[dead].to(average)
    for name, moment in optimizer.state.get(table, {}).items():
        if name != "step":
            moment[dead] = 0
    return dead
