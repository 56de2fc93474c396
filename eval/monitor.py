"""The Frechet distance of a model in training: the same features, references and statistics as eval/generation.py's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from nsvq.common.generator import Distance, DrawingConfig
from nsvq.common.image_metrics import to_uint8
from nsvq.data.config import DataConfig
from nsvq.eval.feature_statistics import frechet_distance
from nsvq.eval.features import Collector, load_extractor, metric_name
from nsvq.eval.reference import DEFAULT_CACHE, Cache, real_sets
from nsvq.eval.samples import group_size, groups
from nsvq.tokenizer.config import TrainConfig

# Without TF32, which a trainer may have on: eval/generation.py measures without, and shares the kept references.
_exact_float32 = partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=False)


def monitor(
    drawing: DrawingConfig, data: DataConfig, accelerator: Accelerator, workers: int, *, tokens: bool
) -> Distance | None:
    """What measures the samples of a generator's run, where its config asks for it. `tokens`: whether they are made
    token by token. Raises what `FrechetMonitor` does."""
    if drawing.fd_every is None:
        return None
    of = FrechetMonitor(drawing.fd_features, drawing.fd_features_weights, data, accelerator, workers=workers)
    return partial(of.measure, group=group_size(accelerator.device, tokens))


def reconstruction_monitor(config: TrainConfig, accelerator: Accelerator) -> "FrechetMonitor | None":
    """The same of a tokenizer's reconstructions of the images that its run validates on."""
    of = config.validation
    if of.features == "none":
        return None
    return FrechetMonitor(
        of.features,
        of.features_weights,
        config.data,
        accelerator,
        limit=of.images,
        metric="rfid",
        workers=config.run.workers,
    )


class FrechetMonitor:
    """Compares images with the test split of `data`, or `limit` images of it, whose statistics are made, or found, at
    the start.

    `features`, `weights`: as for eval/generation.py. Raises what loading them does, and `UserError` for data that does
    not work. All but `add` are collective calls."""

    def __init__(
        self,
        features: str,
        weights: Path | None,
        data: DataConfig,
        accelerator: Accelerator,
        *,
        limit: int | None = None,
        metric: Literal["fid", "rfid"] = "fid",
        workers: int = 0,
    ):
        self.accelerator = accelerator
        self.extractor = load_extractor(features, weights, accelerator, ("fid",))
        self.name, self.layer = metric_name(metric, self.extractor.name), self.extractor.layers["fid"]
        cache, extractors = Cache(DEFAULT_CACHE, False, accelerator), {self.extractor.name: self.extractor}
        with _exact_float32():
            sets, _ = real_sets(extractors, ("fid",), cache, data, "test", limit, batch_size=64, workers=workers)
        self.real = sets[self.extractor.name]

    def begin(self) -> None:
        self.collector = Collector(self.extractor, ("fid",))

    def add(self, images: Tensor, numbers: Tensor) -> None:
        """Images [B, 3, H, W] uint8, with their numbers [B], of this rank's part."""
        with _exact_float32():
            self.collector.add(images, numbers)

    def value(self) -> dict[str, float]:
        """{metric name: distance} of what came since `begin`, the same on all ranks."""
        made, value = self.collector.total(self.accelerator), None
        if self.accelerator.is_main_process:
            value = frechet_distance(made.gaussians[self.layer], self.real.gaussians[self.layer])
        return {self.name: broadcast_object_list([value])[0]}

    @torch.no_grad()
    def measure(self, draw: Callable[[range], Tensor], samples: int, group: int) -> dict[str, float]:
        """`value` of `samples` images.

        `draw(numbers)` returns the samples of these numbers, [B, 3, H, W] in [-1, 1]; it is called for `group`
        numbers at a time, so that the number of ranks changes no image."""
        self.begin()
        for numbers in groups(samples, self.accelerator.process_index, self.accelerator.num_processes, group):
            wanted = numbers[: samples - numbers.start]
            self.add(to_uint8(draw(numbers)[: len(wanted)]), torch.tensor(wanted))
        return self.value()
