import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax

from nsvq.errors import UsageError, UserError
from nsvq.eval.page import write_page
from nsvq.eval.probe import fit_linear, main, nearest_classes, pooled
from nsvq.tokenizer.pretrained import open_tokenizer


def blobs(count, classes=3, width=4, apart=1.0):
    """Features float64 [N, D] around the centre of each class, and labels [N]."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    features = rng.standard_normal((count, width)) + apart * rng.standard_normal((classes, width))[labels]
    return torch.from_numpy(features), torch.from_numpy(labels)


@pytest.mark.parametrize("at_once", [50, 2**25])
def test_the_linear_probe_is_the_minimum_that_scipy_finds(monkeypatch, at_once):
    monkeypatch.setattr("nsvq.eval.probe._AT_ONCE", at_once)
    x, y = blobs(90)
    weight, bias, gradient = fit_linear(x, y, 3, l2=0.01)

    def loss(flat):
        w, b = flat[:12].reshape(3, 4), flat[12:]
        return -log_softmax(x.numpy() @ w.T + b, 1)[np.arange(90), y.numpy()].mean() + 0.005 * (w**2).sum()

    theirs = minimize(loss, np.zeros(15), tol=1e-9).x
    np.testing.assert_allclose(weight.flatten(), theirs[:12], atol=1e-5)
    np.testing.assert_allclose(bias - bias.mean(), theirs[12:] - theirs[12:].mean(), atol=1e-5)
    assert gradient <= 1e-6


@pytest.mark.parametrize("at_once", [100, 2**25])
def test_neighbours_vote_by_their_cosine_as_plain_loops_have_it(monkeypatch, at_once):
    monkeypatch.setattr("nsvq.eval.probe._AT_ONCE", at_once)
    (x, y), queries = blobs(60), torch.randn(25, 4, dtype=torch.float64)
    expected = []
    for query in queries.numpy():
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in x.numpy()]
        votes = [0.0] * 3
        for i in sorted(range(60), key=lambda i: -cosines[i])[:7]:
            votes[int(y[i])] += np.exp(cosines[i] / 0.07)
        expected.append(int(np.argmax(votes)))
    assert len(set(expected)) == 3
    assert nearest_classes(x, y, queries, 3, neighbours=7).tolist() == expected


@pytest.mark.parametrize("grid", [1, 2])
def test_features_are_means_of_the_code_vectors_that_the_decoder_sees(tokenizer_folder, grid):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    model = VQModel.from_pretrained(tokenizer_folder)
    with torch.no_grad():
        z_q = model.quantize(model.encode(images).latents)[0].double().numpy()  # (2, 3, 8, 8)
    parts = np.stack([np.stack(np.split(half, grid, 3)) for half in np.split(z_q, grid, 2)])  # (g, g, 2, 3, ., .)
    expected = parts.mean((4, 5)).transpose(2, 3, 0, 1).reshape(2, -1)
    np.testing.assert_allclose(pooled(open_tokenizer(tokenizer_folder), images, grid), expected, rtol=1e-5, atol=1e-6)


def quarters(root, classes, counts=(("train", 30), ("val", 24)), shuffled=False):
    """Class folders of images of 16 pixels with a little noise; the class says which quarter is light."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for i in range(count):
            name = classes[int(rng.integers(len(classes))) if shuffled else i % len(classes)]
            pixels = 50 + rng.integers(-3, 3, (16, 16, 3))
            row, column = divmod(i % len(classes), 2)
            pixels[8 * row :, 8 * column :][:8, :8] += 150
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


@pytest.fixture
def probe(run_script, tokenizer_folder, tmp_path):
    def run(data, *arguments, tokenizer=tokenizer_folder):
        output = tmp_path / "new" / "probe.json"
        run_script(
            main,
            *("--tokenizer", tokenizer, "--data", data, "--output", output, "--workers", 0),
            *(() if "--neighbours" in arguments else ("--neighbours", 5)),
            *arguments,
        )
        return json.loads(output.read_text())

    return run


def test_classes_that_lie_apart_are_all_told_at_any_batch_size_and_the_page_shows_it(probe, tmp_path):
    data = quarters(tmp_path / "data", ["ant", "bee", "cat"])
    results = [probe(data, "--batch_size", size, "--grid", 2) for size in (1, 7, 64)]
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]
    metrics = results[0]["metrics"]
    assert metrics["linear_accuracy"] == metrics["linear_accuracy_train"] == metrics["knn_accuracy"] == 1
    assert metrics["majority"] == pytest.approx(1 / 3)
    assert metrics["features"] == 4 * 3
    assert results[0]["counts"]["images"] == 24
    assert results[0]["train_counts"]["images"] == 30
    assert results[0]["config"]["l2"] == 1e-3
    assert len(results[0]["tokenizer"]["sha256"]) == 64
    write_page(tmp_path / "page.html", [results[0]], [])
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Probe:" in page
    assert '<td>linear_accuracy</td><td class="number">1</td>' in page


def test_labels_without_meaning_give_about_chance(probe, tmp_path):
    data = quarters(tmp_path / "data", ["ant", "bee", "cat"], counts=(("train", 90), ("val", 90)), shuffled=True)
    metrics = probe(data)["metrics"]
    assert metrics["linear_accuracy"] < 0.5
    assert metrics["knn_accuracy"] < 0.5


def test_a_continuous_tokenizer_is_probed_by_its_latents_and_says_so(probe, tmp_path):
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=16)
    model.save_pretrained(tmp_path / "kl")
    result = probe(quarters(tmp_path / "data", ["ant", "bee"]), tokenizer=tmp_path / "kl")
    assert result["pooled"] == "mean latents, as there are no codes"
    assert result["metrics"]["features"] == 2


def test_a_tokenizer_that_names_no_size_is_probed_at_the_datas(probe, tmp_path):
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    result = probe(quarters(tmp_path / "data", ["ant", "bee"]), "--data.image_size", 16, tokenizer=tmp_path / "tiny")
    assert result["data"]["image_size"] == 16


def test_what_cannot_be_measured_is_one_clear_error(probe, tmp_path):
    data = quarters(tmp_path / "data", ["ant", "bee"])
    with pytest.raises(UsageError, match="--neighbours 31: there are only 30 training images"):
        probe(data, "--neighbours", 31)
    with pytest.raises(UsageError, match=r"data\.image_size = 17 must be a multiple of .* 2"):
        probe(data, "--data.image_size", 17)
    with pytest.raises(UserError, match="fewer than two classes"):
        probe(quarters(tmp_path / "one", ["ant"]))
    assert not (tmp_path / "new" / "probe.json").exists()
