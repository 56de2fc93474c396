"""Measure a tokenizer: how well it reconstructs images, and how it uses its codebook.

accelerate launch eval/reconstruction.py --tokenizer runs/nsvq/tokenizer --data ILSVRC/imagenet-1k --output result.json
accelerate launch eval/reconstruction.py --tokenizer DIR --data synthetic --output result.json --lpips none
accelerate launch eval/reconstruction.py --tokenizer DIR --compare EARLIER_DIR --output result.json    # drift and churn

Every image of the split is measured exactly once, over all ranks, in float32. Images come in the tokenizer's own size
unless --data.image_size is given. The protocols are written down in docs/evaluation.md.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from common import config as configs
from common import launch
from common.data import BadImages, eval_batches, open_split
from common.errors import UsageError, UserError
from common.image_metrics import decibels, from_uint8, squared_error, ssim, to_uint8, truncate_uint8
from eval import report
from eval.features import INCEPTION, Collector, Extractor, PytorchFidInception, metric_name
from eval.ranks import build_in_turn, gather_by_index, in_groups
from eval.reference import Cache, bad_images, key_of
from eval.statistics import FeatureSet, frechet_distance
from tokenizer.health import usage
from tokenizer.losses import load_lpips
from tokenizer.pretrained import Tokenizer

BATCH = 64  # images over which SimVQ's evaluation takes one PSNR, and one mean SSIM
_SHOWN = 8  # images of each picture


class ReconstructionConfig(report.EvaluationConfig):
    """Measure a tokenizer's reconstructions and codebook."""

    tokenizer: str = Field(
        description="Folder of a tokenizer (<out>/tokenizer, or a diffusers VQModel or AutoencoderKL)."
    )
    compare: str | None = Field(None, description="Folder of an earlier tokenizer, to measure drift and churn since.")
    protocol: Literal["ours", "simvq"] = Field("ours", description="How to measure: see docs/evaluation.md.")
    split: Literal["train", "test"] = Field("test", description="Split of the data to reconstruct.")
    limit: int | None = Field(None, ge=1, description="Measure only this many images; null for all.")
    lpips: list[Literal["vgg", "alex", "squeeze", "none"]] = Field(["vgg", "alex"], description="Backbones of LPIPS.")
    lpips_weights: list[Path] = Field(
        [],
        description="Backbone weights (.pth or .safetensors, torchvision's names), one for each; none: download them.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ReconstructionConfig":
        if self.lpips_weights and len(self.lpips_weights) != len(self.lpips):
            raise ValueError("lpips_weights must name one file for each backbone of lpips")
        if self.protocol == "simvq" and self.features not in ([INCEPTION], ["none"]):
            raise ValueError(f"protocol simvq measures features of {INCEPTION} alone")
        return self


MEANINGS = {
    "psnr": "dB, mean over images, 8-bit RGB",
    "psnr_batch": f"dB of the mean squared error of {BATCH} consecutive images (SimVQ's way), mean over these batches",
    "ssim": "mean over images, 8-bit RGB, 7 x 7 uniform window (scikit-image's default), data range 255",
    "lpips_vgg": "mean over images, version 0.1, VGG16",
    "lpips_alex": "mean over images, version 0.1, AlexNet",
    "lpips_squeeze": "mean over images, version 0.1, SqueezeNet",
    "utilization": "codes used at least once on the whole set / K",
    "perplexity": "exp of the entropy of code use, in nats, on the whole set",
    "perplexity_fraction": "perplexity / K",
    "quantization_error": "mean of (z - c)^2 over images and latent elements",
    "codebook_size": "K",
    "bits_per_token": "log2 K",
    "tokens_per_image": "h w",
    "bits_per_pixel": "h w log2 K / (H W)",
    "drift_rms": "root mean square of how far the encoder's outputs moved since the compared tokenizer (NSVQ, eq. 7)",
    "drift_relative": "the same / root mean square of the encoder's output now",
    "churn": "share of tokens whose code is another than in the compared tokenizer (NSVQ, eq. 19)",
}


class ContinuousTokenizer(Tokenizer):
    """An `AutoencoderKL`: latents are the mode of its posterior, and there is no codebook."""

    codebook_size = 0
    device = property(lambda self: self.model.device)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent_dist.mode() * self.model.config.scaling_factor


def open_tokenizer(folder: str) -> Tokenizer:
    """Read a stock `VQModel` or `AutoencoderKL` folder. Raises `UserError` where there is none."""
    try:
        kind = VQModel.load_config(folder).get("_class_name")
        if kind == "AutoencoderKL":
            return ContinuousTokenizer(AutoencoderKL.from_pretrained(folder))
    except (OSError, ValueError):
        pass  # the tokenizer's own reader says what is wrong
    return Tokenizer.from_pretrained(folder)


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """images [B, 3, H, W] in [-1, 1] -> {"z": latents [B, d, h, w] in the model's units}; with a codebook "indices"
    [B, h, w], too, and "error" [B] float64, the mean of (z - c)^2 of each image."""
    z = tokenizer.latents(images) / tokenizer.model.config.scaling_factor
    if tokenizer.codebook_size == 0:
        return {"z": z}
    indices = tokenizer.quantize(z)
    return {"z": z, "indices": indices, "error": tokenizer.quantization_error(z, indices)}


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """`encode`, and "image": the reconstructions [B, 3, H, W], not clipped."""
    codes = encode(tokenizer, images)
    if tokenizer.codebook_size == 0:
        return codes | {"image": tokenizer.model.decode(codes["z"]).sample}
    return codes | {"image": tokenizer.decode(codes["indices"])}


class Examples:
    """The images with the highest scores of a rank, as pairs of original and reconstruction."""

    def __init__(self):
        self.rows: dict[str, list[Tensor]] = {"index": [], "score": [], "pair": []}

    def add(self, scores: Tensor, index: Tensor, pairs: Tensor) -> None:
        """Scores [B], image numbers [B] and pairs [B, 2, 3, H, W] uint8."""
        values = {"index": index, "score": scores.cpu(), "pair": pairs}
        joined = {name: torch.cat([*self.rows[name], value]) for name, value in values.items()}
        best = joined["score"].argsort(descending=True, stable=True)[:_SHOWN]
        self.rows = {name: [value[best]] for name, value in joined.items()}

    def save(self, path: Path, accelerator: Accelerator) -> None:
        """One picture of the best over all ranks, originals above reconstructions. A collective call."""
        rows = gather_by_index(accelerator, self.rows)
        if rows is not None and len(rows["index"]):
            best = rows["score"].argsort(descending=True, stable=True)[:_SHOWN]
            pairs = rows["pair"][best].float() / 255
            save_image(torch.cat([pairs[:, 0], pairs[:, 1]]), path, nrow=len(best))


class Measurement:
    """All that is measured of the images of one rank: rows of single numbers, code counts, feature statistics."""

    def __init__(self, config: ReconstructionConfig, tokenizer: Tokenizer, earlier: Tokenizer | None):
        self.config, self.tokenizer, self.earlier = config, tokenizer, earlier
        self.lpips: dict[str, nn.Module] = {}
        self.real: dict[str, Collector] = {}  # by extractor; without those whose reference is kept
        self.made: dict[str, Collector] = {}
        self.examples = {"worst": Examples(), "best": Examples(), "random": Examples()}
        size = max(1, tokenizer.codebook_size)
        self.counts = torch.zeros(size, dtype=torch.int64, device=tokenizer.device)

    def run(self, batches: Iterable[dict], bad: BadImages) -> dict[str, list[Tensor]]:
        """Measure `batches` of `common.data.eval_batches`; returns one row an image, for `gather_by_index`."""
        names = ["index", "mse", "ssim", *(f"lpips_{net}" for net in self.lpips)]
        names += [] if self.tokenizer.codebook_size == 0 else ["error"]
        names += ["drift", "square", "churn"] if self.earlier else []
        rows: dict[str, list[Tensor]] = {name: [] for name in names}  # the same on every rank, images or not
        for batch in batches:
            bad.update(batch)
            if len(batch["image"]):
                for name, value in self._measure(
                    to_uint8(batch["image"].to(self.tokenizer.device)), batch["index"]
                ).items():
                    rows[name].append(value.cpu())
        return rows

    def _measure(self, real: Tensor, index: Tensor) -> dict[str, Tensor]:
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
            self.counts += torch.bincount(output["indices"].flatten(), minlength=len(self.counts))
        if self.earlier:
            values |= self._moved(inputs, output)
        for collectors, images in ((self.real, shown[0]), (self.made, shown[1])):
            for collector in collectors.values():
                collector.add(images, index)
        worse = values[f"lpips_{next(iter(self.lpips))}"] if self.lpips else values["mse"]
        pairs = torch.stack([real, made], 1).cpu()
        for name, score in {"worst": worse, "best": -worse, "random": _shuffled(index)}.items():
            self.examples[name].add(score, index, pairs)
        return values

    def _moved(self, images: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared move, mean square and share of other codes of each image."""
        before = in_groups(lambda group: encode(self.earlier, group), images)
        z, z_before = _uncentred(self.tokenizer, now["z"]), _uncentred(self.earlier, before["z"])
        return {
            "drift": (z - z_before).double().square().flatten(1).mean(1),
            "square": z.double().square().flatten(1).mean(1),
            "churn": (now["indices"] != before["indices"]).double().flatten(1).mean(1),
        }


def _uncentred(tokenizer: Tokenizer, z: Tensor) -> Tensor:
    """The encoder's own output: exported folders hold latents around their mean, which lies in `quant_conv`'s bias."""
    return z - tokenizer.model.quant_conv.bias[:, None, None]


def _shuffled(index: Tensor) -> Tensor:
    """A number for each image number that looks random and is the same in every run."""
    return (index * 2_654_435_761 % 2**32).double()


def evaluate(config: ReconstructionConfig, accelerator: Accelerator) -> dict | None:
    """Measure `config.tokenizer` over all ranks; returns the result on the main process, None on the others.

    Writes pictures of examples beside `config.output`. Raises `UserError` or `UsageError` for a tokenizer, data,
    weights or sizes that do not work.
    """
    tokenizer = open_tokenizer(config.tokenizer).to(accelerator.device)
    earlier = open_tokenizer(config.compare).to(accelerator.device) if config.compare else None
    if earlier is not None:
        _check_comparable(tokenizer, earlier, config)
    data = report.data_with_size(config.data, tokenizer.image_size)
    if data.image_size % tokenizer.downsampling:
        raise UsageError(
            f"data.image_size = {data.image_size} must be a multiple of the tokenizer's downsampling, "
            f"{tokenizer.downsampling}"
        )
    images = open_split(data, config.split)
    result = {"kind": "reconstruction", "protocol": config.protocol}
    result |= {"metrics": {}, "meanings": {}, "skipped": {}, "warnings": []}
    if data.image_size != tokenizer.image_size:
        warning = f"images of {data.image_size} pixels, for a tokenizer of {tokenizer.image_size}"
        result["warnings"].append(warning)
    measurement = Measurement(config, tokenizer, earlier)
    measurement.lpips = _load_lpips(config, accelerator, result["skipped"])
    extractors = _load_extractors(config, accelerator, result)
    cache = Cache(config.cache, config.cache_features, accelerator)
    references, keys = {}, {}
    transform = {"ours": "8-bit", "simvq": "float32"}[config.protocol]
    for name, extractor in extractors.items():
        keys[name] = key_of(data, config.split, config.limit, images, extractor, transform)
        measurement.made[name] = Collector(extractor, ("fid",))
        references[name] = cache.find(keys[name], {extractor.layers["fid"]}, set())
        if references[name] is None:
            measurement.real[name] = Collector(extractor, ("fid",))
    batches = eval_batches(
        data,
        config.split,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=config.workers,
        limit=config.limit,
    )
    bad = BadImages(data.max_bad_fraction, accelerator)
    progress = tqdm(batches, "reconstruct", unit="batch", disable=not accelerator.is_main_process, leave=False)
    rows = measurement.run(progress, bad)
    bad.check(final=True)
    unreadable = bad_images(accelerator, bad.bad)
    counts = accelerator.reduce(measurement.counts, "sum").cpu()
    rows = gather_by_index(accelerator, rows)
    pictures = {name: config.output.with_name(f"{config.output.stem}-{name}.png") for name in measurement.examples}
    for name, examples in measurement.examples.items():
        examples.save(pictures[name], accelerator)
    made = {name: collector.total(accelerator) for name, collector in measurement.made.items()}
    for name, collector in measurement.real.items():
        references[name] = collector.total(accelerator), {}
        cache.keep(keys[name], references[name][0], {})
    if rows is None:
        return None
    if len(rows["index"]) == 0:
        raise UserError(f"the {config.split} split of {data.source} holds no image that decodes")
    _add_image_metrics(result, rows, config.protocol)
    for name, extractor in extractors.items():
        _add_frechet_distance(result, made[name], references[name][0], extractor)
    _add_codebook_metrics(result, rows, counts, tokenizer, data.image_size)
    if earlier is not None:
        drift, square = rows["drift"].mean().sqrt(), rows["square"].mean().sqrt()
        _add(
            result,
            {
                "drift_rms": drift.item(),
                "drift_relative": (drift / square).item(),
                "churn": rows["churn"].mean().item(),
            },
        )
        result["compared"] = {"folder": config.compare, "sha256": earlier.fingerprint()}
    return result | {
        "counts": {"images": len(rows["index"]), **unreadable},
        "data": report.about_data(data, config.split, images),
        "tokenizer": {"folder": config.tokenizer, "sha256": tokenizer.fingerprint()},
        "features": {name: extractor.about for name, extractor in extractors.items()},
        "references": {
            name: "kept from an earlier run" if name not in measurement.real else "made" for name in extractors
        },
        "lpips": {
            net: str(config.lpips_weights[i]) if config.lpips_weights else "downloaded"
            for i, net in enumerate(config.lpips)
            if net in measurement.lpips
        },
        "pictures": {name: str(path) for name, path in pictures.items()},
        "precision": "float32",
        **report.provenance(accelerator, config.model_copy(update={"data": data})),
    }


def main() -> None:
    config = configs.parse(ReconstructionConfig, sys.argv[1:])
    report.open_output(config.output)
    report.exact_float32()
    accelerator = Accelerator(mixed_precision="no")
    result = evaluate(config, accelerator)
    if result is not None:
        report.write(config.output, result)
        data, by = result["data"], config.tokenizer
        title = (
            f"{result['counts']['images']} {data['split']} images of {data['source']}, {data['image_size']} px, by {by}"
            f"; protocol {config.protocol}"
        )
        print(report.table(title, result))
        print(f"wrote {config.output}")


def _check_comparable(now: Tokenizer, before: Tokenizer, config: ReconstructionConfig) -> None:
    if 0 in (now.codebook_size, before.codebook_size):
        raise UsageError(f"--compare: {config.tokenizer} and {config.compare} must both have a codebook")
    shapes = [(t.downsampling, t.codebook.shape[1]) for t in (now, before)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"--compare {config.compare}: its latents (downsampling, width) = {shapes[1]} are not those of "
            f"{config.tokenizer}, {shapes[0]}"
        )


def _add(result: dict, metrics: dict[str, float], **instead: str) -> None:
    result["metrics"] |= metrics
    result["meanings"] |= {name: instead.get(name, MEANINGS[name]) for name in metrics}


def _add_image_metrics(result: dict, rows: dict[str, Tensor], protocol: str) -> None:
    lpips = {name: values.mean().item() for name, values in rows.items() if name.startswith("lpips_")}
    by_batch = torch.stack([part.mean() for part in rows["mse"].split(BATCH)])
    if protocol == "simvq":
        similarity = torch.stack([part.mean() for part in rows["ssim"].split(BATCH)]).mean()
        _add(
            result,
            {"psnr_batch": decibels(by_batch).mean().item(), "ssim": similarity.item(), **lpips},
            psnr_batch=f"{MEANINGS['psnr_batch']}, levels cut",
            ssim=f"{MEANINGS['ssim']}, levels cut; mean over batches of {BATCH}",
            **{name: f"{MEANINGS[name]}, not rounded to 8 bits" for name in lpips},
        )
        return
    exact = rows["mse"] == 0
    if exact.any():
        result["warnings"].append(
            f"psnr: {int(exact.sum())} images are reproduced exactly (infinite dB) and left out of the mean"
        )
    if exact.all():
        result["skipped"] |= dict.fromkeys(("psnr", "psnr_batch"), "all images are reproduced exactly (infinite dB)")
    else:
        _add(result, {"psnr": decibels(rows["mse"][~exact]).mean().item()})
        _add(result, {"psnr_batch": decibels(by_batch[by_batch > 0]).mean().item()})
    _add(result, {"ssim": rows["ssim"].mean().item(), **lpips})


def _add_frechet_distance(result: dict, made: FeatureSet, real: FeatureSet, extractor: Extractor) -> None:
    name, layer = metric_name("rfid", extractor.name), extractor.layers["fid"]
    if layer not in made.gaussians:
        result["skipped"][name] = "needs at least 2 images"
        return
    result["metrics"][name] = frechet_distance(made.gaussians[layer], real.gaussians[layer])
    result["warnings"] += report.rank_warnings(name, made, real, layer) + extractor.warnings
    if made.count != real.count:
        result["warnings"].append(
            f"{name}: {made.count} reconstructions against {real.count} originals of an earlier run"
        )
    kind = "floats, not rounded to 8 bits" if isinstance(extractor, PytorchFidInception) else "8-bit"
    result["meanings"][name] = (
        f"Frechet distance of reconstructions to originals, {kind}, features {layer} of {extractor.name}"
    )


def _add_codebook_metrics(
    result: dict, rows: dict[str, Tensor], counts: Tensor, tokenizer: Tokenizer, image_size: int
) -> None:
    if tokenizer.codebook_size == 0:
        names = ("utilization", "perplexity", "quantization_error", "bits_per_pixel")
        result["skipped"] |= dict.fromkeys(names, f"a {type(tokenizer.model).__name__} has no codebook")
        return
    use, k = usage(counts), len(counts)
    tokens = int(counts.sum()) // len(rows["index"])
    metrics = {
        "utilization": use["utilization"],
        "perplexity": use["perplexity"],
        "perplexity_fraction": use["perplexity"] / k,
        "quantization_error": rows["error"].mean().item(),
        "codebook_size": k,
        "bits_per_token": math.log2(k),
        "tokens_per_image": tokens,
        "bits_per_pixel": tokens * math.log2(k) / image_size**2,
    }
    _add(result, metrics)
    result["usage_histogram"] = usage_histogram(counts)


def usage_histogram(counts: Tensor) -> list[dict[str, int]]:
    """How many codes [K] were used how often: [{"from": 0, "to": 0, "codes": n}, then 1 to 1, 2 to 3, 4 to 7, ...]."""
    classes = torch.where(counts > 0, counts.double().log2().floor() + 1, 0).long()
    numbers = torch.bincount(classes).tolist()
    return [{"from": 2**i // 2, "to": max(2**i - 1, 0), "codes": codes} for i, codes in enumerate(numbers)]


def _load_extractors(config: ReconstructionConfig, accelerator: Accelerator, result: dict) -> dict[str, Extractor]:
    extractors = report.load_extractors(config, accelerator, ("fid",), result, lambda name: [metric_name("rfid", name)])
    if config.protocol == "simvq":
        extractors = {name: PytorchFidInception(extractor) for name, extractor in extractors.items()}
    return extractors


def _load_lpips(config: ReconstructionConfig, accelerator: Accelerator, skipped: dict) -> dict[str, nn.Module]:
    loaded = {}
    for i, net in enumerate(net for net in config.lpips if net != "none"):
        weights = config.lpips_weights[i] if config.lpips_weights else None
        try:
            module = build_in_turn(accelerator, lambda net=net, weights=weights: load_lpips(net, weights))
            loaded[net] = module.to(accelerator.device)
        except UserError:
            if weights is not None:
                raise
            skipped[f"lpips_{net}"] = (
                f"the {net} backbone's weights cannot be downloaded; give torchvision's file of them with "
                "--lpips_weights FILE, or choose another --lpips"
            )
    return loaded


if __name__ == "__main__":
    launch.run(main)
