import json

import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler, VQModel
from fakes import COLOURS, FakePipeline
from PIL import Image

from common.errors import UsageError, UserError
from eval import generation
from eval.generation import GenerationConfig, evaluate, generate, my_samples
from eval.report import folder_hash
from pipelines.export import save_pipeline


@pytest.fixture
def measure(image_folder, tiny_extractor, tmp_path):
    """Evaluate a pipeline against the tiny images; returns the result."""

    def run(pipeline=None, data=None, **options):
        config = GenerationConfig(
            **{
                "pipeline": str(tmp_path / "pipeline"),
                "data": {"source": str(image_folder), "max_bad_fraction": 0.3, **(data or {})},
                "output": tmp_path / "result.json",
                "features": tiny_extractor,
                "samples": 40,
                "workers": 0,
                **options,
            }
        )
        return evaluate(pipeline or FakePipeline(), config, Accelerator(cpu=True))

    return run


def test_every_number_equals_torch_fidelity_on_the_same_images(measure, image_folder, tmp_path):
    result = measure(batch_size=7, seed=5)
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
    assert result["metrics"] == pytest.approx(
        {
            "fd_tiny": theirs["frechet_inception_distance"],
            "is_tiny": theirs["inception_score_mean"],
            "is_std_tiny": theirs["inception_score_std"],
            "precision_tiny": theirs["precision"],
            "recall_tiny": theirs["recall"],
        },
        rel=1e-6,
    )
    assert set(result["protocol"]) == set(result["metrics"])
    assert set(result["skipped"]) == {"kd_tiny"}  # 23 real images are too few
    assert result["counts"]["samples"] == 40
    assert result["counts"]["real_images"] == 23
    assert result["counts"]["bad_images"] == 1


def test_the_sample_set_is_the_same_for_every_batch_size(measure):
    results = [measure(batch_size=size)["metrics"] for size in (1, 7, 40)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)


def test_ranks_share_the_samples_out_without_gap_or_overlap(tmp_path):
    config = GenerationConfig(pipeline="p", output=tmp_path / "r.json", samples=41, batch_size=4)
    for world_size in (1, 2, 3, 20):
        mine = [my_samples(config, rank, world_size) for rank in range(world_size)]
        assert sorted(i for batches in mine for batch in batches for i in batch) == list(range(41))
        assert all(len(batch) <= 4 for batches in mine for batch in batches)


def test_classes_are_balanced_each_image_has_its_own_seed_and_a_larger_set_begins_with_a_smaller_one(measure):
    pairs = []
    for samples in (20, 40):
        pipeline = FakePipeline()
        measure(pipeline, samples=samples, batch_size=6, seed=100)
        pairs.append(
            [(c, s) for call in pipeline.calls for c, s in zip(call["class_labels"], call["seeds"], strict=True)]
        )
    labels, seeds = zip(*pairs[1], strict=True)
    assert [labels.count(c) for c in range(3)] == [14, 13, 13]
    assert sorted(seeds) == list(range(100, 140))
    assert pairs[1][:20] == pairs[0]


def test_sampler_options_reach_the_pipeline_and_the_result(measure):
    pipeline = FakePipeline()
    options = {"guidance_scale": 2.5, "guidance_interval": (0.1, 0.8), "steps": 7}
    result = measure(pipeline, samples=5, **options)
    call = pipeline.calls[0]
    assert (call["guidance_scale"], call["guidance_interval"], call["num_inference_steps"]) == (2.5, (0.1, 0.8), 7)
    assert result["config"]["guidance_scale"] == 2.5
    assert result["config"]["steps"] == 7
    assert result["sampler"]["scheduler"] == "SimpleNamespace"
    assert result["sampler"]["flow_shift"] == 1.0
    assert "_private" not in result["sampler"]


def test_the_picture_has_a_row_of_samples_for_each_class(measure, tmp_path):
    result = measure(samples=10)
    picture = np.asarray(Image.open(tmp_path / "result.png")).astype(float) / 255
    assert result["grid"]["rows"] == ["ant", "bee", "cat"]
    assert picture.shape[:2] == (3 * 18 + 2, 4 * 18 + 2)
    for row in range(3):
        tile = picture[row * 18 + 2 : row * 18 + 18, 2:18]
        expected = FakePipeline.image(row, row).permute(1, 2, 0).numpy()
        assert np.abs(tile - expected).max() < 0.01
        assert int(tile.mean((0, 1)).argmax()) == int(COLOURS[row].argmax())
    assert (picture[2 + 18 :, -16:] == 1).all()  # ten samples leave the last places of two rows empty


