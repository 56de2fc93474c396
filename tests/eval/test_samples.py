import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
from fakes import FakePipeline
from PIL import Image

from nsvq.autoregressive.model import ModelConfig, make_llama
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.samplers import ddpm_scheduler, flow_scheduler
from nsvq.errors import UsageError, UserError
from nsvq.eval import generation
from nsvq.eval.page import write_page
from nsvq.eval.report import folder_hash
from nsvq.eval.samples import Sampling, draw, group_size, groups, image_size, is_ours, load_pipeline
from nsvq.pipelines.autoregressive import save_pipeline as save_token_pipeline
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline


def test_ranks_share_the_samples_out_without_gap_or_overlap():
    for world_size in (1, 2, 3, 20):
        mine = [list(groups(41, rank, world_size, 16)) for rank in range(world_size)]
        drawn = sorted(i for groups_of_rank in mine for group in groups_of_rank for i in group)
        assert drawn == list(range(48))  # three whole groups
        assert all(len(group) == 16 for groups_of_rank in mine for group in groups_of_rank)


def test_codes_are_drawn_more_at_a_time_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert group_size(gpu, tokens=True) > group_size(gpu, tokens=False) == group_size(cpu, tokens=True)


def test_classes_are_balanced_each_image_has_its_own_seed_and_a_larger_set_begins_with_a_smaller_one(measure_samples):
    pairs = []
    for samples in (20, 40):
        pipeline = FakePipeline()
        measure_samples(pipeline, samples=samples, batch_size=6, seed=100)
        pairs.append(
            [(c, s) for call in pipeline.calls for c, s in zip(call["class_labels"], call["seeds"], strict=True)]
        )
    labels, seeds = zip(*pairs[1], strict=True)
    assert [labels[:40].count(c) for c in range(3)] == [14, 13, 13]
    assert sorted(seeds) == list(range(100, 148))  # the last group is drawn as a whole
    assert pairs[1][:32] == pairs[0]


@pytest.fixture
def own_pipeline(tokenizer_folder, tmp_path):
    """A pipeline as a run leaves it, by the number of its layers."""

    def make(layers=1):
        folder = tmp_path / f"pipeline-{layers}"
        save_pipeline(
            folder,
            random_transformer(layers),
            VQModel.from_pretrained(tokenizer_folder),
            flow_scheduler(1.0),
            {0: "ant", 1: "bee", 2: "cat"},
        )
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


@pytest.mark.slow
def test_sampler_and_guide_make_the_samples_and_are_in_the_result(measure_samples, own_pipeline, tmp_path):
    (folder, pipeline), (weak, _) = own_pipeline(), own_pipeline(2)
    options = {"samples": 16, "steps": [2], "guidance_scale": [2.0], "metrics": ["fid"], "keep": "png"}
    options |= {"folder": folder.name, "output": tmp_path / "result.json"}
    plain = measure_samples(pipeline, **options | {"output": tmp_path / "plain.json"})
    guided = measure_samples(pipeline, **options, sampler="heun", guide=weak)
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
        measure_samples(pipeline, **options, sampler="heun")


def test_a_sampler_guide_or_number_of_steps_that_does_not_fit_is_told_at_once(
    measure_samples, own_pipeline, stock_pipeline
):
    (folder, pipeline), stock = own_pipeline(), load_pipeline(str(stock_pipeline))
    with pytest.raises(UsageError, match="'ddim' is no sampler of rectified flow"):
        measure_samples(pipeline, sampler="ddim")
    with pytest.raises(UsageError, match="a DiTPipeline, takes none"):
        measure_samples(stock, guide=folder)
    pipeline.scheduler = ddpm_scheduler("epsilon", {"beta_schedule": "linear"})
    with pytest.raises(UsageError, match="must divide 1000, which 30 does not"):
        measure_samples(pipeline, steps=[50, 30])
    assert measure_samples(stock, sampler="dpm++", steps=[3], samples=16)["sampler"]["num_train_timesteps"] == 20


