import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from fakes import COLOURS, FakePipeline
from PIL import Image

from nsvq.errors import UsageError
from nsvq.eval import class_accuracy, generation
from nsvq.eval.config import GenerationConfig
from nsvq.eval.pictures import Grid
from nsvq.eval.report import folder_hash


@pytest.mark.slow
def test_every_number_equals_torch_fidelity_on_the_same_images(measure_samples, image_folder, tmp_path):
    result = measure_samples(batch_size=7, seed=5)
    made, real = tmp_path / "made", tmp_path / "real"
    made.mkdir(), real.mkdir()
    for i in range(40):
        pixels = FakePipeline.image(i % 3, 5 + i).permute(1, 2, 0).numpy().astype(np.float64) * 255
        Image.fromarray(np.rint(pixels).astype(np.uint8)).save(made / f"{i:03}.png")
    for i, file in enumerate(sorted(image_folder.glob("val/*/[0-9]*.png"))):
        Image.open(file).save(real / f"{i:03}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(real),
        feature_extractor="tiny",
        **{"fid": True, "isc": True, "prc": True, "cuda": False, "verbose": False, "cache": False},
    )
    spatial = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(real),
        feature_extractor="tiny",
        feature_layer_fid="spatial",
        **{"fid": True, "cuda": False, "verbose": False, "cache": False},
    )
    assert result["metrics"] == pytest.approx(
        {
            "fd_tiny": theirs["frechet_inception_distance"],
            "sfd_tiny": spatial["frechet_inception_distance"],
            "is_tiny": theirs["inception_score_mean"],
            "is_std_tiny": theirs["inception_score_std"],
            "precision_tiny": theirs["precision"],
            "recall_tiny": theirs["recall"],
        },
        rel=1e-6,
    )
    assert set(result["meanings"]) == set(result["metrics"])
    assert set(result["skipped"]) == {"kd_tiny"}  # 23 real images are too few
    assert result["counts"]["samples"] == 40
    assert result["counts"]["real_images"] == 23
    assert result["counts"]["bad_images"] == 1


def test_the_sample_set_is_the_same_for_every_batch_size(measure_samples):
    results = [measure_samples(batch_size=size)["metrics"] for size in (1, 7, 40)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)