def test_sizes_and_classes_that_do_not_fit_are_told(measure):
    with pytest.raises(UsageError, match=r"data\.image_size = 32, but .* makes images of 16 pixels"):
        measure(data={"image_size": 32})
    assert not any("classes" in warning for warning in measure()["warnings"])
    assert any("classes" in warning for warning in measure(FakePipeline(("a", "b", "c")))["warnings"])


def test_without_network_every_row_says_how_to_get_the_weights(measure, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    result = measure(features="inception-v3-compat")
    assert result["metrics"] == {}
    assert set(result["skipped"]) == {"fid", "is", "precision", "recall", "kid"}
    assert all("--features_weights" in why for why in result["skipped"].values())


def test_real_samples_depend_on_class_and_seed_alone(tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    vae = VQModel.from_pretrained(tokenizer_folder)
    save_pipeline(tmp_path / "pipeline", transformer, vae, scheduler, {0: "ant", 1: "bee", 2: "cat"})
    pipeline = generation.load_pipeline(str(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    config = GenerationConfig(pipeline="p", output=tmp_path / "r.json", steps=2, guidance_scale=2.0, seed=3)
    together = generate(pipeline, config, range(6))
    apart = torch.cat([generate(pipeline, config, range(0, 1)), generate(pipeline, config, range(1, 6))])
    assert together.shape == (6, 3, 16, 16)
    assert generation.image_size(pipeline) == 16
    assert generation.class_names(pipeline) == ["ant", "bee", "cat"]
    # Not exact: a float error may move an 8-bit pixel by a level, or a latent on the border of two codes to the other.
    assert (together != apart).float().mean() < 0.01
    assert (together[0] != together[3]).float().mean() > 0.2  # the same class, another seed


class AlwaysBee(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(images), 3)


def test_class_accuracy_is_the_share_of_the_class_asked_for_and_of_real_test_images(measure, monkeypatch):
    monkeypatch.setattr(generation, "train_classifier", lambda data, workers, device: AlwaysBee())
    for options in ({}, {"reference_split": "train"}, {"reference_limit": 4}):
        result = measure(samples=10, classifier=True, features="none", **options)
        assert result["metrics"]["class_accuracy"] == pytest.approx(3 / 10)
        assert result["class_accuracy_by_class"] == {"ant": 0, "bee": 1, "cat": 0}
        if options != {"reference_limit": 4}:
            assert result["metrics"]["class_accuracy_real"] == pytest.approx(8 / 23)
    with pytest.raises(UsageError, match=r"--classifier: the 3 classes .* are not the 2"):
        measure(FakePipeline(("ant", "bee")), classifier=True)


def test_a_folder_without_a_pipeline_and_class_ids_with_gaps_are_errors(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no pipeline at"):
            generation.load_pipeline(str(folder))
    gaps = FakePipeline()
    gaps.id2label = {0: "ant", 2: "bee"}
    with pytest.raises(UserError, match=r"\[0, 2\], are not 0 to 1"):
        generation.class_names(gaps)


def test_the_reference_is_the_split_that_was_asked_for(measure):
    result = measure(reference_split="train")
    assert result["counts"]["real_images"] == 12
    assert result["data"]["split"] == "train"
    assert measure(reference_limit=9)["counts"]["real_images"] in (8, 9)  # one of them may be the broken one


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
    run_script, measure, image_folder, tiny_extractor, tmp_path, monkeypatch, capsys
):
    class Loaded(FakePipeline):
        @classmethod
        def from_pretrained(cls, folder):
            return cls()

        def to(self, device):
            return self

        def set_progress_bar_config(self, disable):
            pass

    monkeypatch.setattr(generation, "ClassConditionalPipeline", Loaded)
    output = tmp_path / "deep" / "er" / "result.json"
    run_script(
        generation.main,
        *("--pipeline", "somewhere", "--data", image_folder, "--data.max_bad_fraction", 0.3, "--output", output),
        *("--features", tiny_extractor, "--samples", 12, "--workers", 0, "--guidance_interval", 0.0, 0.5),
    )
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    for name, value in result["metrics"].items():
        assert f"{name} " in printed
        assert f"{value:.5g}" in printed
    assert result["config"]["guidance_interval"] == [0.0, 0.5]
    assert result["sampler"]["lambda_min_clipped"] == "-inf"  # JSON has no such number
    assert sorted(path.name for path in output.parent.iterdir()) == ["result.json", "result.png"]
