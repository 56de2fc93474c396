"""Measure a pipeline: sample it, and compare the samples with real images.

accelerate launch eval/generation.py --pipeline runs/dit-b/pipeline --output result.json    # ImageNet-1k, protocol adm
accelerate launch eval/generation.py --pipeline DIR --data synthetic --output out.json --classifier trained
accelerate launch eval/generation.py --pipeline DIR --data DATA --output out.json --guidance_scale 1 1.5 2 --steps 50
accelerate launch eval/generation.py --pipeline DIR --data DATA --output out.json --keep png     # goes on after a kill

The pipeline is ours, with classes or none, or any class-conditional one of diffusers. eval/samples.py says which
samples are drawn, and docs/evaluation.md what each protocol measures. For repeats, move --seed by the samples' number.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from tqdm import tqdm

from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.data.config import IMAGENET
from nsvq.data.label_tables import imagenet_names
from nsvq.data.sources import open_split
from nsvq.diffusion.samplers import make_sampler, set_steps
from nsvq.errors import UsageError
from nsvq.eval import class_accuracy, report
from nsvq.eval.config import GenerationConfig
from nsvq.eval.distributed import build_in_turn
from nsvq.eval.feature_statistics import FeatureSet, isc_splits
from nsvq.eval.features import Collector, Extractor, resolve
from nsvq.eval.generation_metrics import add_metrics, best_setting, names_of
from nsvq.eval.pictures import Grid
from nsvq.eval.reference import ADM_SIZES, Cache, adm_file, real_sets, set_from_file
from nsvq.eval.samples import SampleFolder, Sampling, class_names, draw, groups, image_size, is_ours, load_pipeline
from nsvq.files import file_hash
from nsvq.pipelines.autoregressive import generates_tokens
from nsvq.pipelines.card import described
from nsvq.pipelines.export import arguments

_LABELS = {"balanced": "sample i is of class i mod C", "data": "as often as in training"}
_PROTOCOLS = {"ours": (50_000, "test"), "adm": (50_000, "train"), "nsvq": (5_000, "test")}  # samples, split


def evaluate(pipeline: DiffusionPipeline, config: GenerationConfig, accelerator: Accelerator) -> dict | None:
    """Sample `pipeline` over all ranks and measure the samples; returns the result on the main process, None on others.
    Writes a picture of samples by class beside `config.output`, and the samples where asked to. Raises `UserError` or
    `UsageError` for data, weights, references or sizes that do not work."""
    names, size = class_names(pipeline), image_size(pipeline)
    imagenet = _is_imagenet(config, names)
    config = _resolve(config, size, imagenet)
    data = config.data
    if data.image_size != size:
        raise UsageError(f"data.image_size = {data.image_size}, but {config.pipeline} makes images of {size} pixels")
    if not is_ours(pipeline):
        stock = f"{config.pipeline}, a {type(pipeline).__name__},"
        if config.guidance_interval != (0.0, 1.0):
            raise UsageError(f"--guidance_interval: {stock} takes none")
        if min(config.guidance_scale) < 1:
            raise UsageError(f"--guidance_scale: {stock} takes what is below 1 for 1, no guidance")
    settings = _settings(pipeline, config)
    guide = None if settings[0].tokens else _prepare(pipeline, config)
    split = config.reference if config.reference in ("train", "test") else "train"
    images = open_split(data, split)
    result: dict[str, Any] = {"kind": "generation", "protocol": config.protocol, **report.no_numbers()}
    result["warnings"] += _deviations(config, imagenet)
    needs_classes = config.classifier != "none" or config.labels == "data"
    if needs_classes and not names:
        raise UsageError(f"--classifier and --labels data need classes, and {config.pipeline} has none")
    if names and images.classes != names:
        difference = f"the {len(images.classes)} classes of {data.source} are not the {len(names)} of {config.pipeline}"
        if needs_classes:
            raise UsageError(f"--classifier and --labels data need the same classes: {difference}")
        result["warnings"].append(difference)
    extractors = report.load_extractors(config, accelerator, config.metrics, result, partial(names_of, config.metrics))
    classifier = None
    if config.classifier == "trained":
        classifier = class_accuracy.train_on_one_rank(data, config.workers, accelerator)
    elif config.classifier == "features":
        if not extractors:
            raise UsageError("--classifier features needs an extractor: give --features")
        judge = next(iter(extractors.values()))
        classifier = class_accuracy.from_outputs(judge, data, len(names), accelerator, **config.loading)
    real, reference = _real_sets(extractors, split, config, accelerator)
    label = _label_rule(config, len(names))
    runs = []
    for setting in settings:
        how = replace(setting, label=label, guide=guide)
        runs.append(_run(pipeline, how, names, extractors, real, classifier, config, accelerator))
    real_accuracy = None
    if classifier:
        limit = config.reference_limit
        real_accuracy = class_accuracy.real_accuracy(classifier, data, limit, accelerator, **config.loading)
    if not accelerator.is_main_process:
        return None
    best = best_setting(runs)
    for key in ("metrics", "meanings", "skipped"):
        result[key] |= best.pop(key)
    result["warnings"] += best.pop("warnings") + [w for extractor in extractors.values() for w in extractor.warnings]
    if real_accuracy is not None:
        report.add(result, {"class_accuracy_real": real_accuracy}, class_accuracy.MEANINGS)
    elif classifier:
        result["skipped"]["class_accuracy_real"] = "the test images have no labels"
    hashed = report.folder_hash(Path(config.pipeline))
    result |= best | {
        "counts": {"samples": config.samples, **reference.pop("counts")},
        "data": report.about_data(data, split),
        "reference": reference,
        "pipeline": {"folder": config.pipeline, "class": type(pipeline).__name__, "sha256": hashed},
        "labels": _LABELS[config.labels] if names else "no class",
        "classes": names,
        "seeds": f"sample i has seed {config.seed} + i",
        "sampler": _sampler(pipeline, config),
        "features": {name: extractor.about for name, extractor in extractors.items()},
        "precision": {"sampling": config.mixed_precision.replace("no", "float32"), "features": "float32"},
    }
    return result | report.provenance(accelerator, config)


def _settings(pipeline: DiffusionPipeline, config: GenerationConfig) -> list[Sampling]:
    """One for each point of the sweep, still without labels and guide."""
    options: list[tuple[int, dict | None]] = [(steps, None) for steps in config.steps]
    if generates_tokens(pipeline, config.model_fields_set):
        rest = {"guidance_schedule": config.guidance_schedule, "top_p": config.top_p}
        swept = itertools.product(config.temperature, config.top_k)
        options = [(0, {"temperature": temperature, "top_k": top_k, **rest}) for temperature, top_k in swept]
    return [
        Sampling(scale, config.guidance_interval, steps, config.seed, config.mixed_precision, None, tokens=tokens)
        for scale, (steps, tokens) in itertools.product(config.guidance_scale, options)
    ]


def _sampler(pipeline: DiffusionPipeline, config: GenerationConfig) -> dict:
    """What is said of it beside the setting."""
    if isinstance(pipeline, TokenPipeline):
        return {"guidance_schedule": config.guidance_schedule, "top_p": config.top_p}
    guide = config.guide and {"folder": str(config.guide), "sha256": report.folder_hash(config.guide)}
    about = {"scheduler": type(pipeline.scheduler).__name__, "guidance_interval": config.guidance_interval}
    return about | {"guide": guide} | arguments(pipeline.scheduler)


def _prepare(pipeline: DiffusionPipeline, config: GenerationConfig) -> ModelMixin | None:
    """Give the pipeline its sampler, and load the guide. Raises `UsageError` where one of them, or the number of steps,
    does not fit."""
    try:
        if config.sampler:
            pipeline.scheduler = make_sampler(config.sampler, pipeline.scheduler)
        if not is_ours(pipeline):
            if config.guide:
                raise ValueError(f"--guide: {config.pipeline}, a {type(pipeline).__name__}, takes none")
            return None
        for steps in config.steps:
            set_steps(pipeline.scheduler, steps)
        return pipeline.load_guide(config.guide) if config.guide else None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_imagenet(config: GenerationConfig, names: list[str]) -> bool:
    """Whether the data are ImageNet-1k: the Hub's, or a copy, of whose 1,000 classes the pipeline has the names."""
    if config.data.source == IMAGENET:
        return True
    split = config.reference if config.reference in ("train", "test") else "train"
    return names == imagenet_names() and open_split(config.data, split).classes == names


