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
    `network` returns a tensor, or a dict of tensors, with the rows of its arguments."""
    count, size = len(batches[0]), 4 if batches[0].device.type == "cpu" else 16  # four stay in a processor's cache
    outputs = []
    for start in range(0, count, size):
        rows = torch.arange(start, start + size).clamp(max=count - 1)
        outputs.append(network(*(batch[rows.to(batch.device)] for batch in batches)))
    if torch.is_tensor(outputs[0]):
        return torch.cat(outputs)[:count]
    return {name: torch.cat([output[name] for output in outputs])[:count] for name in outputs[0]}


def gather_by_index(accelerator: Accelerator, batches: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Bring the per-image rows of all ranks together, in the order of the images.

    batches: {name: rows [B, ...]} of this rank, on which there may be none, with the images' numbers as "index".
    Returns {name: [N, ...]} on the CPU of the main process, {} where there is no batch at all, None on the others. A
    collective call. Raises `RuntimeError` where an image was counted twice."""
    parts = [{name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}] if batches else []
    if accelerator.num_processes > 1:
        mine, parts = parts[0] if parts else {}, []
        for start in range(0, max(gather_object([len(mine.get("index", ()))])), _GATHER_ROWS):
            # A copy, since a view would be sent with all that is behind it.
            chunk = {name: rows[start : start + _GATHER_ROWS].clone() for name, rows in mine.items()}
            found = [part for part in gather_object([chunk]) if part]
            parts += found if accelerator.is_main_process else []
    if not accelerator.is_main_process:
        return None
    joined = {name: torch.cat([part[name] for part in parts]) for part in parts[:1] for name in part}
    if not joined:
        return {}
    index, order = joined["index"].sort(stable=True)
    if (index.diff() == 0).any():
        raise RuntimeError("an image was counted twice")
    return {name: rows[order] for name, rows in joined.items()}
