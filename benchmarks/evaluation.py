"""What measuring a tokenizer costs, beside the forward passes that it cannot do without.

python benchmarks/evaluation.py --tokenizer runs/quickstart/tokenizer --data DATA --features mobilenet_v2.py

Prints seconds for: the stock model's forward, the extractor's forward, a first evaluation (which measures the
originals, too) and a second one (which reuses them); and the ratios to the forward passes that each contains. CPU
seconds are of this process, and say more than the clock where others use the machine. The evaluations load the images,
too.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import VQModel
from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.image_metrics import from_uint8, to_uint8
from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.eval import report
from nsvq.eval.features import load_extractor
from nsvq.eval.reconstruction import ReconstructionConfig, evaluate


class BenchmarkConfig(configs.Config):
    """Time an evaluation against the forward passes in it."""

    tokenizer: str = Field(description="Folder of a VQModel.")
    data: DataConfig = Field(DataConfig(), description="The images.")
    features: str = Field(description="Feature extractor: a name of torch-fidelity, or a .py file that registers one.")
    limit: int = Field(4_000, ge=1, description="Images to measure.")
    batch_size: int = Field(16, ge=1, description="Images of a plain forward pass.")
    workers: int = Field(0, ge=0, description="Data loading processes of the evaluations.")


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of a call."""
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


@torch.no_grad()
def main() -> None:
    config = configs.parse(BenchmarkConfig, sys.argv[1:])
    report.exact_float32()
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[launch.LONG_WAIT])
    launch.keep_freed_memory(accelerator.device.type)  # as the evaluations do
    model = VQModel.from_pretrained(config.tokenizer).to(accelerator.device).eval()
    extractor = load_extractor(config.features, None, accelerator, ("fid",)).module
    data = report.data_with_size(config.data, model.config.sample_size)
    batches = eval_batches(data, "test", batch_size=config.batch_size, limit=config.limit)
    images = [to_uint8(batch["image"]) for batch in batches]
    count = sum(map(len, images))

    def forward_model() -> None:
        for batch in images:
            model(from_uint8(batch.to(accelerator.device)))

    def forward_extractor() -> None:
        for batch in images:
            extractor(batch.to(accelerator.device))

    with tempfile.TemporaryDirectory() as folder:
        settings = ReconstructionConfig(
            tokenizer=config.tokenizer,
            data=config.data,
            output=Path(folder) / "result.json",
            features=[config.features],
            lpips=["none"],
            limit=config.limit,
            workers=config.workers,
            cache=Path(folder) / "cache",
        )
        results = []
        times = {
            "model forward": timed(forward_model),
            "extractor forward": timed(forward_extractor),
            "first evaluation": timed(lambda: results.append(evaluate(settings, accelerator))),
            "second evaluation": timed(lambda: results.append(evaluate(settings, accelerator))),
        }
    assert results[0]["metrics"] == results[1]["metrics"]
    (kept,) = results[1]["references"].values()
    print(
        f"{count} images of {data.source} at {data.image_size} x {data.image_size} by {config.tokenizer}, "
        f"{accelerator.device}, {torch.get_num_threads()} threads"
    )
    for name, (clock, cpu) in times.items():
        print(f"  {name:<18} {clock:8.1f} s  {cpu:8.1f} CPU s")
    model_time, extractor_time = times["model forward"], times["extractor forward"]
    for name, passes in (("first evaluation", 2), ("second evaluation", 1)):
        least = [m + passes * e for m, e in zip(model_time, extractor_time, strict=True)]
        clock, cpu = (t / forward for t, forward in zip(times[name], least, strict=True))
        print(f"  {name} / (model + {passes} x extractor): {clock:.3f} by the clock, {cpu:.3f} by CPU time")
    print(f"  reference of the second evaluation: {kept}")
    print(f"  {json.dumps(results[1]['metrics'])}")


if __name__ == "__main__":
    launch.run(main)