def _resolve(config: GenerationConfig, size: int, imagenet: bool) -> GenerationConfig:
    """`config` with what its protocol decides, where it was not given."""
    protocol = config.protocol or ("adm" if imagenet else "ours")
    samples, reference = _PROTOCOLS[protocol]
    if protocol == "adm" and imagenet and size in ADM_SIZES:
        reference = "adm"
    given = {"protocol": protocol, "samples": config.samples or samples, "reference": config.reference or reference}
    return config.model_copy(update={**given, "data": report.data_with_size(config.data, size)})


def _deviations(config: GenerationConfig, imagenet: bool) -> list[str]:
    """What keeps the numbers from being those of the protocol."""
    if config.protocol == "ours":
        return []
    (samples, split), found = _PROTOCOLS[config.protocol], []
    if config.samples != samples:
        found.append(f"protocol {config.protocol} means {samples} samples, these are {config.samples}")
    other_file = config.reference not in ("train", "test") and config.protocol != "adm"
    other_split = config.reference in ("train", "test") and (config.reference != split or config.reference_limit)
    if other_file or other_split:
        found.append(f"protocol {config.protocol} means all images of the {split} split as the reference")
    elif config.protocol == "adm" and not imagenet:
        found.append(f"protocol adm is for ImageNet-1k, and {config.data.source} is not known to be it")
    elif config.protocol == "adm" and config.data.image_size in ADM_SIZES and config.reference in ("train", "test"):
        found.append("protocol adm means ADM's own file as the reference: leave --reference out")
    return found


