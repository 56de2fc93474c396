"""Measure a class-conditional pipeline: sample it, and compare the samples with real images.

accelerate launch eval/generation.py --pipeline runs/dit-b/pipeline --data ILSVRC/imagenet-1k --output result.json
accelerate launch eval/generation.py --pipeline DIR --data synthetic --output out.json --samples 200 --classifier true

Sample i is of class i mod C and has seed S + i, and nothing else decides it: the set is the same for every batch size
and number of ranks, and a smaller set is the beginning of a larger one. For repeats, move S by the number of samples.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from common import config as configs
from common import launch
from common.data import BadImages, DataConfig, eval_batches, open_split
from common.errors import UsageError, UserError
from common.image_metrics import to_uint8
from eval import features as feature_metrics
from eval import report
from eval.classifier import Classifier, train_classifier
from eval.features import Extractor, Unavailable
from eval.ranks import gather_by_index
from pipelines import ClassConditionalPipeline

_GRID_CLASSES, _GRID_SAMPLES = 10, 8


class GenerationConfig(report.EvaluationConfig):
    """Measure a pipeline's samples against real images."""

    pipeline: str = Field(description="Folder of a pipeline (<out>/pipeline).")
    samples: int = Field(50_000, ge=1, description="Images to generate, spread evenly over the classes.")
    guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance; 1 is without, 0 unconditional.")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Noise levels, from 0 (image) to 1 (noise), within which guidance acts."
    )
    steps: int = Field(50, ge=1, description="Sampler steps.")
    seed: int = Field(0, ge=0, description="Seed of the first sample; sample i has seed + i.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Autocast type of sampling; features are always float32."
    )
    reference_split: Literal["train", "test"] = Field("test", description="Split of real images to compare with.")
    reference_limit: int | None = Field(None, ge=1, description="Compare with only this many; null for all.")
    classifier: bool = Field(
        False, description="Also report which share is of the class asked for, by a small network trained on the data."
    )


MEANINGS = {
    "fid": "Frechet distance of samples to real images",
    "is": "Inception Score of the samples, mean of 10 splits",
    "is_std": "standard deviation over the 10 splits",
    "precision": "share of samples within the 3-neighbour manifold of real images",
    "recall": "share of real images within the 3-neighbour manifold of samples",
    "kid": "kernel distance of samples to real images, cubic kernel, mean of 100 subsets of 1,000",
    "kid_std": "standard deviation over the 100 subsets",
    "class_accuracy": "share of samples that a network trained on the data puts into the class asked for",
    "class_accuracy_real": "the same of real test images",
}


def label_of(sample: int | Tensor, classes: int) -> int | Tensor:
    """The class of a sample, or of several: in turn, so that any number of samples is balanced to within one."""
    return sample % classes


def my_samples(config: GenerationConfig, rank: int, world_size: int) -> list[range]:
    """The batches of sample numbers that a rank generates: batch b belongs to rank b mod world_size."""
    starts = range(rank * config.batch_size, config.samples, world_size * config.batch_size)
    return [range(start, min(start + config.batch_size, config.samples)) for start in starts]


