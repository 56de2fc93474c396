"""Measure a pipeline: sample it, and compare the samples, or those of another program, with real images.

accelerate launch eval/generation.py --pipeline runs/dit-b/pipeline --output result.json    # ImageNet-1k, protocol adm
accelerate launch eval/generation.py --pipeline DIR --data synthetic --output out.json --classifier trained
accelerate launch eval/generation.py --pipeline DIR --data DATA --output out.json --guidance_scale 1 1.5 2 --steps 50
accelerate launch eval/generation.py --pipeline DIR --data DATA --output out.json --keep png     # goes on after a kill
accelerate launch eval/generation.py --images samples.npz --output out.json --features inception-v3-compat

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
from nsvq.eval.given_images import GivenImages, given_images
from nsvq.eval.pictures import Grid
from nsvq.eval.reference import ADM_SIZES, Cache, adm_file, real_sets, set_from_file
from nsvq.eval.samples import (
    SampleFolder,
    Sampling,
    Source,
    class_names,
    draw,
    group_size,
    groups,
    image_size,
    is_ours,
    load_pipeline,
)
from nsvq.files import file_hash
from nsvq.pipelines.autoregressive import generates_tokens
from nsvq.pipelines.card import compared_with, described
from nsvq.pipelines.export import arguments

_LABELS = {"balanced": "sample i is of class i mod C", "data": "as often as in training"}
_SPLITS = ("train", "test")  # that a reference may be; or a file
_KEPT = ("guidance_scale", "guidance_interval", "steps", "seed", "precision", "resize")  # beside kept samples
_PROTOCOLS = {"ours": (50_000, "test"), "adm": (50_000, "train"), "nsvq": (5_000, "test")}  # samples, split


def evaluate(pipeline: Source, config: GenerationConfig, accelerator: Accelerator) -> dict | None:
    """Sample `pipeline` over all ranks, or read given images, and measure them; returns the result on the main process,
    None on others. Writes a picture of samples by class beside `config.output`, and the samples where asked to. Raises
    `UserError` or `UsageError` for images, data, weights, references or sizes that do not work."""
    given = isinstance(pipeline, GivenImages)
    names, size, what = class_names(pipeline), config.resize or image_size(pipeline), config.measured
    imagenet = _is_imagenet(config, None if given else names)
    config = _resolve(config, size, imagenet, len(pipeline) if given else None)
    data = config.data
    if data.image_size != size:
        found = f"data.image_size = {data.image_size}, but the images of {what} have {size} pixels"
        raise UsageError(f"{found}: --resize measures them at another size")
    settings = _settings(pipeline, config)
    guide = _prepare(pipeline, config)
    result: dict[str, Any] = {"kind": "generation", "protocol": config.protocol, **report.no_numbers()}
    result["warnings"] += _deviations(config, imagenet)
    needs_classes = config.classifier != "none" or config.labels == "data"
    if needs_classes and not names:
        raise UsageError(f"--classifier and --labels data need classes, and {what} has none")
    split = config.reference if config.reference in _SPLITS else None
    if needs_classes or len(config.features) > 1:  # a file is the reference of the first extractor alone
        split = split or "train"
    classes = open_split(data, split).classes if split else names
    if given and len(names) <= len(classes):
        names = names and classes
    if names and classes != names:
        difference = f"the {len(classes)} classes of {data.source} are not the {len(names)} of {what}"
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
    label = pipeline.labels.__getitem__ if given and names else _label_rule(config, len(names))
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
    result |= best | {
        "counts": {"samples": config.samples, **reference.pop("counts")},
        "data": report.about_data(data, split),
        "reference": reference,
        **_about(pipeline, config, names),
        "classes": names,
        "features": {name: extractor.about for name, extractor in extractors.items()},
    }
    return result | report.provenance(accelerator, config)


def _about(pipeline: Source, config: GenerationConfig, names: list[str]) -> dict:
    """What was measured, and how it was drawn."""
    what = {"folder": config.measured, "sha256": report.folder_hash(Path(config.measured))}
    if isinstance(pipeline, GivenImages):
        what["sha256"] = what["sha256"] or file_hash(pipeline.path)
        labels = "those of the file, arr_1" if names else "no class"
        how = {"labels": labels, "seeds": "drawn by another program"}
        return {"images": what, **how, "precision": {"features": "float32"}}
    return {
        "pipeline": what | {"class": type(pipeline).__name__},
        "labels": _LABELS[config.labels] if names else "no class",
        "seeds": f"sample i has seed {config.seed} + i",
        "sampler": _sampler(pipeline, config),
        "precision": {"sampling": config.mixed_precision.replace("no", "float32"), "features": "float32"},
    }


def _settings(pipeline: Source, config: GenerationConfig) -> list[Sampling]:
    """One for each point of the sweep, still without labels and guide."""
    how: dict[str, Any] = {"seed": config.seed, "precision": config.mixed_precision, "label": None}
    how |= {"guidance_interval": config.guidance_interval, "resize": config.resize}
    if isinstance(pipeline, GivenImages):
        return [Sampling(None, steps=0, **how)]
    options: list[tuple[int, dict | None]] = [(steps, None) for steps in config.steps]
    if generates_tokens(pipeline, config.model_fields_set):
        rest = _token_options(config)
        swept = itertools.product(config.temperature, config.top_k)
        options = [(0, {"temperature": temperature, "top_k": top_k, **rest}) for temperature, top_k in swept]
    return [
        Sampling(scale, steps=steps, tokens=tokens, **how)
        for scale, (steps, tokens) in itertools.product(config.guidance_scale, options)
    ]


def _token_options(config: GenerationConfig) -> dict:
    """Those that make no sweep."""
    return {key: getattr(config, key) for key in ("guidance_schedule", "guidance_power", "top_p")}


def _sampler(pipeline: DiffusionPipeline, config: GenerationConfig) -> dict:
    """What is said of it beside the setting."""
    if isinstance(pipeline, TokenPipeline):
        return _token_options(config)
    guide = config.guide and {"folder": str(config.guide), "sha256": report.folder_hash(config.guide)}
    about = {"scheduler": type(pipeline.scheduler).__name__, "guidance_interval": config.guidance_interval}
    return about | {"guide": guide} | arguments(pipeline.scheduler)


def _prepare(pipeline: Source, config: GenerationConfig) -> ModelMixin | None:
    """Give a pipeline of diffusion its sampler, and load the guide. Raises `UsageError` where one of them, the guidance
    or the number of steps does not fit."""
    if isinstance(pipeline, GivenImages | TokenPipeline):
        return None
    try:
        if config.sampler:
            pipeline.scheduler = make_sampler(config.sampler, pipeline.scheduler)
        if not is_ours(pipeline):
            stock = f"{config.pipeline}, a {type(pipeline).__name__},"
            if config.guide:
                raise ValueError(f"--guide: {stock} takes none")
            if config.guidance_interval != (0.0, 1.0):
                raise ValueError(f"--guidance_interval: {stock} takes none")
            if min(config.guidance_scale) < 1:
                raise ValueError(f"--guidance_scale: {stock} takes what is below 1 for 1, no guidance")
            return None
        for steps in config.steps:
            set_steps(pipeline.scheduler, steps)
        return pipeline.load_guide(config.guide) if config.guide else None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _is_imagenet(config: GenerationConfig, names: list[str] | None) -> bool:
    """Whether the data are ImageNet-1k: the Hub's, or a copy, of whose 1,000 classes a pipeline has the names."""
    if config.data.source == IMAGENET:
        return True
    split = config.reference if config.reference in _SPLITS else "train"
    return names in (None, imagenet_names()) and open_split(config.data, split).classes == imagenet_names()


