import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from nsvq.common.image_metrics import to_uint8
from nsvq.errors import UsageError, UserError
from nsvq.eval import autoencoders, perceptual, reconstruction, reconstruction_metrics
from nsvq.eval.codes import Perturbed, code_bits
from nsvq.eval.features import Collector
from nsvq.eval.reconstruction import main
from nsvq.eval.reconstruction_metrics import add_codebook_metrics
from nsvq.tokenizer.perturbation import PerturbationConfig
from nsvq.tokenizer.pretrained import open_tokenizer


@pytest.fixture
def measure(run_script, tokenizer_folder, image_folder, tiny_extractor, tmp_path):
    """Run the script on the tiny tokenizer and images; returns the result."""

    def run(
        *arguments,
        tokenizer=tokenizer_folder,
        features=tiny_extractor,
        lpips="none",
        cache=None,
        bad=0.3,
        output=tmp_path / "new" / "result.json",
    ):
        run_script(
            main,
            *("--tokenizer", tokenizer, "--data", image_folder, "--data.max_bad_fraction", bad, "--output", output),
            *("--features", features, "--lpips", lpips, "--workers", 0, "--cache", cache or "null", *arguments),
        )
        return json.loads(output.read_text())

    return run


def conditional_bits(rows):
    """H(c | left neighbour) of rows of codes, pair by pair."""
    pairs = Counter((int(a), int(b)) for row in rows for a, b in pairwise(row))
    left = Counter(a for a, _ in pairs.elements())
    return -sum(n * np.log2(n / left[a]) for (a, _), n in pairs.items()) / pairs.total()


