"""Measure a tokenizer: how well it reconstructs images, and how it uses its codebook.

accelerate launch eval/reconstruction.py --tokenizer runs/nsvq/tokenizer --data ILSVRC/imagenet-1k --output result.json
accelerate launch eval/reconstruction.py --tokenizer DIR --data synthetic --output result.json --lpips none
accelerate launch eval/reconstruction.py --tokenizer DIR --compare EARLIER_DIR --output result.json    # drift and churn
accelerate launch eval/reconstruction.py --tokenizer DIR --output result.json --pfid.alpha 0.5         # pFID, too

Every image of the split is measured exactly once, over all ranks, in float32. Images come in the tokenizer's own size
unless --data.image_size is given. The protocols are written down in docs/evaluation.md.
"""

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.image_metrics import from_uint8, squared_error, ssim, to_uint8, truncate_uint8
from nsvq.data.bad_images import BadImages
from nsvq.data.sources import open_split
from nsvq.errors import UserError
from nsvq.eval import report
from nsvq.eval.autoencoders import Drift, reconstruct
from nsvq.eval.codes import Perturbed
from nsvq.eval.config import ReconstructionConfig
from nsvq.eval.distributed import gather_by_index, in_groups
from nsvq.eval.features import Collector, PytorchFidInception, metric_name
from nsvq.eval.perceptual import load_networks
from nsvq.eval.pictures import Examples
from nsvq.eval.reconstruction_metrics import MEANINGS, add_codebook_metrics, add_frechet_distance, add_image_metrics
from nsvq.eval.reference import Cache, bad_images, key_of, real_batches
from nsvq.tokenizer.pretrained import Tokenizer, open_tokenizer


