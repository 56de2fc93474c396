"""Sums, rows and random numbers over all ranks, so that R ranks with N tokens each behave as one with R N.

Tokens are numbered over all ranks: rank r holds r N to (r + 1) N - 1."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    value = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over all ranks, with the gradient of this rank's own value: what DDP, which averages gradients over
    ranks, needs to get the gradient of a function of the global mean."""
    ranks = world()[1]
    return value if ranks == 1 else value + (total(value) / ranks - value).detach()


def rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens at `positions` [n], which are numbers over all ranks, from this rank's `tokens` [N, d] and the others'."""
    local = positions - world()[0] * len(tokens)
    mine = (local >= 0) & (local < len(tokens))
    found = torch.where(mine[:, None], tokens[local.clamp(0, len(tokens) - 1)], 0)
    return total(found)


class Draws(nn.Module):
    """Random numbers for tokens: a function of a seed, of how often they were drawn, and of the token's number over all
    ranks. Seed and count are buffers, and so part of a checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.stack([torch.randint(2**31, ()), torch.tensor(0)]))
        self._known: list[int] | None = None  # `state`, on the host

    def generator(self) -> torch.Generator:
        """The same on all ranks; in training another one at each call, in evaluation always the same one."""
        if self._known is None:  # asked of the GPU once, since the host would wait for each answer
            self._known = self.state.tolist()
        seed, count = self._known
        if self.training:
            self.state[1] += 1
            self._known = [seed, count + 1]
        return torch.Generator().manual_seed((seed << 31) + (count + 1 if self.training else 0))

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._known = None

    def uniform(self, generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
        """U[0, 1) of [N, *shape] for the N tokens `like` of this rank."""
        rank, ranks = world()
        return torch.rand(ranks, len(like), *shape, generator=generator)[rank].to(like.device, non_blocking=True)

    def normal(self, generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
        """N(0, 1), the same."""
        rank, ranks = world()
        return torch.randn(ranks, len(like), *shape, generator=generator)[rank].to(like.device, non_blocking=True)