@torch.no_grad()
def generate(pipeline: ClassConditionalPipeline, config: GenerationConfig, samples: range) -> Tensor:
    """The given samples as 8-bit images [B, 3, S, S] on the pipeline's device."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
        latents = pipeline(
            [label_of(sample, len(pipeline.id2label)) for sample in samples],
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            num_inference_steps=config.steps,
            seeds=[config.seed + sample for sample in samples],
            output_type="latent",
        ).images
    return to_uint8(pipeline.decode(latents.float()) * 2 - 1)  # the decoder is float32 in every precision


def evaluate(pipeline: ClassConditionalPipeline, config: GenerationConfig, accelerator: Accelerator) -> dict | None:
    """Sample `pipeline` over all ranks and measure the samples; returns the result on the main process, None on others.

    Writes a picture of samples by class beside `config.output`. Raises `UserError` or `UsageError` for data, weights or
    sizes that do not work.
    """
    names, size = class_names(pipeline), image_size(pipeline)
    data = report.data_with_size(config.data, size)
    if data.image_size != size:
        raise UsageError(f"data.image_size = {data.image_size}, but {config.pipeline} makes images of {size} pixels")
    images = open_split(data, config.reference_split)
    result = {"kind": "generation", "metrics": {}, "protocol": {}, "skipped": {}, "warnings": []}
    if images.classes != names:
        difference = f"the {len(images.classes)} classes of {data.source} are not the {len(names)} of {config.pipeline}"
        if config.classifier:
            raise UsageError(f"--classifier: {difference}")
        result["warnings"].append(difference)
    extractor = _load_extractor(config, accelerator, result["skipped"])
    classifier = _train_classifier(data, config, accelerator) if config.classifier else None
    measure = Measure(extractor, classifier)
    real, unreadable = _real_rows(data, config.reference_split, config.reference_limit, measure, config, accelerator)
    made, shown = _made_rows(pipeline, measure, config, accelerator)
    judged = real
    if classifier and config.reference_split != "test":
        judged, _ = _real_rows(data, "test", None, Measure(None, classifier), config, accelerator)
    if made is None:
        return None
    if extractor:
        _add_distances(result, made, real, extractor)
    if classifier:
        _add_class_accuracy(result, made, judged, names)
    return result | {
        "counts": {"samples": config.samples, "real_images": len(real["index"]), **unreadable},
        "data": report.about_data(data, config.reference_split, images),
        "pipeline": {"folder": config.pipeline, "sha256": report.folder_hash(Path(config.pipeline))},
        "labels": "sample i is of class i mod C",
        "classes": names,
        "seeds": "sample i has seed + i",
        "sampler": {"scheduler": type(pipeline.scheduler).__name__, **_public(pipeline.scheduler.config)},
        "features": report.about_extractor(extractor, config),
        "precision": {"sampling": config.mixed_precision.replace("no", "float32"), "features": "float32"},
        "grid": _save_grid(shown, names, config),
        **report.provenance(accelerator, config.model_copy(update={"data": data})),
    }


def load_pipeline(folder: str) -> ClassConditionalPipeline:
    """Read a pipeline folder. Raises `UserError` where there is none."""
    try:
        return ClassConditionalPipeline.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"no pipeline at {folder}: give the <out>/pipeline folder of a finished diffusion run "
            f"({str(error).splitlines()[0]})"
        ) from None


def class_names(pipeline: ClassConditionalPipeline) -> list[str]:
    """The pipeline's classes in the order of their ids 0 to C - 1. Raises `UserError` where its ids have gaps."""
    names = pipeline.id2label
    if sorted(names) != list(range(len(names))):
        raise UserError(f"the class ids of the pipeline, {sorted(names)}, are not 0 to {len(names) - 1}")
    return [names[i] for i in range(len(names))]


def image_size(pipeline: ClassConditionalPipeline) -> int:
    """Side of the pipeline's images, in pixels."""
    return pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@dataclass
class Measure:
    """What is measured of each image, real or made: features, and which class it is taken for."""

    extractor: Extractor | None
    classifier: Classifier | None

    def no_rows(self) -> dict[str, list[Tensor]]:
        """Empty rows for `gather_by_index`, the same on every rank."""
        layers = self.extractor.layers.values() if self.extractor else ()
        return {name: [] for name in ["index", "label", *layers, *(["predicted"] if self.classifier else [])]}

    @torch.no_grad()
    def add(self, rows: dict[str, list[Tensor]], images: Tensor, index: Tensor, labels: Tensor) -> None:
        """Measure 8-bit images [B, 3, S, S] with their numbers and labels [B]."""
        values = {"index": index, "label": labels}
        if self.extractor:
            values |= self.extractor(images)
        if self.classifier:
            values["predicted"] = self.classifier(images).argmax(1).cpu()
        for name, value in values.items():
            rows[name].append(value)


def _real_rows(
    data: DataConfig,
    split: str,
    limit: int | None,
    measure: Measure,
    config: GenerationConfig,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor] | None, dict]:
    """What is measured of the real images, on the main process; and the bad ones among them."""
    rows, bad = measure.no_rows(), BadImages(data.max_bad_fraction, accelerator)
    batches = eval_batches(
        data,
        split,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=config.workers,
        limit=limit,
    )
    for batch in tqdm(batches, "real images", unit="batch", disable=not accelerator.is_main_process, leave=False):
        bad.update(batch)
        if len(batch["image"]):
            measure.add(rows, to_uint8(batch["image"].to(accelerator.device)), batch["index"], batch["label"])
    bad.check(final=True)
    return gather_by_index(accelerator, rows), report.bad_images(accelerator, bad.bad)