def test_sampler_options_reach_the_pipeline_and_the_result(measure_samples):
    pipeline = FakePipeline()
    options = {"guidance_scale": [2.5], "guidance_interval": (0.1, 0.8), "steps": [7]}
    result = measure_samples(pipeline, samples=5, **options)
    call = pipeline.calls[0]
    assert (call["guidance_scale"], call["guidance_interval"], call["num_inference_steps"]) == (2.5, (0.1, 0.8), 7)
    assert result["setting"] == {"guidance_scale": 2.5, "steps": 7}
    assert result["sampler"]["guidance_interval"] == (0.1, 0.8)
    assert result["sampler"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert result["sampler"]["flow_shift"] == 1.0
    assert not any(name.startswith("_") for name in result["sampler"])


def test_the_picture_has_a_row_of_samples_for_each_class(measure_samples, tmp_path):
    result = measure_samples(samples=10)
    picture = np.asarray(Image.open(tmp_path / "result.png")).astype(float) / 255
    assert result["grid"]["rows"] == ["ant", "bee", "cat"]
    assert picture.shape[:2] == (3 * 18 + 2, 4 * 18 + 2)
    for row in range(3):
        tile = picture[row * 18 + 2 : row * 18 + 18, 2:18]
        expected = FakePipeline.image(row, row).permute(1, 2, 0).numpy()
        assert np.abs(tile - expected).max() < 0.01
        assert int(tile.mean((0, 1)).argmax()) == int(COLOURS[row].argmax())
    assert (picture[2 + 18 :, -16:] == 1).all()  # ten samples leave the last places of two rows empty


def test_sizes_and_classes_that_do_not_fit_are_told(measure_samples):
    with pytest.raises(UsageError, match=r"data\.image_size = 32, but the images of .* have 16 pixels: --resize"):
        measure_samples(data={"image_size": 32})
    assert not any("classes" in warning for warning in measure_samples()["warnings"])
    assert any("classes" in warning for warning in measure_samples(FakePipeline(("a", "b", "c")))["warnings"])


def test_without_network_every_row_says_how_to_get_the_weights(measure_samples, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    result = measure_samples(features=["inception-v3-compat"])
    assert result["metrics"] == {}
    assert set(result["skipped"]) == {"fid", "sfid", "is", "precision", "recall", "kid"}
    assert all("--features_weights" in why for why in result["skipped"].values())


class AlwaysBee(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(images), 3)


def test_class_accuracy_is_the_share_of_the_class_asked_for_and_of_real_test_images(measure_samples, monkeypatch):
    monkeypatch.setattr(class_accuracy, "train_classifier", lambda data, workers, device: AlwaysBee())
    for options in ({}, {"reference": "train"}, {"reference_limit": 4}):
        result = measure_samples(samples=10, classifier="trained", features=["none"], **options)
        assert result["metrics"]["class_accuracy"] == pytest.approx(3 / 10)
        assert result["class_accuracy_by_class"] == {"ant": 0, "bee": 1, "cat": 0}
        if options != {"reference_limit": 4}:
            assert result["metrics"]["class_accuracy_real"] == pytest.approx(8 / 23)
    with pytest.raises(UsageError, match=r"--classifier .*the 3 classes .* are not the 2"):
        measure_samples(FakePipeline(("ant", "bee")), classifier="trained")


def test_an_extractor_judges_by_its_own_class_outputs_whatever_their_order(measure_samples, monkeypatch, tiny):
    """Output 4 is excited most by reddish images, 0 by greenish, 2 by bluish ones: classes 0, 1, 2 of the samples."""
    paint = np.array([[4, 0, 2].index(i) if i in (4, 0, 2) else -1 for i in range(5)])

    def outputs(images):
        means = images.float().mean((2, 3)) / 25  # (B, 3)
        return torch.stack([means[:, c] if c >= 0 else torch.zeros(len(images)) for c in paint.tolist()], 1)

    real = {"image": COLOURS.view(3, 3, 1, 1).expand(3, 3, 16, 16) * 2 - 1, "label": torch.tensor([0, 1, 2])}
    empty = {"image": torch.zeros(0, 3, 16, 16), "label": torch.zeros(0, dtype=torch.int64)}
    unlabelled = {"image": real["image"], "label": torch.tensor([-1, -1, -1])}
    monkeypatch.setattr(class_accuracy, "batches_in_order", lambda *args, **kwargs: iter([real, empty]))
    monkeypatch.setattr(class_accuracy, "real_batches", lambda *args, **kwargs: iter([real, empty, unlabelled]))
    monkeypatch.setattr(type(tiny), "__call__", with_outputs(type(tiny).__call__, tiny.layers["isc"], outputs))
    result = measure_samples(samples=12, classifier="features")
    assert result["metrics"]["class_accuracy"] == 1
    assert result["metrics"]["class_accuracy_real"] == 1
    monkeypatch.setattr(class_accuracy, "batches_in_order", lambda *args, **kwargs: iter([empty]))
    with pytest.raises(UsageError, match="no labelled training image"):
        measure_samples(classifier="features")
    with pytest.raises(UsageError, match="has none, or --metrics leaves out isc"):
        measure_samples(classifier="features", metrics=["fid"])
    with pytest.raises(UsageError, match="needs an extractor"):
        measure_samples(classifier="features", features=["none"])


def with_outputs(extract, layer, outputs):
    return lambda self, images: extract(self, images) | {layer: outputs(images)}


def test_the_hash_of_a_pipeline_is_that_of_its_files_but_the_card(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return folder_hash(tmp_path)

    write("model_index.json", "{}")
    first = write("vae/weights", "1")
    assert write("README.md", "card") == first
    assert write("vae/weights", "2") != first
    assert folder_hash(tmp_path / "absent") is None


def test_the_script_writes_the_result_and_a_table(
    run_script, measure_samples, image_folder, tiny_extractor, tmp_path, monkeypatch, capsys
):
    class Loaded(FakePipeline):
        @classmethod
        def from_pretrained(cls, folder):
            return cls()

        def to(self, device):
            return self

        def set_progress_bar_config(self, disable):
            pass

    monkeypatch.setattr(generation, "load_pipeline", Loaded.from_pretrained)
    output = tmp_path / "deep" / "er" / "result.json"
    run_script(
        generation.main,
        *("--pipeline", "somewhere", "--data", image_folder, "--data.max_bad_fraction", 0.3, "--output", output),
        *(
            "--features",
            tiny_extractor,
            "--samples",
            12,
            "--workers",
            0,
            "--guidance_interval",
            0.0,
            0.5,
            "--cache",
            "null",
        ),
    )
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    for name, value in result["metrics"].items():
        assert f"{name} " in printed
        assert f"{value:.5g}" in printed
    assert result["config"]["guidance_interval"] == [0.0, 0.5]
    assert result["sampler"]["lambda_min_clipped"] == "-inf"  # JSON has no such number
    assert sorted(path.name for path in output.parent.iterdir()) == ["result.json", "result.png"]


def test_a_sweep_measures_every_setting_and_reports_the_best(measure_samples, tmp_path):
    class Guided(FakePipeline):
        def __call__(self, class_labels, *, guidance_scale, **options):
            images = super().__call__(class_labels, guidance_scale=guidance_scale, **options).images
            return SimpleNamespace(images=(images * (1 - 0.2 * abs(guidance_scale - 2))).clamp(0, 1))

    options = {"guidance_scale": [1, 2, 3.5], "steps": [5, 9], "metrics": ["fid"]}
    result = measure_samples(Guided(), reference=None, **options)
    assert [(run["guidance_scale"], run["steps"]) for run in result["sweep"]] == [
        (scale, steps) for scale in (1, 2, 3.5) for steps in (5, 9)
    ]
    alone = measure_samples(Guided(), guidance_scale=[3.5], steps=[9], metrics=["fid"])
    assert result["sweep"][-1]["metrics"] == alone["metrics"]
    best = min(result["sweep"], key=lambda run: run["metrics"]["fd_tiny"])
    assert result["metrics"] == best["metrics"]
    assert result["setting"] == {"guidance_scale": best["guidance_scale"], "steps": best["steps"]}
    assert any("least fd_tiny of 6" in warning for warning in result["warnings"])
    assert (tmp_path / "result-guidance-3.5-steps-9.png").is_file()


def test_protocols_say_what_a_number_deviates_in_and_adm_scores_blocks_of_consecutive_samples(measure_samples):
    result = measure_samples(protocol="adm", samples=40)
    assert result["data"]["split"] == "train"
    assert any("adm means 50000 samples, these are 40" in warning for warning in result["warnings"])
    assert any("adm means 10000 real images for precision" in warning for warning in result["warnings"])
    assert result["metrics"]["is_std_tiny"] == 0  # one block
    paper = measure_samples(protocol="nsvq", samples=40)
    assert any("nsvq means 5000 samples" in warning for warning in paper["warnings"])
    assert paper["data"]["split"] == "test"
    config = GenerationConfig(pipeline="p", output="r.json")
    assert generation._is_imagenet(config, [])  # the default data
    resolved = generation._resolve(config, 128, imagenet=True)
    assert (resolved.protocol, resolved.samples, resolved.reference) == ("adm", 50_000, "adm")
    assert generation._deviations(resolved, imagenet=True) == []
    for other in ("train", "test"):
        resolved = generation._resolve(config.model_copy(update={"reference": other}), 128, imagenet=True)
        assert len(generation._deviations(resolved, imagenet=True)) == 1


def test_each_class_shows_its_output_by_as_many_images(measure_samples, monkeypatch):
    """Also a rare one, which a random draw of as many images might miss."""
    seen, original = [], class_accuracy.batches_in_order

    def noting(*arguments, **options):
        for batch in original(*arguments, **options):
            seen.extend(batch["label"].tolist())
            yield batch

    monkeypatch.setattr(class_accuracy, "batches_in_order", noting)
    monkeypatch.setattr(class_accuracy, "_IMAGES_PER_CLASS", 2)
    measure_samples(samples=12, classifier="features")
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]


def test_the_picture_shows_classes_that_were_drawn(accelerator, tmp_path):
    names = [f"class {i}" for i in range(1000)]
    drawn = [3, 500, 3, 999]
    grid = Grid(4, names, lambda sample: drawn[sample])
    grid.add(torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 2, 2).to(torch.uint8), torch.arange(4))
    about = grid.save(tmp_path / "grid.png", accelerator)
    assert about["rows"] == ["class 3", "class 500", "class 999"]
    shown = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]  # rows of two tiles, 2 pixels between
    assert [[int(shown[2 + 4 * row, 2 + 4 * column]) for column in range(2)] for row in range(3)] == [
        [0, 2],
        [1, 255],
        [3, 255],
    ]


def test_a_copy_of_imagenet_is_measured_as_the_hub_s(measure_samples, monkeypatch):
    """By the names of its classes, which the pipeline has, too."""
    assert measure_samples(samples=40)["protocol"] == "ours"
    monkeypatch.setattr(generation, "imagenet_names", lambda: ["ant", "bee", "cat"])
    copy = measure_samples(samples=40)
    assert (copy["protocol"], copy["data"]["split"]) == ("adm", "train")  # at 16 pixels ADM has no file
    assert not any("not known to be it" in warning for warning in copy["warnings"])
    assert measure_samples(FakePipeline(("ant", "bee", "dog")), samples=40)["protocol"] == "ours"
