"""Sums, rows and random numbers over all ranks, so that R ranks with N tokens each behave as one with R N.

Tokens are numbered over all ranks: those of rank 0 first, then those of rank 1, and so on."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

_alone = _unequal = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank computes as if it were the only one, and waits for no other."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    value = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over all ranks, with the gradient of this rank's own value: what DDP, which averages gradients over
    ranks, needs to get the gradient of a function of the global mean. Without a gradient it is the same to the bit on
    every rank, as what is kept from step to step must be."""
    ranks = world()[1]
    if ranks == 1:
        return value
    mean = total(value) / ranks
    return value + (mean - value).detach() if value.requires_grad else mean


@contextlib.contextmanager
def unequal() -> Iterator[None]:
    """Inside, ranks may hold different numbers of tokens, and so have to ask each other for them."""
    global _unequal
    _unequal = True
    try:
        yield
    finally:
        _unequal = False


def counts(tokens: Tensor) -> list[int]:
    """How many tokens each rank holds, from this rank's `tokens` [N, d]."""
    rank, ranks = world()
    if not _unequal or ranks == 1:
        return [len(tokens)] * ranks
    found = torch.zeros(ranks, dtype=torch.int64, device=tokens.device)
    found[rank] = len(tokens)
    return total(found).tolist()


def rows(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens at `positions` [n], which are numbers over all ranks, from this rank's `tokens` [N, d] and the others'."""
    local = positions - sum(counts(tokens)[: world()[0]])
    mine = (local >= 0) & (local < len(tokens))
    there = tokens if len(tokens) else tokens.new_zeros(1, tokens.shape[1])
    return total(torch.where(mine[:, None], there[local.clamp(0, len(there) - 1)], 0))


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass: then activation checkpointing repeats a forward there, which must
    count, draw and move nothing again. A compiled graph repeats no Python."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Draws(nn.Module):
    """Random numbers for tokens: a function of a seed, of how often they were drawn, and of the token's number over all
    ranks. Seed and count are buffers, and so part of a checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.stack([torch.randint(2**31, ()), torch.tensor(0)]))
        self._known: tuple[int, int, int] | None = None  # version of `state`, and its values, on the host

    def generator(self) -> torch.Generator:
        """The same on all ranks; in training another one at each call, in evaluation always the same one. What repeats
        a forward has that forward's."""
        if self._known is None or self._known[0] != self.state._version:  # asked of the GPU no more than it must be
            self._known = (self.state._version, *self.state.tolist())
        _, seed, count = self._known
        if self.training and not in_backward():
            self.state[1] += 1
            count += 1
            self._known = (self.state._version, seed, count)
        return torch.Generator().manual_seed((seed << 31) + (count if self.training else 0))

    def uniform(self, generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
        """U[0, 1) of [N, *shape] for the N tokens `like` of this rank."""
        rank, ranks = world()
        return torch.rand(ranks, len(like), *shape, generator=generator)[rank].to(like.device, non_blocking=True)

    def normal(self, generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
        """N(0, 1), the same."""
        rank, ranks = world()
        return torch.randn(ranks, len(like), *shape, generator=generator)[rank].to(like.device, non_blocking=True)
