"""Measure a tokenizer: how well it reconstructs images, and how it uses its codebook.

accelerate launch eval/reconstruction.py --tokenizer runs/nsvq/tokenizer --data ILSVRC/imagenet-1k --output result.json
accelerate launch eval/reconstruction.py --tokenizer DIR --data synthetic --output result.json --lpips none

Every image of the split is measured exactly once, over all ranks, in float32, on 8-bit originals and reconstructions.
Images come in the tokenizer's own size unless --data.image_size is given.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from common import config as configs
from common import launch
from common.data import BadImages, eval_batches, open_split
from common.errors import UsageError, UserError
from common.image_metrics import from_uint8, psnr, ssim, to_uint8
from eval import features as feature_metrics
from eval import report
from eval.features import Extractor, Unavailable
from eval.ranks import build_in_turn, gather_by_index
from tokenizer.health import usage
from tokenizer.losses import load_lpips
from tokenizer.pretrained import Tokenizer


class ReconstructionConfig(report.EvaluationConfig):
    """Measure a tokenizer's reconstructions and codebook."""

    tokenizer: str = Field(description="Folder of a tokenizer (<out>/tokenizer, or any diffusers VQModel).")
    split: Literal["train", "test"] = Field("test", description="Split of the data to reconstruct.")
    limit: int | None = Field(None, ge=1, description="Measure only this many images; null for all.")
    lpips: Literal["vgg", "alex", "squeeze", "none"] = Field("vgg", description="Backbone of LPIPS.")
    lpips_weights: Path | None = Field(
        None, description="Backbone weights (.pth or .safetensors, torchvision's names); null downloads them."
    )


MEANINGS = {
    "psnr": "dB, mean over images, 8-bit RGB",
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
}


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """images [B, 3, H, W] in [-1, 1] -> 8-bit reconstructions [B, 3, H, W], code indices [B, h, w], and the
    quantization error of each image [B] float64, in the units of the model's latents."""
    z = tokenizer.latents(images) / tokenizer.model.config.scaling_factor  # (B, d, h, w)
    indices = tokenizer.quantize(z)
    return to_uint8(tokenizer.decode(indices)), indices, tokenizer.quantization_error(z, indices)