def _resolve(config: GenerationConfig, size: int, imagenet: bool, there: int | None = None) -> GenerationConfig:
    """`config` with what its protocol decides, where it was not given; `there`: how many images were given. Raises
    `UsageError` where those are too few."""
    protocol = config.protocol or ("adm" if imagenet else "ours")
    samples, reference = _PROTOCOLS[protocol]
    if there is not None:
        samples = there
        if config.samples is not None and config.samples > there:
            raise UsageError(f"--samples {config.samples}, but {config.images} holds {there} images")
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
    other_file = config.reference not in _SPLITS and config.protocol != "adm"
    other_split = config.reference in _SPLITS and (config.reference != split or config.reference_limit)
    if other_file or other_split:
        found.append(f"protocol {config.protocol} means all images of the {split} split as the reference")
    elif config.protocol == "adm" and not imagenet:
        found.append(f"protocol adm is for ImageNet-1k, and {config.data.source} is not known to be it")
    elif config.protocol == "adm" and config.data.image_size in ADM_SIZES and config.reference in _SPLITS:
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
    extractors: dict[str, Extractor], split: str | None, config: GenerationConfig, accelerator: Accelerator
) -> tuple[dict[str, FeatureSet], dict]:
    """The real images' features by extractor, and what is said of them. A file is of the first extractor; the others
    measure the training split."""
    found, about, remaining = {}, {"source": config.reference, "counts": {}}, dict(extractors)
    name = resolve(config.features[0]) if extractors else None
    if name in remaining and config.reference not in _SPLITS:
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
    pipeline: Source,
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
    size = group_size(accelerator.device, isinstance(pipeline, TokenPipeline))
    mine = list(groups(config.samples, accelerator.process_index, accelerator.num_processes, size))
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
        sets = made[name], real[name]
        add_metrics(result, *sets, extractor, config.metrics, config.protocol, accelerator.device)
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
    pipeline: Source, how: Sampling, config: GenerationConfig, accelerator: Accelerator
) -> SampleFolder | None:
    if isinstance(pipeline, GivenImages) or config.keep == "none":
        return None
    about = {
        "pipeline": report.folder_hash(Path(config.pipeline)) or config.pipeline,
        "guide": config.guide and report.folder_hash(config.guide),
        **{key: getattr(how, key) for key in _KEPT},
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


def _load(config: GenerationConfig, accelerator: Accelerator) -> Source:
    if config.pipeline is None:
        return given_images(config.images)
    pipeline = load_pipeline(config.pipeline).to(accelerator.device)
    if config.compile:
        getattr(pipeline, "unet" if hasattr(pipeline, "unet") else "transformer").compile()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    config = configs.parse(GenerationConfig, sys.argv[1:])
    accelerator = report.start(config.output)
    result = evaluate(_load(config, accelerator), config, accelerator)
    if result is not None:
        report.write(config.output, result)
        what = f"{result['counts']['samples']} samples of {config.measured} against {compared_with(result)}"
        how = "; ".join(filter(None, [described(result["setting"]), f"protocol {result['protocol']}"]))
        print(report.table(f"{what}; {how}", result))
        for run in result.get("sweep", []):
            numbers = ", ".join(f"{name} {value:.5g}" for name, value in run["metrics"].items())
            print(f"  {described({k: v for k, v in run.items() if k not in ('metrics', 'grid')})}: {numbers}")
        print(f"wrote {config.output} and {result['grid']['file']}")


if __name__ == "__main__":
    launch.run(main)