def test_every_number_equals_that_of_independent_tools(measure, tokenizer_folder, image_folder, tmp_path):
    result = measure("--batch_size", 5)
    model = VQModel.from_pretrained(tokenizer_folder)
    real, made, codes, errors = tmp_path / "real", tmp_path / "made", [], []
    real.mkdir(), made.mkdir()
    psnr, ssim, mse = [], [], []
    files = sorted(f for f in image_folder.glob("val/*/*.png") if f.name != "broken.png")
    originals = [np.asarray(Image.open(file)) for file in files]
    filled = originals + originals[-1:]  # six groups of 4, as the networks see them
    outputs = []
    for group in (filled[i : i + 4] for i in range(0, 24, 4)):
        x = torch.tensor(np.stack(group)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            z = model.encode(x).latents
            _, _, (_, _, indices) = model.quantize(z)
            z_q = model.quantize.get_codebook_entry(indices, (4, 8, 8, 3))
            outputs += zip(z, z_q, indices.view(4, 64), model.decode(z_q, force_not_quantize=True).sample, strict=True)
    for i, (original, (z, z_q, indices, y)) in enumerate(zip(originals, outputs[:23], strict=True)):
        codes += indices.tolist()
        errors.append((z - z_q).double().square().mean().item())
        y = np.rint((y.permute(1, 2, 0).numpy().astype(np.float64) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        psnr.append(peak_signal_noise_ratio(original, y, data_range=255))
        mse.append(mean_squared_error(original, y))
        ssim.append(structural_similarity(original, y, data_range=255, channel_axis=2))
        Image.fromarray(original).save(real / f"{i:02}.png")
        Image.fromarray(y).save(made / f"{i:02}.png")
    p = np.bincount(codes, minlength=24) / len(codes)
    perplexity = np.exp(-sum(q * np.log(q) for q in p if q))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(made), input2=str(real), feature_extractor="tiny", fid=True, cuda=False, verbose=False, cache=False
    )
    assert result["metrics"] == pytest.approx(
        {
            "psnr": np.mean(psnr),
            "psnr_batch": 10 * np.log10(255**2 / np.mean(mse)),  # all 23 in one batch
            "ssim": np.mean(ssim),
            "rfd_tiny": theirs["frechet_inception_distance"],
            "utilization": len(set(codes)) / 24,
            "perplexity": perplexity,
            "perplexity_fraction": perplexity / 24,
            "quantization_error": np.mean(errors),
            "codebook_size": 24,
            "bits_per_token": np.log2(24),
            "tokens_per_image": 64,
            "bits_per_pixel": 64 * np.log2(24) / 256,
            "unigram_bits": 64 * np.log2(perplexity),
            "bigram_bits": 8 * np.log2(perplexity) + 56 * conditional_bits(np.array(codes).reshape(-1, 8)),
        },
        rel=1e-6,
    )
    assert "too low" not in result["meanings"]["bigram_bits"]  # 1,472 tokens for 576 pairs
    assert 0 < result["metrics"]["utilization"] <= 20 / 24
    assert set(result["meanings"]) == set(result["metrics"])
    histogram = result["usage_histogram"]
    counts = np.bincount(codes, minlength=24)
    assert [bar["codes"] for bar in histogram] == [
        ((b["from"] <= counts) & (counts <= b["to"])).sum() for b in histogram
    ]
    assert sum(bar["codes"] for bar in histogram) == 24


def test_the_result_says_what_was_measured_and_what_was_left_out(measure, tokenizer_folder):
    before = {path.name: path.stat().st_mtime_ns for path in tokenizer_folder.iterdir()}
    result = measure()
    assert result["counts"]["images"] == 23
    assert result["counts"]["bad_images"] == 1
    assert "broken.png" in result["counts"]["bad_images_shown"][0]
    assert result["data"]["split"] == "test"
    assert result["data"]["image_size"] == 16  # the tokenizer's, as none was given
    assert len(result["data"]["fingerprint"]) == len(result["tokenizer"]["sha256"]) == 64
    assert len(result["features"]["tiny"]["file_sha256"]) == 64
    assert {"torch", "diffusers", "torch-fidelity", "nsvq"} <= set(result["versions"])
    assert {path.name: path.stat().st_mtime_ns for path in tokenizer_folder.iterdir()} == before


def test_the_batch_size_changes_no_number(measure):
    results = [measure("--batch_size", size)["metrics"] for size in (1, 5, 23)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    assert results[0] == pytest.approx(results[2], rel=1e-9)


def test_perfect_reconstructions_have_distance_zero_and_no_psnr(measure, monkeypatch):
    def perfect(tokenizer, images):
        error, z = torch.zeros(len(images), dtype=torch.float64), torch.zeros(len(images), 3, 8, 8)
        return {"image": images, "z": z, "indices": z[:, 0].long(), "error": error}

    monkeypatch.setattr(reconstruction, "reconstruct", perfect)
    result = measure()
    assert result["metrics"]["ssim"] == pytest.approx(1, abs=1e-12)
    assert result["metrics"]["rfd_tiny"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["perplexity"] == 1
    assert "psnr" not in result["metrics"]
    assert "reproduced exactly" in result["skipped"]["psnr"]
    assert "psnr_batch" not in result["metrics"]


def test_pfid_is_the_distance_of_images_decoded_from_codes_near_their_own(
    measure, tokenizer_folder, image_folder, tmp_path
):
    plain = measure()
    result = measure("--pfid.alpha", 0.7, "--pfid.delta", 5, "--batch_size", 9)
    assert result["metrics"] == pytest.approx(plain["metrics"] | {"pfd_tiny": result["metrics"]["pfd_tiny"]}, rel=1e-9)
    assert "0.7 of the tokens of 1 of the images replaced by one of the 5 nearest" in result["meanings"]["pfd_tiny"]
    tokenizer = open_tokenizer(tokenizer_folder)
    codes = tokenizer.codebook.double().numpy()
    nearest = np.argsort(((codes[:, None] - codes) ** 2).sum(2), 1)[:, :5]
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
    for i, path in enumerate(sorted((image_folder / "val").glob("*/*.png"))):
        if path.name == "broken.png":
            continue
        original = np.asarray(Image.open(path))
        x = torch.tensor(original).permute(2, 0, 1)[None].float() / 127.5 - 1
        indices = tokenizer.encode(x)[0].numpy()
        rng = np.random.default_rng((11, i))
        assert rng.random() < 1
        changes, draws = rng.random((8, 8)) < 0.7, rng.integers(5, size=(8, 8))
        indices = torch.tensor(np.where(changes, nearest[indices, draws], indices))
        made = to_uint8(tokenizer.decode(indices[None]))[0].permute(1, 2, 0).numpy()
        for folder, picture in (("real", original), ("made", made)):
            Image.fromarray(picture).save(tmp_path / folder / f"{i:02}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        **{"feature_extractor": "tiny", "fid": True, "cuda": False, "verbose": False, "cache": False},
    )
    assert result["metrics"]["pfd_tiny"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert result["metrics"]["pfd_tiny"] != pytest.approx(result["metrics"]["rfd_tiny"], rel=1e-2)
    with pytest.raises(UsageError, match=r"--pfid\.delta 100 must be at most the number of codes, 24"):
        measure("--pfid.alpha", 0.5)


def test_an_images_wrong_codes_depend_on_its_number_alone(tokenizer_folder):
    """Neither on the batch nor on beta, which says only whether it has any."""
    config = PerturbationConfig(alpha=0.5, beta=0.5, delta=5)
    some, all_of_them = (
        Perturbed(config.model_copy(update={"beta": beta}), open_tokenizer(tokenizer_folder)) for beta in (0.5, 1.0)
    )
    codes, index = torch.randint(24, (200, 4, 4)), torch.arange(200)
    half, whole = some(codes, index), all_of_them(codes, index)
    kept = (half == codes).flatten(1).all(1)
    assert 70 < int(kept.sum()) < 130
    assert torch.equal(half[~kept], whole[~kept])
    assert 0.35 < (whole != codes).float().mean() < 0.45  # alpha, less those that drew themselves
    turned = torch.randperm(200)
    assert torch.equal(some(codes[turned], index[turned]), half[turned])


@pytest.mark.parametrize(("images", "low"), [(5, ["unigram_bits", "bigram_bits"]), (6, ["bigram_bits"]), (144, [])])
def test_bits_of_too_few_tokens_say_so(images, low):
    codes = torch.arange(images * 4).view(images, 2, 2) % 24
    result = {"metrics": {}, "meanings": {}, "skipped": {}}
    rows = {"index": torch.arange(images), "codes": codes, "error": torch.zeros(images)}
    add_codebook_metrics(result, rows, codes.flatten().bincount(minlength=24), SimpleNamespace(codebook_size=24), 16)
    assert [name for name, meaning in result["meanings"].items() if "too low, since" in meaning] == low


def test_bits_are_counted_sparsely_and_the_bias_of_pairs_is_said(measure):
    codes = torch.randperm(65_536)[:48].view(3, 4, 4)
    bits = code_bits(codes.int())
    assert bits["unigram_bits"] == pytest.approx(16 * np.log2(48), rel=1e-9)
    assert bits["bigram_bits"] == pytest.approx(4 * np.log2(48), rel=1e-9)  # each code has but one successor
    alternating = torch.tensor([0, 1, 0, 1]).expand(5, 2, 4)
    assert code_bits(alternating) == pytest.approx({"unigram_bits": 8, "bigram_bits": 2})
    assert code_bits(codes[:, :, :1])["bigram_bits"] == code_bits(codes[:, :, :1])["unigram_bits"]
    meaning = measure("--limit", 5)["meanings"]["bigram_bits"]
    assert "too low, since" in meaning
    assert "K^2 = 576" in meaning


def test_lpips_is_the_mean_over_images_of_8_bit_pairs_and_its_weights_are_named(measure, monkeypatch, tmp_path):
    seen = []

    class Fake(torch.nn.Module):
        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).abs().flatten(1).amax(1)

    monkeypatch.setattr(perceptual, "load_lpips", lambda net, weights: Fake())
    weights = tmp_path / "alexnet.pth"
    weights.write_bytes(b"weights")
    result = measure("--batch_size", 24, "--lpips_weights", weights, lpips="alex")
    value = result["metrics"]["lpips_alex"]
    digest = hashlib.sha256(b"weights").hexdigest()
    assert result["lpips"] == {"alex": {"weights": str(weights), "weights_sha256": digest}}
    assert any("is not torchvision's alexnet-owt-7be5be79.pth" in warning for warning in result["warnings"])
    assert result["ranked_by"] == "lpips_alex"
    a, b = (torch.cat(side)[:23] for side in zip(*seen, strict=True))  # the last group is filled up
    assert value == pytest.approx((a - b).abs().flatten(1).amax(1).double().mean().item(), rel=1e-6)
    for side in (a, b):
        levels = side * 127.5 + 127.5
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert side.min() >= -1
        assert side.max() <= 1


def test_without_network_the_rows_say_how_to_get_the_weights_and_the_rest_is_measured(measure, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    result = measure(features="inception-v3-compat", lpips="vgg")
    assert set(result["skipped"]) == {"rfid", "lpips_vgg"}
    assert "--features_weights" in result["skipped"]["rfid"]
    assert "--lpips_weights" in result["skipped"]["lpips_vgg"]
    assert {"psnr", "ssim", "utilization"} <= set(result["metrics"])


def test_too_few_images_for_the_distance_are_warned_of(measure):
    result = measure("--limit", 5)
    assert result["counts"]["images"] + result["counts"]["bad_images"] == 5
    assert any("rank at most" in warning for warning in result["warnings"])
    assert not any("rank at most" in warning for warning in measure()["warnings"])


def test_wrong_input_is_one_clear_error_and_leaves_no_result(measure, tmp_path):
    output = tmp_path / "result.json"
    with pytest.raises(UsageError, match=r"data\.image_size = 17 must be a multiple of .* 2"):
        measure("--data.image_size", 17, output=output)
    with pytest.raises(UserError, match=r"gone\.pth does not hold"):
        measure("--lpips_weights", tmp_path / "gone.pth", lpips="squeeze", output=output)
    with pytest.raises(UserError, match="1 of 24 images do not decode"):
        measure(bad=0.02, output=output)
    with pytest.raises(UsageError, match=r"give the name of a \.json file"):
        measure(output=tmp_path)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UsageError, match="cannot write"):
        measure(output=blocked / "result.json")
    assert not output.exists()


def test_the_second_run_reuses_the_originals_features_and_gives_the_same_numbers(measure, tmp_path, monkeypatch):
    seen = []
    original = Collector.add
    monkeypatch.setattr(Collector, "add", lambda self, images, index: seen.append(1) or original(self, images, index))
    first = measure("--batch_size", 24, cache=tmp_path / "cache")
    assert len(seen) == 2  # originals and reconstructions
    again = measure("--batch_size", 24, cache=tmp_path / "cache")
    assert len(seen) == 3
    assert again["metrics"] == first["metrics"]
    assert [first["references"], again["references"]] == [{"tiny": "made"}, {"tiny": "kept from an earlier run"}]
    measure("--batch_size", 24, "--limit", 20, cache=tmp_path / "cache")
    assert len(seen) == 5


def test_drift_and_churn_are_those_between_two_tokenizers(measure, tokenizer_folder, tmp_path):
    still = measure("--compare", tokenizer_folder)["metrics"]
    assert still["drift_rms"] == still["drift_relative"] == still["churn"] == 0
    model = VQModel.from_pretrained(tokenizer_folder)
    shift = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():  # latents around another mean: an exported folder's shift is no move of the encoder
        model.quant_conv.bias += shift
        model.quantize.embedding.weight += shift
    model.save_pretrained(tmp_path / "shifted")
    shifted = measure("--compare", tmp_path / "shifted")["metrics"]
    assert shifted["drift_rms"] == pytest.approx(0, abs=1e-6)
    assert shifted["churn"] < 0.01
    with torch.no_grad():
        model.quant_conv.weight *= 1.25
    model.save_pretrained(tmp_path / "moved")
    moved = measure("--compare", tmp_path / "moved")["metrics"]
    assert moved["drift_relative"] == pytest.approx(0.25, rel=1e-5)
    assert moved["drift_rms"] > 0
    assert 0 < moved["churn"] < 1


def test_an_autoencoder_without_a_codebook_is_measured_too(measure, tmp_path, tokenizer_folder):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(
        **blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=16
    ).eval()
    model.save_pretrained(tmp_path / "kl")
    result = measure(tokenizer=tmp_path / "kl")
    assert set(result["metrics"]) == {"psnr", "psnr_batch", "ssim", "rfd_tiny"}
    assert "AutoencoderKL has no codebook" in result["skipped"]["utilization"]
    file = sorted(image_files(result["data"]["source"]))[0]
    x = torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = to_uint8(model.decode(model.encode(x).latent_dist.mode()).sample)
        ours = to_uint8(autoencoders.reconstruct(open_tokenizer(tmp_path / "kl"), x)["image"])
    assert (ours != expected).float().mean() < 1e-2
    with pytest.raises(UsageError, match="must both have a codebook"):
        measure("--compare", tmp_path / "kl")


@pytest.mark.parametrize("kind", ["dc", "tiny"])
def test_autoencoders_that_are_no_vae_are_measured_too(measure, tmp_path, kind):
    torch.manual_seed(0)
    if kind == "dc":
        stages = {"block_out_channels": (16, 16), "block_types": "ResBlock", "layers_per_block": (1, 1)}
        options = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in stages.items()}
        options |= {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41}
        model = AutoencoderDC(
            latent_channels=4, encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), **options
        )
    else:
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        model = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    model.eval().save_pretrained(tmp_path / kind)
    result = measure("--data.image_size", 16, tokenizer=tmp_path / kind)
    assert set(result["metrics"]) == {"psnr", "psnr_batch", "ssim", "rfd_tiny"}
    tokenizer, x = open_tokenizer(tmp_path / kind), torch.rand(2, 3, 16, 16) * 2 - 1
    assert tokenizer.downsampling == 2
    with torch.no_grad():
        expected = model(x).sample if kind == "dc" else model.decode(model.encode(x).latents).sample
    torch.testing.assert_close(autoencoders.reconstruct(tokenizer, x)["image"], expected, rtol=1e-4, atol=1e-5)


def test_a_stock_model_that_looks_its_codes_up_itself_gives_the_same_numbers(measure, tokenizer_folder, tmp_path):
    model = VQModel.from_pretrained(tokenizer_folder)
    model.register_to_config(lookup_from_codebook=True)  # as in aMUSEd's folders
    model.save_pretrained(tmp_path / "lookup")
    assert measure(tokenizer=tmp_path / "lookup")["metrics"] == measure()["metrics"]


def image_files(folder):
    return (f for f in Path(folder).glob("val/*/*.png") if f.name != "broken.png")


def test_the_pictures_show_the_worst_and_the_best_originals_above_reconstructions(
    measure, tokenizer_folder, image_folder
):
    result = measure()
    scores = {}
    tokenizer = open_tokenizer(tokenizer_folder)
    for file in image_files(image_folder):
        original = np.asarray(Image.open(file))
        x = torch.tensor(original).permute(2, 0, 1)[None].float() / 127.5 - 1
        made = to_uint8(autoencoders.reconstruct(tokenizer, x)["image"])[0].permute(1, 2, 0).numpy()
        scores[file] = mean_squared_error(original, made)
    order = sorted(scores, key=scores.get)
    for name, expected in (("best", order[:8]), ("worst", order[::-1][:8])):
        picture = np.asarray(Image.open(result["pictures"][name]))
        assert picture.shape == (2 * 18 + 2, 8 * 18 + 2, 3)
        for i, file in enumerate(expected):
            assert np.array_equal(picture[2:18, 18 * i + 2 : 18 * i + 18], np.asarray(Image.open(file)))


def test_protocol_simvq_cuts_levels_takes_psnr_of_batches_and_shows_floats_to_the_networks(
    measure, monkeypatch, tmp_path
):
    monkeypatch.setattr(reconstruction_metrics, "BATCH", 10)
    made = {}

    def slightly_wrong(tokenizer, images):
        generator = torch.Generator().manual_seed(0)
        output = (images + 0.05 * torch.randn(images.shape, generator=generator)) * 1.2
        for image, other in zip(images, output, strict=True):
            made.setdefault(to_uint8(image).numpy().tobytes(), (image, other))  # not those that fill up a group
        z = torch.zeros(len(images), 3, 8, 8)
        return {"image": output, "z": z, "indices": z[:, 0].long(), "error": z[:, 0, 0, 0].double()}

    class Fake(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().flatten(1).mean(1)

    monkeypatch.setattr(reconstruction, "reconstruct", slightly_wrong)
    monkeypatch.setattr(perceptual, "load_lpips", lambda net, weights: Fake())
    weights = tmp_path / "alexnet.pth"
    weights.touch()
    result = measure("--protocol", "simvq", "--lpips_weights", weights, features="none", lpips="alex")
    psnr, ssim, lpips = [], [], []
    files = sorted(image_files(result["data"]["source"]))
    for start in range(0, 23, 10):  # the evaluation of SimVQ in numpy, batch by batch
        pairs = [made[np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes()] for f in files[start : start + 10]]
        x, y = (np.stack([p[i].clamp(-1, 1).numpy().transpose(1, 2, 0) for p in pairs]) for i in (0, 1))
        lpips += np.abs(x - y).mean((1, 2, 3)).tolist()
        x, y = (((side + 1) / 2 * 255.0).astype(np.uint8).astype(np.float32) / 255 for side in (x, y))
        psnr.append(peak_signal_noise_ratio(x, y, data_range=1))
        ssim.append(
            np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in zip(x, y, strict=True)])
        )
    metrics = result["metrics"]
    assert metrics["psnr_batch"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert metrics["ssim"] == pytest.approx(np.mean(ssim), rel=1e-5)  # scikit-image stays in float32 here
    assert metrics["lpips_alex"] == pytest.approx(np.mean(lpips), rel=1e-5)
    assert "psnr" not in metrics
    with pytest.raises(UsageError, match="protocol simvq measures features of inception-v3-compat alone"):
        measure("--protocol", "simvq")