@torch.no_grad()
def measure(
    tokenizer: Tokenizer,
    batches: Iterable[dict],
    bad: BadImages,
    extractor: Extractor | None = None,
    lpips: nn.Module | None = None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Measure one rank's `batches` (of `common.data.eval_batches`), and count the bad images in `bad`.

    Returns how often each code was used [K] int64, and per-image rows for `eval.ranks.gather_by_index`: index, psnr,
    ssim, quantization_error, and where asked for lpips, and the features of the originals and of what was made of them.
    """
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64, device=tokenizer.device)
    names = ["index", "psnr", "ssim", "quantization_error"]
    names += (["lpips"] if lpips else []) + (["real", "made"] if extractor else [])
    rows = {name: [] for name in names}  # the same on every rank, images or not
    for batch in batches:
        bad.update(batch)
        if len(batch["image"]) == 0:
            continue
        real = to_uint8(batch["image"].to(tokenizer.device))
        made, indices, error = reconstruct(tokenizer, from_uint8(real))
        counts += torch.bincount(indices.flatten(), minlength=len(counts))
        values = {"index": batch["index"], "quantization_error": error}
        values |= {"psnr": psnr(made, real), "ssim": ssim(made, real)}
        if lpips:
            values["lpips"] = lpips(from_uint8(made), from_uint8(real)).double()
        if extractor:
            layer = extractor.layers["fid"]
            values |= {"real": extractor(real)[layer], "made": extractor(made)[layer]}
        for name, value in values.items():
            rows[name].append(value.cpu())
    return counts, rows


def evaluate(config: ReconstructionConfig, accelerator: Accelerator) -> dict | None:
    """Measure `config.tokenizer` over all ranks; returns the result on the main process, None on the others.

    Raises `UserError` or `UsageError` for a tokenizer, data, weights or sizes that do not work.
    """
    tokenizer = Tokenizer.from_pretrained(config.tokenizer).to(accelerator.device)
    data = report.data_with_size(config.data, tokenizer.image_size)
    if data.image_size % tokenizer.downsampling:
        raise UsageError(
            f"data.image_size = {data.image_size} must be a multiple of the tokenizer's downsampling, "
            f"{tokenizer.downsampling}"
        )
    images = open_split(data, config.split)
    result = {"kind": "reconstruction", "metrics": {}, "protocol": {}, "skipped": {}, "warnings": []}
    if data.image_size != tokenizer.image_size:
        warning = f"images of {data.image_size} pixels, for a tokenizer of {tokenizer.image_size}"
        result["warnings"].append(warning)
    extractor = _load_extractor(config, accelerator, result["skipped"])
    lpips = _load_lpips(config, accelerator, result["skipped"])
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
    counts, rows = measure(tokenizer, progress, bad, extractor, lpips)
    bad.check(final=True)
    unreadable = report.bad_images(accelerator, bad.bad)
    counts = accelerator.reduce(counts, "sum").cpu()
    rows = gather_by_index(accelerator, rows)
    if rows is None:
        return None
    if len(rows["index"]) == 0:
        raise UserError(f"the {config.split} split of {data.source} holds no image that decodes")
    _add_image_metrics(result, rows, f"lpips_{config.lpips}")
    if extractor is not None:
        _add_frechet_distance(result, rows, extractor)
    _add_codebook_metrics(result, rows, counts)
    result |= {
        "counts": {"images": len(rows["index"]), **unreadable},
        "data": report.about_data(data, config.split, images),
        "tokenizer": {"folder": config.tokenizer, "sha256": tokenizer.fingerprint()},
        "features": report.about_extractor(extractor, config),
        "lpips": None
        if lpips is None
        else {"backbone": config.lpips, "weights": config.lpips_weights and str(config.lpips_weights)},
        "precision": "float32",
        **report.provenance(accelerator, config.model_copy(update={"data": data})),
    }
    return result


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
        )
        print(report.table(title, result))
        print(f"wrote {config.output}")


def _add(result: dict, metrics: dict[str, float]) -> None:
    result["metrics"] |= metrics
    result["protocol"] |= {name: MEANINGS[name] for name in metrics}


def _add_image_metrics(result: dict, rows: dict[str, Tensor], lpips: str) -> None:
    finite = rows["psnr"].isfinite()
    if exact := int((~finite).sum()):
        result["warnings"].append(f"psnr: {exact} images are reproduced exactly (infinite dB) and left out of the mean")
    if finite.any():
        _add(result, {"psnr": rows["psnr"][finite].mean().item()})
    else:
        result["skipped"]["psnr"] = "all images are reproduced exactly (infinite dB)"
    _add(result, {"ssim": rows["ssim"].mean().item()})
    if "lpips" in rows:
        _add(result, {lpips: rows["lpips"].mean().item()})


def _add_frechet_distance(result: dict, rows: dict[str, Tensor], extractor: Extractor) -> None:
    name = feature_metrics.metric_name("rfid", extractor.name)
    if len(rows["real"]) < 2:
        result["skipped"][name] = "needs at least 2 images"
        return
    result["metrics"][name] = feature_metrics.frechet_distance(rows["made"], rows["real"])
    result["warnings"] += feature_metrics.rank_warnings(name, rows["made"], rows["real"])
    result["protocol"][name] = (
        f"Frechet distance of reconstructions to originals, 8-bit, features {extractor.layers['fid']} "
        f"of {extractor.name}"
    )


def _add_codebook_metrics(result: dict, rows: dict[str, Tensor], counts: Tensor) -> None:
    use, k = usage(counts), len(counts)
    _add(
        result,
        {
            "utilization": use["utilization"],
            "perplexity": use["perplexity"],
            "perplexity_fraction": use["perplexity"] / k,
            "quantization_error": rows["quantization_error"].mean().item(),
            "codebook_size": k,
            "bits_per_token": math.log2(k),
            "tokens_per_image": int(counts.sum()) // len(rows["index"]),
        },
    )


def _load_extractor(config: ReconstructionConfig, accelerator: Accelerator, skipped: dict) -> Extractor | None:
    if config.features == "none":
        return None
    try:
        return feature_metrics.load_extractor(config.features, config.features_weights, accelerator, ("fid",))
    except Unavailable as error:
        skipped[feature_metrics.metric_name("rfid", config.features)] = str(error)
        return None


def _load_lpips(config: ReconstructionConfig, accelerator: Accelerator, skipped: dict) -> nn.Module | None:
    if config.lpips == "none":
        return None
    try:
        return build_in_turn(accelerator, lambda: load_lpips(config.lpips, config.lpips_weights)).to(accelerator.device)
    except UserError:
        if config.lpips_weights is not None:
            raise
        skipped[f"lpips_{config.lpips}"] = (
            f"the {config.lpips} backbone's weights cannot be downloaded; give torchvision's file of them with "
            "--lpips_weights FILE, or choose another --lpips"
        )
        return None


if __name__ == "__main__":
    launch.run(main)