def _label_rule(config: GenerationConfig, classes: int):
    """Sample number -> class id, or None where there are no classes."""
    if not classes:
        return lambda sample: None
    if config.labels == "balanced":
        return lambda sample: sample % classes
    labels = open_split(config.data, "train").labels()
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    borders = np.cumsum(counts / counts.sum())[:-1]
    # Beside the seed of its noise, sample i has a random number of its own.
    return lambda sample: int(np.searchsorted(borders, np.random.default_rng([config.seed, sample]).random(), "right"))


def _real_sets(
    extractors: dict[str, Extractor], split: str, config: GenerationConfig, accelerator: Accelerator
) -> tuple[dict[str, FeatureSet], dict]:
    """The real images' features by extractor, and what is said of them. A file is of the first extractor; the others
    measure the training split."""
    found, about, remaining = {}, {"source": config.reference, "counts": {}}, dict(extractors)
    name = resolve(config.features[0]) if extractors else None
    if name in remaining and config.reference not in ("train", "test"):
        size = config.data.image_size
        path = adm_file(size, accelerator) if config.reference == "adm" else Path(config.reference)
        found[name] = set_from_file(path, remaining.pop(name), config.metrics, size, accelerator)
        about |= {"file": str(path), "sha256": file_hash(path), "extractor": name}
    if remaining:
        cache = Cache(config.cache, config.cache_features, accelerator)
        limit, adm = config.reference_limit, config.protocol == "adm"
        sets, said = real_sets(remaining, config.metrics, cache, config.data, split, limit, adm, **config.loading)
        found, about = found | sets, about | said
    return found, about


