import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
from fakes import COLOURS, FakePipeline
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from common.errors import UsageError, UserError
from common.image_metrics import to_uint8
from diffusion.sampling import ddpm_scheduler, flow_scheduler
from eval import generation, reference
from eval.features import file_hash
from eval.generation import GenerationConfig, evaluate
from eval.ranks import GROUP
from eval.report import folder_hash
from eval.samples import Sampling, draw, groups, image_size, load_pipeline
from pipelines.export import save_pipeline


@pytest.fixture
def measure(image_folder, tiny_extractor, tmp_path):
    """Evaluate a pipeline against the tiny images; returns the result."""

    def run(pipeline=None, data=None, folder="pipeline", **options):
        config = GenerationConfig(
            **{
                "pipeline": str(tmp_path / folder),
                "data": {"source": str(image_folder), "max_bad_fraction": 0.3, **(data or {})},
                "output": tmp_path / "result.json",
                "features": [tiny_extractor],
                "cache": None,
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
    spatial = torch_fidelity.calculate_metrics(
        input1=str(made), input2=str(real), feature_extractor="tiny", feature_layer_fid="spatial",
        **{"fid": True, "cuda": False, "verbose": False, "cache": False},
    )  # fmt: skip
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


def test_the_sample_set_is_the_same_for_every_batch_size(measure):
    results = [measure(batch_size=size)["metrics"] for size in (1, 7, 40)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)


def test_ranks_share_the_samples_out_without_gap_or_overlap():
    for world_size in (1, 2, 3, 20):
        mine = [list(groups(41, rank, world_size)) for rank in range(world_size)]
        drawn = sorted(i for groups_of_rank in mine for group in groups_of_rank for i in group)
        assert drawn == list(range(48))  # three whole groups
        assert all(len(group) == GROUP for groups_of_rank in mine for group in groups_of_rank)


def test_classes_are_balanced_each_image_has_its_own_seed_and_a_larger_set_begins_with_a_smaller_one(measure):
    pairs = []
    for samples in (20, 40):
        pipeline = FakePipeline()
        measure(pipeline, samples=samples, batch_size=6, seed=100)
        pairs.append(
            [(c, s) for call in pipeline.calls for c, s in zip(call["class_labels"], call["seeds"], strict=True)]
        )
    labels, seeds = zip(*pairs[1], strict=True)
    assert [labels[:40].count(c) for c in range(3)] == [14, 13, 13]
    assert sorted(seeds) == list(range(100, 148))  # the last group is drawn as a whole
    assert pairs[1][:32] == pairs[0]


def test_sampler_options_reach_the_pipeline_and_the_result(measure):
    pipeline = FakePipeline()
    options = {"guidance_scale": [2.5], "guidance_interval": (0.1, 0.8), "steps": [7]}
    result = measure(pipeline, samples=5, **options)
    call = pipeline.calls[0]
    assert (call["guidance_scale"], call["guidance_interval"], call["num_inference_steps"]) == (2.5, (0.1, 0.8), 7)
    assert result["setting"] == {"guidance_scale": 2.5, "steps": 7}
    assert result["sampler"]["guidance_interval"] == (0.1, 0.8)
    assert result["sampler"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert result["sampler"]["flow_shift"] == 1.0
    assert not any(name.startswith("_") for name in result["sampler"])


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
    result = measure(features=["inception-v3-compat"])
    assert result["metrics"] == {}
    assert set(result["skipped"]) == {"fid", "sfid", "is", "precision", "recall", "kid"}
    assert all("--features_weights" in why for why in result["skipped"].values())


@pytest.fixture
def own_pipeline(tokenizer_folder, tmp_path):
    """A pipeline as a run leaves it, by the number of its layers."""

    def make(layers=1):
        folder = tmp_path / f"pipeline-{layers}"
        save_pipeline(folder, random_transformer(layers), VQModel.from_pretrained(tokenizer_folder),
                      flow_scheduler(1.0), {0: "ant", 1: "bee", 2: "cat"})  # fmt: skip
        pipeline = load_pipeline(str(folder))
        pipeline.set_progress_bar_config(disable=True)
        return folder, pipeline

    return make


def random_transformer(layers):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=layers,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return transformer


def test_sampler_and_guide_make_the_samples_and_are_in_the_result(measure, own_pipeline, tmp_path):
    (folder, pipeline), (weak, _) = own_pipeline(), own_pipeline(2)
    options = {"samples": 16, "steps": [2], "guidance_scale": [2.0], "metrics": ["fid"], "keep": "png"}
    options |= {"folder": folder.name, "output": tmp_path / "result.json"}
    plain = measure(pipeline, **options | {"output": tmp_path / "plain.json"})
    guided = measure(pipeline, **options, sampler="heun", guide=weak)
    assert plain["sampler"]["guide"] is None
    assert plain["sampler"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert guided["sampler"]["scheduler"] == "FlowMatchHeunDiscreteScheduler"
    assert guided["sampler"]["guide"] == {"folder": str(weak), "sha256": folder_hash(weak)}
    pipeline = load_pipeline(str(folder))
    how = Sampling(2.0, (0.0, 1.0), 2, 0, "no", lambda sample: sample % 3, pipeline.load_guide(weak))
    pipeline.scheduler = flow_scheduler(1.0, "heun")
    shown = np.stack([np.asarray(Image.open(Path(guided["samples"]["png"]) / f"{i:06}.png")) for i in range(16)])
    assert (shown == draw(pipeline, how, range(16)).permute(0, 2, 3, 1).numpy()).all()
    with pytest.raises(UsageError, match="samples of other settings"):
        measure(pipeline, **options, sampler="heun")


def test_a_sampler_guide_or_number_of_steps_that_does_not_fit_is_told_at_once(measure, own_pipeline, stock_pipeline):
    (folder, pipeline), stock = own_pipeline(), load_pipeline(str(stock_pipeline))
    with pytest.raises(UsageError, match="'ddim' is no sampler of rectified flow"):
        measure(pipeline, sampler="ddim")
    with pytest.raises(UsageError, match="a DiTPipeline, takes none"):
        measure(stock, guide=folder)
    pipeline.scheduler = ddpm_scheduler("epsilon", {"beta_schedule": "linear"})
    with pytest.raises(UsageError, match="must divide 1000, which 30 does not"):
        measure(pipeline, steps=[50, 30])
    assert measure(stock, sampler="dpm++", steps=[3], samples=16)["sampler"]["num_train_timesteps"] == 20


def test_real_samples_depend_on_class_and_seed_alone(own_pipeline):
    _, pipeline = own_pipeline()
    how = Sampling(2.0, (0.0, 1.0), 2, 3, "no", lambda sample: sample % 3)
    together = draw(pipeline, how, range(6))
    apart = torch.cat([draw(pipeline, how, range(0, 1)), draw(pipeline, how, range(1, 6))])
    assert together.shape == (6, 3, 16, 16)
    assert image_size(pipeline) == 16
    assert generation.class_names(pipeline) == ["ant", "bee", "cat"]
    # Not exact in other groups: a float error may move a pixel by a level, or a latent to the other side of a border.
    assert (together != apart).float().mean() < 0.01
    assert (together[0] != together[3]).float().mean() > 0.2  # the same class, another seed


class AlwaysBee(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(images), 3)


def test_class_accuracy_is_the_share_of_the_class_asked_for_and_of_real_test_images(measure, monkeypatch):
    monkeypatch.setattr(generation, "train_classifier", lambda data, workers, device: AlwaysBee())
    for options in ({}, {"reference": "train"}, {"reference_limit": 4}):
        result = measure(samples=10, classifier=True, features=["none"], **options)
        assert result["metrics"]["class_accuracy"] == pytest.approx(3 / 10)
        assert result["class_accuracy_by_class"] == {"ant": 0, "bee": 1, "cat": 0}
        if options != {"reference_limit": 4}:
            assert result["metrics"]["class_accuracy_real"] == pytest.approx(8 / 23)
    with pytest.raises(UsageError, match=r"--classifier .* the 3 classes .* are not the 2"):
        measure(FakePipeline(("ant", "bee")), classifier=True)


def test_a_folder_without_a_pipeline_and_class_ids_with_gaps_are_errors(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no pipeline at"):
            load_pipeline(str(folder))
    gaps = FakePipeline()
    gaps.id2label = {0: "ant", 2: "bee"}
    with pytest.raises(UserError, match=r"\[0, 2\], are not 0 to 1"):
        generation.class_names(gaps)


def test_the_reference_is_the_split_that_was_asked_for(measure):
    result = measure(reference="train")
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


def counted(pipeline):
    """How many images it drew."""
    return sum(len(call["seeds"]) for call in pipeline.calls)


def test_sampling_goes_on_after_a_kill_and_gives_the_same_result(measure, tmp_path):
    whole = measure(samples=40, keep="png", output=tmp_path / "whole.json")

    class Killed(FakePipeline):
        def __call__(self, *arguments, **options):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        measure(Killed(), samples=40, keep="png", output=tmp_path / "again.json")
    folder = tmp_path / "again-samples" / "guidance-1-steps-50"
    assert len(list(folder.glob("*.png"))) == 32
    (folder / "000003.png").write_bytes(b"\x89PNG torn")
    rest = FakePipeline()
    again = measure(rest, samples=40, keep="png", output=tmp_path / "again.json")
    assert counted(rest) == 32  # the group with the torn file, and the one that was not drawn
    assert again["metrics"] == whole["metrics"]
    assert len(list(folder.glob("*.png"))) == 40
    done = FakePipeline()
    assert measure(done, samples=40, keep="png", output=tmp_path / "again.json")["metrics"] == whole["metrics"]
    assert counted(done) == 0
    with pytest.raises(UsageError, match=r"holds samples of other settings .seed: 0 -> 7.*delete it"):
        measure(samples=40, keep="png", seed=7, output=tmp_path / "again.json")


def test_samples_are_kept_in_adms_format(measure, tmp_path):
    result = measure(samples=20, keep="npz", seed=3)
    with np.load(result["samples"]["npz"]) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (20, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(20)]
    for i in (0, 7, 19):
        expected = FakePipeline.image(i % 3, 3 + i).permute(1, 2, 0).numpy().astype(np.float64) * 255
        assert np.array_equal(images[i], np.rint(expected).astype(np.uint8))
    # ADM's file of samples is a reference, too: the samples against themselves.
    again = measure(samples=20, seed=3, reference=result["samples"]["npz"])["metrics"]
    assert again["fd_tiny"] == pytest.approx(0, abs=1e-6)
    assert again["sfd_tiny"] == pytest.approx(0, abs=1e-6)
    assert again["precision_tiny"] == again["recall_tiny"] == 1


def test_a_sweep_measures_every_setting_and_reports_the_best(measure, tmp_path):
    class Guided(FakePipeline):
        def __call__(self, class_labels, *, guidance_scale, **options):
            images = super().__call__(class_labels, guidance_scale=guidance_scale, **options).images
            return SimpleNamespace(images=(images * (1 - 0.2 * abs(guidance_scale - 2))).clamp(0, 1))

    options = {"guidance_scale": [1, 2, 3.5], "steps": [5, 9], "metrics": ["fid"]}
    result = measure(Guided(), reference=None, **options)
    assert [(run["guidance_scale"], run["steps"]) for run in result["sweep"]] == [
        (scale, steps) for scale in (1, 2, 3.5) for steps in (5, 9)
    ]
    alone = measure(Guided(), guidance_scale=[3.5], steps=[9], metrics=["fid"])
    assert result["sweep"][-1]["metrics"] == alone["metrics"]
    best = min(result["sweep"], key=lambda run: run["metrics"]["fd_tiny"])
    assert result["metrics"] == best["metrics"]
    assert result["setting"] == {"guidance_scale": best["guidance_scale"], "steps": best["steps"]}
    assert any("least fd_tiny of 6" in warning for warning in result["warnings"])
    assert (tmp_path / "result-guidance-3.5-steps-9.png").is_file()


def test_labels_can_be_drawn_as_often_as_in_the_data(measure, monkeypatch):
    pipeline = FakePipeline()
    measure(pipeline, samples=160, labels="data", features=["none"])
    labels = [label for call in pipeline.calls for label in call["class_labels"]]
    again = FakePipeline()
    measure(again, samples=48, labels="data", features=["none"])
    assert [label for call in again.calls for label in call["class_labels"]] == labels[:48]
    assert len(set(labels)) == 3
    assert [labels[i] for i in range(30)] != [i % 3 for i in range(30)]


def write_reference(path, **changes):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6))
    arrays = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return arrays


def test_the_reference_can_be_adms_file_of_statistics(measure, tmp_path):
    path = tmp_path / "reference.npz"
    arrays = write_reference(path)
    result = measure(reference=str(path))
    tiny = FEATURE_EXTRACTORS_REGISTRY["tiny"]("tiny", ["6", "spatial"])
    images = torch.stack([to_uint8(FakePipeline.image(i % 3, i) * 2 - 1) for i in range(40)])
    for name, rows, mean, covariance in zip(
        ("fd_tiny", "sfd_tiny"), tiny(images), ("mu", "mu_s"), ("sigma", "sigma_s"), strict=True
    ):
        ours = fid_features_to_statistics(rows.double())
        theirs = {"mu": arrays[mean], "sigma": arrays[covariance]}
        expected = fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
        assert result["metrics"][name] == pytest.approx(expected, rel=1e-6)
    assert "holds no images" in result["skipped"]["precision_tiny"]
    assert result["reference"]["sha256"] == file_hash(path)


def test_a_wrong_reference_file_is_one_clear_error(measure, tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match=r"reference\.npz is no \.npz file"):
        measure(reference=str(path))
    path.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"is no \.npz file in ADM's format"):
        measure(reference=str(path))
    for changes, message in (
        ({"mu": None}, "must hold mu and sigma, or images in arr_0; it holds sigma, mu_s, sigma_s"),
        ({"sigma": np.eye(5)}, r"found mu \(6,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 features; those of tiny have 6"),
        ({"sigma": np.full((6, 6), np.nan)}, "no finite mean and symmetric covariance"),
        ({"arr_0": np.zeros((20, 8, 8, 3), np.uint8)}, "images of 8 x 8 pixels, not 16 x 16"),
        ({"arr_0": np.zeros((20, 16, 16, 3))}, r"arr_0 must hold images, uint8 \[N, H, W, 3\], not float64"),
    ):
        write_reference(path, **changes)
        with pytest.raises(UserError, match=message):
            measure(reference=str(path))
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        measure(reference="validation")


def test_protocols_say_what_a_number_deviates_in_and_adm_scores_blocks_of_consecutive_samples(measure):
    result = measure(protocol="adm", samples=40)
    assert result["data"]["split"] == "train"
    assert any("adm means 50000 samples, these are 40" in warning for warning in result["warnings"])
    assert any("adm means 10000 real images for precision" in warning for warning in result["warnings"])
    assert result["metrics"]["is_std_tiny"] == 0  # one block
    paper = measure(protocol="nsvq", samples=40)
    assert any("nsvq means 5000 samples" in warning for warning in paper["warnings"])
    assert paper["data"]["split"] == "test"
    config = GenerationConfig(pipeline="p", output="r.json")
    resolved = generation._resolve(config, 128)  # the defaults are ImageNet-1k's
    assert (resolved.protocol, resolved.samples, resolved.reference) == ("adm", 50_000, "adm")


def test_the_second_run_reuses_the_reference_unless_something_changed(measure, monkeypatch, tmp_path):
    read = []
    original = reference.eval_batches

    def counting(*arguments, **options):
        read.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(reference, "eval_batches", counting)
    kept = {"cache": tmp_path / "cache", "cache_features": True}
    first = measure(**kept)
    again = measure(**kept)
    assert len(read) == 1
    assert again["metrics"] == first["metrics"]
    assert again["counts"] == first["counts"]
    assert again["reference"]["kept_from_an_earlier_run"] == ["tiny"]
    measure(**kept, reference_limit=9)
    measure(**kept, reference="train")
    assert len(read) == 3
    statistics = {"cache": tmp_path / "cache", "reference_limit": 8}
    measure(**statistics)
    measure(**statistics)  # precision needs single features, which are not kept unless asked for
    assert len(read) == 5
    measure(**statistics, metrics=["fid", "sfid", "isc"])
    assert len(read) == 5
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert measure(**kept)["metrics"] == first["metrics"]  # a damaged file is made again
    assert len(read) == 6


@pytest.fixture(scope="session")
def stock_pipeline(tmp_path_factory):
    """A stock DiTPipeline with an AutoencoderKL, learned variance and a stochastic sampler."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        latent_channels=4, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stock")
    DiTPipeline(transformer, vae, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "ant, emmet", "1": "bee", "2": "cat"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_stock_pipeline_with_a_stochastic_sampler_gives_the_same_samples_at_any_batch_size(measure, stock_pipeline):
    pipeline = load_pipeline(str(stock_pipeline))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is DiTPipeline
    assert generation.class_names(pipeline) == ["ant", "bee", "cat"]
    options = {"samples": 20, "steps": [3]}
    results = [measure(pipeline, batch_size=size, **options)["metrics"] for size in (3, 64)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    how = Sampling(1.0, (0.0, 1.0), 3, 0, "no", lambda sample: sample % 3)
    drawn = draw(pipeline, how, range(16))
    assert drawn.shape == (16, 3, 16, 16)
    assert (drawn[0] != drawn[3]).float().mean() > 0.5
    with pytest.raises(UsageError, match=r"guidance_interval.*a DiTPipeline, takes none"):
        measure(pipeline, guidance_interval=(0.1, 0.5), **options)


def test_a_pipeline_without_classes_is_refused(tmp_path, stock_pipeline):
    vae = DiTPipeline.from_pretrained(stock_pipeline)
    DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                             up_block_types=("UpBlock2D",) * 2), vae.scheduler).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="a DDPMPipeline, which takes no class_labels"):
        load_pipeline(str(tmp_path))
