import json

import numpy as np
import pytest
import torch
import torch_fidelity
from diffusers import VQModel
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common.errors import UsageError, UserError
from eval import reconstruction
from eval.reconstruction import main


@pytest.fixture
def measure(run_script, tokenizer_folder, image_folder, tiny_extractor, tmp_path):
    """Run the script on the tiny tokenizer and images; returns the result."""

    def run(*arguments, features=tiny_extractor, lpips="none", output=tmp_path / "new" / "result.json", bad=0.3):
        run_script(
            main,
            *("--tokenizer", tokenizer_folder, "--data", image_folder, "--data.max_bad_fraction", bad),
            *("--output", output, "--features", features, "--lpips", lpips, "--workers", 0, *arguments),
        )
        return json.loads(output.read_text())

    return run


def test_every_number_equals_that_of_independent_tools(measure, tokenizer_folder, image_folder, tmp_path):
    result = measure("--batch_size", 1)
    model = VQModel.from_pretrained(tokenizer_folder)
    real, made, codes, errors = tmp_path / "real", tmp_path / "made", [], []
    real.mkdir(), made.mkdir()
    psnr, ssim = [], []
    files = sorted(f for f in image_folder.glob("val/*/*.png") if f.name != "broken.png")
    for i, file in enumerate(files):
        original = np.asarray(Image.open(file))
        x = torch.tensor(original).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            z = model.encode(x).latents
            _, _, (_, _, indices) = model.quantize(z)
            z_q = model.quantize.get_codebook_entry(indices, (1, 8, 8, 3))
            y = model.decode(z_q, force_not_quantize=True).sample
        codes += indices.tolist()
        errors.append((z - z_q).double().square().mean().item())
        y = np.rint((y[0].permute(1, 2, 0).numpy().astype(np.float64) + 1) * 127.5).clip(0, 255).astype(np.uint8)
        psnr.append(peak_signal_noise_ratio(original, y, data_range=255))
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
            "ssim": np.mean(ssim),
            "rfd_tiny": theirs["frechet_inception_distance"],
            "utilization": len(set(codes)) / 24,
            "perplexity": perplexity,
            "perplexity_fraction": perplexity / 24,
            "quantization_error": np.mean(errors),
            "codebook_size": 24,
            "bits_per_token": np.log2(24),
            "tokens_per_image": 64,
        },
        rel=1e-6,
    )
    assert 0 < result["metrics"]["utilization"] <= 20 / 24
    assert set(result["protocol"]) == set(result["metrics"])


def test_the_result_says_what_was_measured_and_what_was_left_out(measure, tokenizer_folder):
    before = {path.name: path.stat().st_mtime_ns for path in tokenizer_folder.iterdir()}
    result = measure()
    assert result["counts"]["images"] == 23
    assert result["counts"]["bad_images"] == 1
    assert "broken.png" in result["counts"]["bad_images_shown"][0]
    assert result["data"]["split"] == "test"
    assert result["data"]["image_size"] == 16  # the tokenizer's, as none was given
    assert len(result["data"]["fingerprint"]) == len(result["tokenizer"]["sha256"]) == 64
    assert result["features"]["extractor"] == "tiny"
    assert len(result["features"]["file_sha256"]) == 64
    assert {"torch", "diffusers", "torch-fidelity", "nsvq"} <= set(result["versions"])
    assert {path.name: path.stat().st_mtime_ns for path in tokenizer_folder.iterdir()} == before


def test_the_batch_size_changes_no_number(measure):
    # Convolutions round differently for different batches, which moves one 8-bit pixel in 20,000 by one level.
    results = [measure("--batch_size", size)["metrics"] for size in (1, 5, 23)]
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert results[0] == pytest.approx(results[2], abs=1e-4)


def test_perfect_reconstructions_have_distance_zero_and_no_psnr(measure, monkeypatch):
    def perfect(tokenizer, images):
        error = torch.zeros(len(images), dtype=torch.float64)
        return reconstruction.to_uint8(images), torch.zeros(len(images), 8, 8, dtype=torch.int64), error

    monkeypatch.setattr(reconstruction, "reconstruct", perfect)
    result = measure()
    assert result["metrics"]["ssim"] == pytest.approx(1, abs=1e-12)
    assert result["metrics"]["rfd_tiny"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["perplexity"] == 1
    assert "psnr" not in result["metrics"]
    assert "reproduced exactly" in result["skipped"]["psnr"]


def test_lpips_is_the_mean_over_images_of_8_bit_pairs(measure, monkeypatch):
    seen = []

    class Fake(torch.nn.Module):
        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).abs().flatten(1).amax(1)

    monkeypatch.setattr(reconstruction, "load_lpips", lambda net, weights: Fake())
    value = measure("--batch_size", 4, lpips="alex")["metrics"]["lpips_alex"]
    a, b = (torch.cat(side) for side in zip(*seen, strict=True))
    assert len(a) == 23
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