class Measurement:
    """All that is measured of the images of one rank: rows of single numbers, code counts, feature statistics."""

    def __init__(self, config: ReconstructionConfig, tokenizer: Tokenizer, drift: Drift | None):
        self.config, self.tokenizer, self.drift = config, tokenizer, drift
        self.lpips: dict[str, nn.Module] = {}
        self.real: dict[str, Collector] = {}  # by extractor; without those whose reference is kept
        self.made: dict[str, Collector] = {}
        self.wrong: dict[str, Collector] = {}  # made from perturbed codes, where pFID is asked for
        self.perturbed = Perturbed(config.pfid, tokenizer) if config.pfid else None
        self.examples = {"worst": Examples(), "best": Examples(), "random": Examples()}
        size = max(1, tokenizer.codebook_size)
        self.counts = torch.zeros(size, dtype=torch.int64, device=tokenizer.device)

    @property
    def ranked_by(self) -> str:
        """The row that tells the worst and the best images."""
        return f"lpips_{next(iter(self.lpips))}" if self.lpips else "mse"

    def add(self, real: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Measure images uint8 [B, 3, H, W] with their numbers [B]; returns rows [B], for `gather_by_index`."""
        inputs = from_uint8(real)
        output = in_groups(lambda images: reconstruct(self.tokenizer, images), inputs)
        made = to_uint8(output["image"])
        if self.config.protocol == "simvq":  # floats go to the networks, and levels are cut, not rounded
            pair = inputs, output["image"].float().clamp(-1, 1)
            levels = truncate_uint8(pair[1]), truncate_uint8(inputs)
            shown = pair
        else:
            pair, levels, shown = (inputs, from_uint8(made)), (made, real), (real, made)
        values = {"index": index, "mse": squared_error(*levels), "ssim": ssim(*levels)}
        for net, lpips in self.lpips.items():
            values[f"lpips_{net}"] = in_groups(lambda a, b, lpips=lpips: lpips(b, a), *pair).double()
        if "indices" in output:
            values["error"] = output["error"]
            values["codes"] = output["indices"].int()
            self.counts += torch.bincount(output["indices"].flatten(), minlength=len(self.counts))
        if self.drift:
            values |= self.drift.measure(inputs, output)
        for collectors, images in ((self.real, shown[0]), (self.made, shown[1])):
            for collector in collectors.values():
                collector.add(images, index)
        if self.perturbed:
            output = in_groups(self.tokenizer.decode, self.perturbed(output["indices"], index))
            rounded = self.config.protocol != "simvq"
            images = to_uint8(output) if rounded else output.float().clamp(-1, 1)
            for collector in self.wrong.values():
                collector.add(images, index)
        worse = values[self.ranked_by]
        pairs = torch.stack([real, made], 1).cpu()
        shuffled = (index * 2_654_435_761 % 2**32).double()  # looks random, and is the same in every run
        for name, score in {"worst": worse, "best": -worse, "random": shuffled}.items():
            self.examples[name].add(score, index, pairs)
        return {name: value.cpu() for name, value in values.items()}


def evaluate(config: ReconstructionConfig, accelerator: Accelerator) -> dict | None:
    """Measure `config.tokenizer` over all ranks; returns the result on the main process, None on the others. Writes
    pictures of examples beside `config.output`. Raises `UserError` or `UsageError` for a tokenizer, data, weights or
    sizes that do not work."""
    tokenizer = open_tokenizer(config.tokenizer).to(accelerator.device)
    earlier = open_tokenizer(config.compare).to(accelerator.device) if config.compare else None
    drift = Drift(tokenizer, earlier, config.tokenizer, config.compare) if config.compare else None
    data = report.data_for(tokenizer, config.data)
    open_split(data, config.split)  # before any download: what is wrong with the data is said now
    result: dict[str, Any] = {"kind": "reconstruction", "protocol": config.protocol, **report.no_numbers()}
    if tokenizer.image_size and data.image_size != tokenizer.image_size:
        warning = f"images of {data.image_size} pixels, for a tokenizer of {tokenizer.image_size}"
        result["warnings"].append(warning)
    measurement = Measurement(config, tokenizer, drift)
    measurement.lpips, about_lpips = load_networks(config.lpips, config.lpips_weights, accelerator, result)
    names = lambda name: [metric_name(m, name) for m in (("rfid", "pfid") if config.pfid else ("rfid",))]  # noqa: E731
    extractors = report.load_extractors(config, accelerator, ("fid",), result, names)
    if config.protocol == "simvq":
        extractors = {name: PytorchFidInception(extractor) for name, extractor in extractors.items()}
    cache = Cache(config.cache, config.cache_features, accelerator)
    references, keys = {}, {}
    transform = {"ours": "8-bit", "simvq": "float32"}[config.protocol]
    for name, extractor in extractors.items():
        keys[name] = key_of(data, config.split, config.limit, extractor, transform)
        measurement.made[name] = Collector(extractor, ("fid",))
        if config.pfid:
            measurement.wrong[name] = Collector(extractor, ("fid",))
        references[name] = cache.find(keys[name], {extractor.layers["fid"]}, set())
        if references[name] is None:
            measurement.real[name] = Collector(extractor, ("fid",))
    bad, batches = BadImages(data.max_bad_fraction, accelerator), []
    for batch in real_batches(data, config.split, config.limit, accelerator, "reconstruct", **config.loading):
        bad.update(batch)
        if len(batch["image"]):
            batches.append(measurement.add(to_uint8(batch["image"].to(accelerator.device)), batch["index"]))
    unreadable = bad_images(bad)
    counts = accelerator.reduce(measurement.counts, "sum").cpu()
    rows = gather_by_index(accelerator, batches)
    pictures = {name: config.output.with_name(f"{config.output.stem}-{name}.png") for name in measurement.examples}
    for name, examples in measurement.examples.items():
        examples.save(pictures[name], accelerator)
    made = {name: collector.total(accelerator) for name, collector in measurement.made.items()}
    wrong = {name: collector.total(accelerator) for name, collector in measurement.wrong.items()}
    for name, collector in measurement.real.items():
        references[name] = collector.total(accelerator), {}
        cache.keep(keys[name], references[name][0], {})
    if rows is None:
        return None
    if not rows:
        raise UserError(f"the {config.split} split of {data.source} holds no image that decodes")
    add_image_metrics(result, rows, config.protocol)
    for name, extractor in extractors.items():
        add_frechet_distance(result, made[name], references[name][0], extractor)
        if config.pfid:
            add_frechet_distance(result, wrong[name], references[name][0], extractor, config.pfid)
    add_codebook_metrics(result, rows, counts, tokenizer, data.image_size)
    if drift is not None:
        report.add(result, drift.metrics(rows), MEANINGS)
        result["compared"] = {"folder": config.compare, "sha256": earlier.fingerprint()}
    return result | {
        "counts": {"images": len(rows["index"]), **unreadable},
        "data": report.about_data(data, config.split),
        "tokenizer": {"folder": config.tokenizer, "sha256": tokenizer.fingerprint()},
        "features": {name: extractor.about for name, extractor in extractors.items()},
        "references": {name: "made" if name in measurement.real else "kept from an earlier run" for name in extractors},
        "lpips": about_lpips,
        "pictures": {name: str(path) for name, path in pictures.items()},
        "ranked_by": measurement.ranked_by,
        "precision": "float32",
        **report.provenance(accelerator, config.model_copy(update={"data": data})),
    }


def main() -> None:
    config = configs.parse(ReconstructionConfig, sys.argv[1:])
    accelerator = report.start(config.output)
    result = evaluate(config, accelerator)
    if result is not None:
        report.write(config.output, result)
        data, by = result["data"], config.tokenizer
        what = f"{result['counts']['images']} {data['split']} images of {data['source']}, {data['image_size']} px"
        print(report.table(f"{what}, by {by}; protocol {config.protocol}", result))
        print(f"wrote {config.output}")


if __name__ == "__main__":
    launch.run(main)