def test_a_pipeline_without_classes_is_measured_on_samples_of_no_class(measure_samples, tokenizer_folder, tmp_path):
    unet = UNet2DModel(
        8,
        3,
        3,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    folder = tmp_path / "ldm"
    save_pipeline(
        folder,
        unet,
        VQModel.from_pretrained(tokenizer_folder),
        ddpm_scheduler("epsilon", {"beta_schedule": "linear"}),
        {},
    )
    pipeline = load_pipeline(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    options = {"folder": folder.name, "output": tmp_path / "result.json", "samples": 16, "steps": [2]}
    result = measure_samples(pipeline, **options, metrics=["fid"], keep="npz", seed=7)
    assert result["metrics"].keys() == {"fd_tiny"}
    assert (result["labels"], result["classes"], result["grid"]["rows"]) == ("no class", [], ["no class"])
    assert not any("classes" in warning for warning in result["warnings"])
    packed = np.load(result["samples"]["npz"])
    assert packed.files == ["arr_0"]
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(16)]
    expected = stock(16, generator=generators, num_inference_steps=2, output_type="np").images * 255
    assert (np.abs(packed["arr_0"] - expected) < 1).mean() > 0.99
    with pytest.raises(UsageError, match=r"need classes, and .* has none"):
        measure_samples(pipeline, **options, labels="data")


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


def test_a_folder_without_a_pipeline_and_class_ids_with_gaps_are_errors(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no pipeline at"):
            load_pipeline(str(folder))
    gaps = FakePipeline()
    gaps.id2label = {0: "ant", 2: "bee"}
    with pytest.raises(UserError, match=r"\[0, 2\], are not 0 to 1"):
        generation.class_names(gaps)


def counted(pipeline):
    """How many images it drew."""
    return sum(len(call["seeds"]) for call in pipeline.calls)


def test_sampling_goes_on_after_a_kill_and_gives_the_same_result(measure_samples, tmp_path):
    whole = measure_samples(samples=40, keep="png", output=tmp_path / "whole.json")

    class Killed(FakePipeline):
        def __call__(self, *arguments, **options):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        measure_samples(Killed(), samples=40, keep="png", output=tmp_path / "again.json")
    folder = tmp_path / "again-samples" / "guidance-1-steps-50"
    assert len(list(folder.glob("*.png"))) == 32
    (folder / "000003.png").write_bytes(b"\x89PNG torn")
    rest = FakePipeline()
    again = measure_samples(rest, samples=40, keep="png", output=tmp_path / "again.json")
    assert counted(rest) == 32  # the group with the torn file, and the one that was not drawn
    assert again["metrics"] == whole["metrics"]
    assert len(list(folder.glob("*.png"))) == 40
    done = FakePipeline()
    assert measure_samples(done, samples=40, keep="png", output=tmp_path / "again.json")["metrics"] == whole["metrics"]
    assert counted(done) == 0
    with pytest.raises(UsageError, match=r"holds samples of other settings .seed: 0 -> 7.*delete it"):
        measure_samples(samples=40, keep="png", seed=7, output=tmp_path / "again.json")


def test_samples_are_kept_in_adms_format(measure_samples, tmp_path):
    result = measure_samples(samples=20, keep="npz", seed=3)
    with np.load(result["samples"]["npz"]) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (20, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(20)]
    for i in (0, 7, 19):
        expected = FakePipeline.image(i % 3, 3 + i).permute(1, 2, 0).numpy().astype(np.float64) * 255
        assert np.array_equal(images[i], np.rint(expected).astype(np.uint8))
    # ADM's file of samples is a reference, too: the samples against themselves.
    again = measure_samples(samples=20, seed=3, reference=result["samples"]["npz"])["metrics"]
    assert again["fd_tiny"] == pytest.approx(0, abs=1e-6)
    assert again["sfd_tiny"] == pytest.approx(0, abs=1e-6)
    assert again["precision_tiny"] == again["recall_tiny"] == 1


def test_labels_can_be_drawn_as_often_as_in_the_data(measure_samples, monkeypatch):
    pipeline = FakePipeline()
    measure_samples(pipeline, samples=160, labels="data", features=["none"])
    labels = [label for call in pipeline.calls for label in call["class_labels"]]
    again = FakePipeline()
    measure_samples(again, samples=48, labels="data", features=["none"])
    assert [label for call in again.calls for label in call["class_labels"]] == labels[:48]
    assert len(set(labels)) == 3
    assert [labels[i] for i in range(30)] != [i % 3 for i in range(30)]


@pytest.fixture(scope="session")
def stock_pipeline(tmp_path_factory):
    """A stock DiTPipeline with an AutoencoderKL, learned variance and a stochastic sampler."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=3,
    )
    for weight in transformer.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=16,
    )
    folder = tmp_path_factory.mktemp("stock")
    DiTPipeline(transformer, vae, DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "ant, emmet", "1": "bee", "2": "cat"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_stock_pipeline_with_a_stochastic_sampler_gives_the_same_samples_at_any_batch_size(
    measure_samples, stock_pipeline
):
    pipeline = load_pipeline(str(stock_pipeline))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is DiTPipeline
    assert generation.class_names(pipeline) == ["ant", "bee", "cat"]
    options = {"samples": 20, "steps": [3]}
    results = [measure_samples(pipeline, batch_size=size, **options)["metrics"] for size in (3, 64)]
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    how = Sampling(1.0, (0.0, 1.0), 3, 0, "no", lambda sample: sample % 3)
    drawn = draw(pipeline, how, range(16))
    assert drawn.shape == (16, 3, 16, 16)
    assert (drawn[0] != drawn[3]).float().mean() > 0.5
    with pytest.raises(UsageError, match=r"guidance_interval.*a DiTPipeline, takes none"):
        measure_samples(pipeline, guidance_interval=(0.1, 0.5), **options)
    with pytest.raises(UsageError, match=r"guidance_scale.*takes what is below 1 for 1"):
        measure_samples(pipeline, guidance_scale=[1.5, 0.0], **options)


@pytest.mark.parametrize("variant", ["dit", "modern"])
def test_a_model_on_a_continuous_vae_is_ours_with_its_classes(stock_pipeline, tmp_path, variant):
    """Not 1,000 classes, of which most would be the null class."""
    vae = DiTPipeline.from_pretrained(stock_pipeline).vae
    model = DiT(4, 4, 3, depth=1, width=16, heads=2, variant=variant)
    save_pipeline(tmp_path / "own", to_stock(model), vae, flow_scheduler(1.0), {0: "ant", 1: "bee", 2: "cat"})
    (tmp_path / "own" / "nsvq.json").write_text("{}")
    pipeline = load_pipeline(str(tmp_path / "own"))
    assert generation.class_names(pipeline) == ["ant", "bee", "cat"]
    assert is_ours(pipeline)
    assert image_size(pipeline) == 16


def test_the_size_of_images_of_a_deep_compression_autoencoder_is_known(tmp_path):
    blocks = {"decoder_block_out_channels": (8, 8, 8), "encoder_block_out_channels": (8, 8, 8)}
    layers = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "latent_channels": 4}
    multiscale = {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())}
    vae = AutoencoderDC(in_channels=3, **blocks, **layers, **kinds, **multiscale)
    own = ClassConditionalPipeline(to_stock(DiT(4, 4, 3, depth=1, width=16, heads=2)), vae, flow_scheduler(1.0))
    assert image_size(own) == 16


def test_an_autoregressive_pipeline_is_measured_over_a_sweep_of_temperatures(
    measure_samples, tokenizer_folder, tmp_path
):
    vae = VQModel.from_pretrained(tokenizer_folder)
    codes, tiny = vae.config.num_vq_embeddings, ModelConfig(size="tiny", depth=1, width=32, heads=2)
    llama = make_llama(tiny, codes, classes=3, tokens=64).eval()
    torch.nn.init.normal_(llama.lm_head.weight, std=0.3)
    names = {0: "ant", 1: "bee", 2: "cat"}
    save_token_pipeline(tmp_path / "tokens", llama, vae, names)
    pipeline = load_pipeline(str(tmp_path / "tokens"))
    pipeline.set_progress_bar_config(disable=True)
    assert (image_size(pipeline), generation.class_names(pipeline)) == (16, ["ant", "bee", "cat"])
    how = {"temperature": [0.0, 1.0], "guidance_scale": [2.0], "metrics": ["fid"]}
    how |= {"guidance_schedule": "linear", "guidance_power": 3.0}
    result = measure_samples(pipeline, samples=16, folder="tokens", keep="png", **how)
    settings = [{k: run[k] for k in ("guidance_scale", "temperature", "top_k")} for run in result["sweep"]]
    assert settings == [{"guidance_scale": 2.0, "temperature": t, "top_k": 0} for t in (0.0, 1.0)]
    assert result["sampler"] == {"guidance_schedule": "linear", "guidance_power": 3.0, "top_p": 1.0}
    kept = tmp_path / "result-samples" / "guidance-2-temperature-1-top_k-0"
    shown = np.stack([np.asarray(Image.open(kept / f"{i:06}.png")) for i in range(16)])
    expected = pipeline(
        [i % 3 for i in range(16)],
        guidance_scale=2.0,
        guidance_schedule="linear",
        guidance_power=3.0,
        seeds=list(range(16)),
        output_type="np",
    ).images
    assert np.abs(shown - expected * 255).max() <= 1
    write_page(tmp_path / "page.html", [result], [])
    chosen = result["setting"]["temperature"]
    assert f"Guidance 2, temperature {chosen:g}, top k 0" in (tmp_path / "page.html").read_text()
    with pytest.raises(UsageError, match="--steps means nothing to an autoregressive model"):
        measure_samples(pipeline, samples=16, folder="tokens", steps=[3])
    with pytest.raises(UsageError, match="--temperature means nothing to a diffusion model"):
        measure_samples(FakePipeline(), temperature=[0.5])


def test_a_pipeline_without_classes_is_refused(tmp_path, stock_pipeline):
    vae = DiTPipeline.from_pretrained(stock_pipeline)
    DDPMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        vae.scheduler,
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a DDPMPipeline, which takes no class_labels"):
        load_pipeline(str(tmp_path))
