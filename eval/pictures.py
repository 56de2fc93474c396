"""The pictures beside a result: reconstructions under their originals, and samples by class."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image

from nsvq.eval.distributed import gather_by_index

_PAIRS = 8  # of each picture of reconstructions
_GRID_CLASSES, _GRID_SAMPLES = 10, 8
_GRID_DRAWN = 10_000  # samples whose classes are looked at


class Examples:
    """The images with the highest scores of a rank, as pairs of original and reconstruction."""

    def __init__(self):
        self.rows: list[dict[str, Tensor]] = []

    def add(self, scores: Tensor, index: Tensor, pairs: Tensor) -> None:
        """Scores [B], image numbers [B] and pairs [B, 2, 3, H, W] uint8."""
        batches = [*self.rows, {"index": index, "score": scores.cpu(), "pair": pairs}]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        best = joined["score"].argsort(descending=True, stable=True)[:_PAIRS]
        self.rows = [{name: values[best] for name, values in joined.items()}]

    def save(self, path: Path, accelerator: Accelerator) -> None:
        """One picture of the best over all ranks, originals above reconstructions. A collective call."""
        rows = gather_by_index(accelerator, self.rows)
        if rows:
            best = rows["score"].argsort(descending=True, stable=True)[:_PAIRS]
            pairs = rows["pair"][best].float() / 255
            save_image(torch.cat([pairs[:, 0], pairs[:, 1]]), path, nrow=len(best))


class Grid:
    """A row of samples for each of a few classes, spaced evenly over those that are drawn, or of no class: {class: its
    first samples} in `of_class`."""

    def __init__(self, samples: int, names: list[str], label: Callable[[int], int | None]):
        self.names = names
        drawn = sorted({label(sample) for sample in range(min(samples, _GRID_DRAWN))} - {None})
        count = min(len(drawn), _GRID_CLASSES)
        classes = [drawn[i * len(drawn) // count] for i in range(count)] or [None]
        self.of_class: dict[int | None, list[int]] = {c: [] for c in classes}
        for sample in range(samples):
            row = self.of_class.get(label(sample))
            if row is not None and len(row) < _GRID_SAMPLES:
                row.append(sample)
            if all(len(row) == _GRID_SAMPLES for row in self.of_class.values()):
                break
        self.wanted = torch.tensor(sorted(sample for row in self.of_class.values() for sample in row))
        self.rows: list[dict[str, Tensor]] = []

    def add(self, images: Tensor, index: Tensor) -> None:
        """Samples uint8 [B, 3, H, W] with their numbers [B], of which it keeps those that it shows."""
        chosen = torch.isin(index, self.wanted)
        self.rows.append({"index": index[chosen], "image": images.cpu()[chosen]})

    def save(self, path: Path, accelerator: Accelerator) -> dict | None:
        """Write the picture of all ranks' samples; returns what the result says of it, None but on the main process. A
        collective call."""
        shown = gather_by_index(accelerator, self.rows)
        if shown is None:
            return None
        by_index = dict(zip(shown["index"].tolist(), shown["image"], strict=True))
        rows = self.of_class.values()
        blank = torch.full_like(shown["image"][0], 255)
        width = max(map(len, rows))
        tiles = [by_index[row[i]] if i < len(row) else blank for row in rows for i in range(width)]
        save_image(torch.stack(tiles) / 255, path, nrow=width, pad_value=1.0)
        return {"file": str(path), "rows": ["no class" if c is None else self.names[c] for c in self.of_class]}
