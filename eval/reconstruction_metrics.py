"""The numbers of a reconstruction result and their meanings, from one row an image, code counts and feature sets."""

import math

import torch
from torch import Tensor

from nsvq.common.image_metrics import decibels
from nsvq.eval.codes import code_bits
from nsvq.eval.feature_statistics import FeatureSet, frechet_distance
from nsvq.eval.features import Extractor, PytorchFidInception, metric_name
from nsvq.eval.report import add, rank_warnings
from nsvq.tokenizer.health import usage
from nsvq.tokenizer.perturbation import PerturbationConfig
from nsvq.tokenizer.pretrained import Tokenizer

BATCH = 64  # images over which SimVQ's evaluation takes one PSNR, and one mean SSIM
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
    "unigram_bits": "bits an image, h w H(c), by the entropy of code use on the whole set",
    "bigram_bits": "bits an image, h H(c) + h (w - 1) H(c | left neighbour), by frequencies on the whole set",
    "drift_rms": "root mean square of how far the encoder's outputs moved since the compared tokenizer (NSVQ, eq. 7)",
    "drift_relative": "the same / root mean square of the encoder's output now",
    "churn": "share of tokens whose code is another than in the compared tokenizer (NSVQ, eq. 19)",
}


def add_image_metrics(result: dict, rows: dict[str, Tensor], protocol: str) -> None:
    """PSNR, SSIM and LPIPS of rows [N] in the order of the images: "mse", "ssim", "lpips_..."."""
    lpips = {name: values.mean().item() for name, values in rows.items() if name.startswith("lpips_")}
    by_batch = torch.stack([part.mean() for part in rows["mse"].split(BATCH)])
    if protocol == "simvq":
        similarity = torch.stack([part.mean() for part in rows["ssim"].split(BATCH)]).mean()
        how = {"psnr_batch": "levels cut", "ssim": f"levels cut; mean over batches of {BATCH}"}
        how |= dict.fromkeys(lpips, "not rounded to 8 bits")
        metrics = {"psnr_batch": decibels(by_batch).mean().item(), "ssim": similarity.item(), **lpips}
        add(result, metrics, {name: f"{MEANINGS[name]}, {added}" for name, added in how.items()})
        return
    exact = rows["mse"] == 0
    if exact.any():
        same = f"{int(exact.sum())} images are reproduced exactly (infinite dB)"
        result["warnings"].append(f"psnr: {same} and left out of the mean")
    if exact.all():
        result["skipped"] |= dict.fromkeys(("psnr", "psnr_batch"), "all images are reproduced exactly (infinite dB)")
    else:
        add(result, {"psnr": decibels(rows["mse"][~exact]).mean().item()}, MEANINGS)
        add(result, {"psnr_batch": decibels(by_batch[by_batch > 0]).mean().item()}, MEANINGS)
    add(result, {"ssim": rows["ssim"].mean().item(), **lpips}, MEANINGS)


def add_frechet_distance(
    result: dict, made: FeatureSet, real: FeatureSet, extractor: Extractor, perturbed: PerturbationConfig | None = None
) -> None:
    """The Frechet distance of reconstructions, where `perturbed` is given of such from perturbed codes, to originals,
    with warnings, or why there is none."""
    name, layer = metric_name("pfid" if perturbed else "rfid", extractor.name), extractor.layers["fid"]
    if layer not in made.gaussians:
        result["skipped"][name] = "needs at least 2 images"
        return
    result["metrics"][name] = frechet_distance(made.gaussians[layer], real.gaussians[layer])
    result["warnings"] += rank_warnings(name, made, real, layer) + extractor.warnings
    if made.count != real.count:
        against = f"{made.count} reconstructions against {real.count} originals of an earlier run"
        result["warnings"].append(f"{name}: {against}")
    kind = "floats, not rounded to 8 bits" if isinstance(extractor, PytorchFidInception) else "8-bit"
    kind += f", features {layer} of {extractor.name}"
    result["meanings"][name] = f"Frechet distance of reconstructions to originals, {kind}"
    if perturbed:
        how = f"{perturbed.alpha:g} of the tokens of {perturbed.beta:g} of the images"
        what = f"the same of reconstructions with {how} replaced by one of the {perturbed.delta} nearest codes"
        result["meanings"][name] = f"{what} (RobustTok), {kind}"


def add_codebook_metrics(
    result: dict, rows: dict[str, Tensor], counts: Tensor, tokenizer: Tokenizer, image_size: int
) -> None:
    """Use of the codes of `counts` [K] and bits, the latter also by the rows' "codes" [N, h, w]; skipped where the
    tokenizer has no codebook."""
    if tokenizer.codebook_size == 0:
        names = ("utilization", "perplexity", "quantization_error", "bits_per_pixel", "unigram_bits", "bigram_bits")
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
    add(result, metrics | code_bits(rows["codes"]), MEANINGS)
    total = int(counts.sum())
    for name, bins, what in (("unigram_bits", k, f"K = {k:,} codes"), ("bigram_bits", k**2, f"K^2 = {k**2:,} pairs")):
        if total < bins:
            result["meanings"][name] += f"; too low, since {total:,} tokens do not fill {what}"
    result["usage_histogram"] = usage_histogram(counts)


def usage_histogram(counts: Tensor) -> list[dict[str, int]]:
    """How many codes [K] were used how often: [{"from": 0, "to": 0, "codes": n}, then 1 to 1, 2 to 3, 4 to 7, ...]."""
    classes = torch.where(counts > 0, counts.double().log2().floor() + 1, 0).long()
    numbers = torch.bincount(classes).tolist()
    return [{"from": 2**i // 2, "to": max(2**i - 1, 0), "codes": codes} for i, codes in enumerate(numbers)]