def _made_rows(
    pipeline: ClassConditionalPipeline, measure: Measure, config: GenerationConfig, accelerator: Accelerator
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """What is measured of the samples, and those of them that the picture shows, both on the main process."""
    rows, shown = measure.no_rows(), {"index": [], "image": []}
    wanted = [sample for row in grid_rows(config.samples, len(pipeline.id2label)).values() for sample in row]
    batches = my_samples(config, accelerator.process_index, accelerator.num_processes)
    for samples in tqdm(batches, "samples", unit="batch", disable=not accelerator.is_main_process, leave=False):
        images, index = generate(pipeline, config, samples), torch.tensor(samples)
        measure.add(rows, images, index, label_of(index, len(pipeline.id2label)))
        in_grid = torch.isin(index, torch.tensor(wanted))
        shown["index"].append(index[in_grid])
        shown["image"].append(images.cpu()[in_grid])
    return gather_by_index(accelerator, rows), gather_by_index(accelerator, shown)


def _add_distances(result: dict, made: dict[str, Tensor], real: dict[str, Tensor], extractor: Extractor) -> None:
    metrics, skipped, warnings = feature_metrics.distances(extractor, made, real)
    meanings = {feature_metrics.metric_name(name, extractor.name): text for name, text in MEANINGS.items()}
    result["metrics"] |= metrics
    result["protocol"] |= {name: f"{meanings[name]}; features of {extractor.name}" for name in metrics}
    result["skipped"] |= skipped
    result["warnings"] += warnings


def _train_classifier(data: DataConfig, config: GenerationConfig, accelerator: Accelerator) -> Classifier:
    """The same classifier on all ranks, trained on one."""
    box = [None]
    accelerator.print(f"training a classifier on {data.source} ...", file=sys.stderr)
    if accelerator.is_main_process:
        try:
            box = [train_classifier(data, workers=config.workers, device=accelerator.device).cpu()]
        except UserError as error:
            box = [error]
    trained = broadcast_object_list(box)[0]
    if isinstance(trained, UserError):
        raise trained
    return trained.to(accelerator.device)


def _add_class_accuracy(result: dict, made: dict[str, Tensor], real: dict[str, Tensor], names: list[str]) -> None:
    right = made["predicted"] == made["label"]
    result["metrics"]["class_accuracy"] = right.double().mean().item()
    by_class = {c: right[made["label"] == c].double().mean().item() for c in made["label"].unique().tolist()}
    result["class_accuracy_by_class"] = {names[c]: value for c, value in by_class.items()}
    labelled = real["label"] >= 0
    if labelled.any():
        right = (real["predicted"] == real["label"])[labelled]
        result["metrics"]["class_accuracy_real"] = right.double().mean().item()
    else:
        result["skipped"]["class_accuracy_real"] = "the test images have no labels"
    accuracies = [name for name in result["metrics"] if name.startswith("class_accuracy")]
    result["protocol"] |= {name: MEANINGS[name] for name in accuracies}


def grid_rows(samples: int, classes: int) -> dict[int, list[int]]:
    """The samples that the picture shows: {class: its first samples}, for classes spaced evenly over all."""
    rows = min(classes, _GRID_CLASSES)
    return {c: list(range(c, samples, classes))[:_GRID_SAMPLES] for c in (i * classes // rows for i in range(rows))}


def _save_grid(shown: dict[str, Tensor], names: list[str], config: GenerationConfig) -> dict:
    """A row of samples for each class, in the order that the result names them."""
    by_index = dict(zip(shown["index"].tolist(), shown["image"], strict=True))
    rows = grid_rows(config.samples, len(names))
    width = max(map(len, rows.values()))
    blank = torch.full_like(shown["image"][0], 255)
    tiles = [by_index[row[i]] if i < len(row) else blank for row in rows.values() for i in range(width)]
    path = config.output.with_suffix(".png")
    save_image(torch.stack(tiles) / 255, path, nrow=width, pad_value=1.0)
    return {"file": str(path), "rows": [names[c] for c in rows]}


def _public(config: dict) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _load_extractor(config: GenerationConfig, accelerator: Accelerator, skipped: dict) -> Extractor | None:
    if config.features == "none":
        return None
    try:
        return feature_metrics.load_extractor(config.features, config.features_weights, accelerator)
    except Unavailable as error:
        skipped.update(dict.fromkeys(feature_metrics.metric_names(config.features), str(error)))
        return None


def main() -> None:
    config = configs.parse(GenerationConfig, sys.argv[1:])
    report.open_output(config.output)
    report.exact_float32()
    accelerator = Accelerator(mixed_precision="no")
    pipeline = load_pipeline(config.pipeline).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    result = evaluate(pipeline, config, accelerator)
    if result is not None:
        report.write(config.output, result)
        counts, data = result["counts"], result["data"]
        title = (
            f"{counts['samples']} samples of {config.pipeline} against {counts['real_images']} {data['split']} images "
            f"of {data['source']}"
        )
        print(report.table(title, result))
        print(f"wrote {config.output} and {result['grid']['file']}")


if __name__ == "__main__":
    launch.run(main)
