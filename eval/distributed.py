"""Several ranks as one: builds in turn, equal groups for the networks, and the rows of all images brought together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from nsvq.errors import UserError

_GATHER_ROWS = 4096  # rows of each rank that are sent at once

T = TypeVar("T")


def build_in_turn(accelerator: Accelerator, build: Callable[[], T]) -> T:
    """Call `build` on one rank of each machine, which may download, then on the others, which find what it fetched.

    A `UserError` on any rank is raised on all of them. A collective call."""
    built = problem = None
    for my_turn in (accelerator.is_local_main_process, not accelerator.is_local_main_process):
        if my_turn:
            try:
                built = build()
            except UserError as error:
                problem = error
        if problems := [found for found in gather_object([problem]) if found is not None]:
            raise problems[0]
    return built


def in_groups(network: Callable[..., Any], *batches: Tensor) -> Any:
    """`network(*batches)`, on groups of a few rows; the last one is filled up by repeating its last row.

    A convolution rounds differently in batches of other shapes, and an 8-bit pixel or a code may then fall on the other
    side of its border. In groups of one shape, an image's result depends on no batch size and no number of ranks.
    `network` returns a tensor, or a tuple or dict of tensors, with the rows of its arguments."""
    count, size = len(batches[0]), 4 if batches[0].device.type == "cpu" else 16  # four stay in a processor's cache
    outputs = []
    for start in range(0, count, size):
        rows = torch.arange(start, start + size).clamp(max=count - 1)
        outputs.append(network(*(batch[rows.to(batch.device)] for batch in batches)))
    first = outputs[0]
    if torch.is_tensor(first):
        return torch.cat(outputs)[:count]
    if isinstance(first, dict):
        return {name: torch.cat([output[name] for output in outputs])[:count] for name in first}
    return tuple(torch.cat(parts)[:count] for parts in zip(*outputs, strict=True))


def gather_by_index(accelerator: Accelerator, rows: dict[str, list[Tensor]]) -> dict[str, Tensor] | None:
    """Bring the per-image rows of all ranks together, in the order of the images.

    rows: {name: batches [B, ...] of this rank}, the same names on every rank, with the images' numbers in
    `rows["index"]`. A rank may have no batch. Returns {name: [N, ...]} on the CPU of the main process, None on the
    others. A collective call.
    Raises `RuntimeError` where an image was counted twice."""
    gathered = {name: _gather(accelerator, batches) for name, batches in rows.items()}
    if not accelerator.is_main_process:
        return None
    index, order = gathered["index"].sort(stable=True)
    if (index.diff() == 0).any():
        raise RuntimeError("an image was counted twice")
    return {name: values[order] for name, values in gathered.items()}


def _gather(accelerator: Accelerator, batches: list[Tensor]) -> Tensor:
    mine = torch.cat(batches).cpu() if batches else torch.empty(0)
    parts = []
    for start in range(0, max(gather_object([len(mine)])), _GATHER_ROWS):
        chunks = gather_object([mine[start : start + _GATHER_ROWS].clone()])  # a view would be sent with all behind it
        if accelerator.is_main_process:
            parts += [chunk for chunk in chunks if len(chunk)]
    return torch.cat(parts) if parts else torch.empty(0)