def _run(
    pipeline: DiffusionPipeline,
    how: Sampling,
    names: list[str],
    extractors: dict[str, Extractor],
    real: dict[str, FeatureSet],
    classifier: Callable | None,
    config: GenerationConfig,
    accelerator: Accelerator,
) -> dict | None:
    """Draw and measure the samples of one setting; returns its part of the result on the main process."""
    splits = isc_splits(config.samples, adm=config.protocol == "adm")
    collectors = {name: Collector(extractor, config.metrics, None, splits) for name, extractor in extractors.items()}
    folder = _sample_folder(pipeline, how, config, accelerator)
    grid = Grid(config.samples, names, how.label)
    judged = class_accuracy.ClassAccuracy(classifier) if classifier else None
    mine = list(groups(config.samples, accelerator.process_index, accelerator.num_processes))
    for samples in tqdm(mine, how.name, unit="group", disable=not accelerator.is_main_process, leave=False):
        wanted = samples[: config.samples - samples.start]
        images, index = folder.load(wanted) if folder else None, torch.tensor(wanted)
        if images is None:
            images = draw(pipeline, how, samples)[: len(wanted)]
            if folder:
                folder.save(wanted, images)
        images = images.to(accelerator.device)
        for collector in collectors.values():
            collector.add(images, index)
        if judged:
            judged.add(images, index, torch.tensor([how.label(sample) for sample in wanted]))
        grid.add(images, index)
    made = {name: collector.total(accelerator) for name, collector in collectors.items()}
    accuracy = judged.total(names, accelerator) if judged else None
    sweep = len(config.guidance_scale) * len(config.steps) * len(config.temperature) * len(config.top_k) > 1
    about_grid = grid.save(_beside(config.output, how, ".png", sweep), accelerator)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    result: dict[str, Any] = {"setting": how.setting, **report.no_numbers()}
    for name, extractor in extractors.items():
        add_metrics(result, made[name], real[name], extractor, config.metrics, config.protocol)
    if accuracy:
        mean, result["class_accuracy_by_class"] = accuracy
        report.add(result, {"class_accuracy": mean}, class_accuracy.MEANINGS)
    result["grid"] = about_grid
    if folder:
        result["samples"] = {"png": str(folder.folder)}
        if config.keep == "npz":
            packed = _beside(config.output, how, ".npz", sweep)
            folder.pack(packed, config.samples, list(map(how.label, range(config.samples))) if names else None)
            result["samples"]["npz"] = str(packed)
    return result


def _sample_folder(
    pipeline: DiffusionPipeline, how: Sampling, config: GenerationConfig, accelerator: Accelerator
) -> SampleFolder | None:
    if config.keep == "none":
        return None
    about = {
        "pipeline": report.folder_hash(Path(config.pipeline)) or config.pipeline,
        "guide": config.guide and report.folder_hash(config.guide),
        **{key: getattr(how, key) for key in ("guidance_scale", "guidance_interval", "steps", "seed", "precision")},
        **(how.tokens or {}),
        "first labels": [how.label(sample) for sample in range(100)],
    }
    if not how.tokens:
        about["sampler"] = type(pipeline.scheduler).__name__
        about["scheduler"] = {k: str(v) for k, v in arguments(pipeline.scheduler).items()}
    folder = config.output.with_name(f"{config.output.stem}-samples") / how.name
    return build_in_turn(accelerator, lambda: SampleFolder(folder, about))


def _beside(output: Path, how: Sampling, suffix: str, sweep: bool) -> Path:
    return output.with_name(f"{output.stem}-{how.name}{suffix}") if sweep else output.with_suffix(suffix)


def main() -> None:
    config = configs.parse(GenerationConfig, sys.argv[1:])
    accelerator = report.start(config.output)
    pipeline = load_pipeline(config.pipeline).to(accelerator.device)
    if config.compile:
        getattr(pipeline, "unet" if hasattr(pipeline, "unet") else "transformer").compile()
    pipeline.set_progress_bar_config(disable=True)
    result = evaluate(pipeline, config, accelerator)
    if result is not None:
        report.write(config.output, result)
        data, setting = result["data"], result["setting"]
        what = f"{result['counts']['samples']} samples of {config.pipeline} against {data['source']}"
        how = f"{described(setting)}; protocol {result['protocol']}"
        print(report.table(f"{what} ({result['reference']['source']}), {how}", result))
        for run in result.get("sweep", []):
            numbers = ", ".join(f"{name} {value:.5g}" for name, value in run["metrics"].items())
            print(f"  {described({k: v for k, v in run.items() if k not in ('metrics', 'grid')})}: {numbers}")
        print(f"wrote {config.output} and {result['grid']['file']}")


if __name__ == "__main__":
    launch.run(main)
