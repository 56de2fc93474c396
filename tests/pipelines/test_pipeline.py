import shutil
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard

from nsvq.diffusion.objectives import DDPM, DDPMConfig
from nsvq.diffusion.samplers import ddpm_scheduler, flow_scheduler
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline

STEPS = 4


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(pipeline, labels, **options):
    """float32 [N, 3, H, W]."""
    return pipeline(labels, **{"num_inference_steps": STEPS, "output_type": "pt"} | options).images


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_images_equal_those_of_the_stock_pipeline(folder, pipeline, guidance_scale):
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 12}
    expected = stock([0, 4, 2], generator=generators(5, 6, 7), output_type="pt", **options).images
    got = images(pipeline, [0, 4, 2], generator=generators(5, 6, 7), **options)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(images(pipeline, [0, 4, 2], seeds=[5, 6, 7], **options), got)
    one = stock([0, 4, 2], generator=torch.Generator().manual_seed(1), output_type="pt", **options).images
    got = images(pipeline, [0, 4, 2], generator=torch.Generator().manual_seed(1), batch_size=2, **options)
    torch.testing.assert_close(got, one, rtol=0, atol=1e-5)


def test_an_image_depends_on_its_seed_and_class_but_not_on_its_batch(pipeline):
    labels, seeds = [0, 4, 2, 1, 0], [3, 1, 4, 1, 5]
    latents = images(pipeline, labels, seeds=seeds, guidance_scale=2.0, output_type="latent")
    for batch_size in (1, 2, 3):
        other = images(pipeline, labels, seeds=seeds, guidance_scale=2.0, output_type="latent", batch_size=batch_size)
        torch.testing.assert_close(other, latents, rtol=1e-4, atol=1e-5)
    alone = images(pipeline, 1, seeds=[1], guidance_scale=2.0, output_type="latent")
    torch.testing.assert_close(alone, latents[3:4], rtol=1e-4, atol=1e-5)
    assert (latents[0] - latents[4]).abs().max() > 0.1  # one class, two seeds
    assert (latents[1] - latents[3]).abs().max() > 1e-3  # one seed, two classes


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(flow_scheduler(1.5), "sde"), (DDPM(DDPMConfig(prediction="v")).scheduler(), "ddpm")],
    ids=["flow", "ddpm"],
)
def test_seeds_hold_for_samplers_that_draw_noise_too(pipeline, scheduler, sampler):
    pipeline.scheduler = scheduler
    how = {"sampler": sampler, "output_type": "latent"}
    latents = images(pipeline, [0, 1, 2], seeds=[7, 8, 9], **how)
    split = images(pipeline, [0, 1, 2], seeds=[7, 8, 9], batch_size=2, **how)
    torch.testing.assert_close(split, latents, rtol=1e-4, atol=1e-5)
    assert (images(pipeline, [0], seeds=[8], **how) - latents[:1]).abs().max() > 0.1


@pytest.mark.slow
def test_samplers_by_name_reach_about_the_same_image_with_the_folder_s_shift(pipeline):
    options = {"seeds": [0, 1], "num_inference_steps": 100, "output_type": "latent"}
    latents = images(pipeline, [0, 1], **options)
    assert torch.equal(images(pipeline, [0, 1], sampler="dpm++", **options), latents)
    for sampler in ("euler", "heun"):
        others = images(pipeline, [0, 1], sampler=sampler, **options)
        assert not torch.equal(others, latents)
        torch.testing.assert_close(others, latents, rtol=0, atol=0.1 * latents.std().item())
    assert (images(pipeline, [0, 1], sampler="sde", **options) - latents).abs().max() > latents.std()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    torch.testing.assert_close(
        images(pipeline, [0, 1], **options), images(pipeline, [0, 1], sampler="euler", **options)
    )


def test_the_progress_bar_counts_what_heun_evaluates(folder, capsys):
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    images(pipeline, [0, 1, 2], seeds=[0, 1, 2], batch_size=2, sampler="heun")
    assert f"{2 * (2 * STEPS - 1)}/{2 * (2 * STEPS - 1)}" in capsys.readouterr().err


@pytest.mark.parametrize("config", [DDPMConfig(), DDPMConfig(prediction="v", schedule="cosine")], ids=["epsilon", "v"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_images_of_a_ddpm_equal_those_of_the_stock_pipeline(tmp_path, dit, vae, pipeline, config, guidance_scale):
    save_pipeline(tmp_path / "ddpm", to_stock(dit), vae, DDPM(config).scheduler(), pipeline.id2label)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "ddpm")
    assert type(stock) is DiTPipeline
    assert type(stock.scheduler) is DDIMScheduler
    own = ClassConditionalPipeline.from_pretrained(tmp_path / "ddpm")
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 10}
    expected = stock([0, 4, 2], generator=generators(5, 6, 7), output_type="pt", **options).images
    assert expected.std() > 0.05
    torch.testing.assert_close(images(own, [0, 4, 2], seeds=[5, 6, 7], **options), expected, rtol=0, atol=1e-5)


def test_autoguidance_goes_from_the_guide_to_the_model(pipeline, tmp_path, random_dit, vae):
    save_pipeline(tmp_path / "weak", to_stock(random_dit(depth=1)), vae, flow_scheduler(1.5), pipeline.id2label)
    guide = pipeline.load_guide(tmp_path / "weak")
    weak = ClassConditionalPipeline.from_pretrained(tmp_path / "weak")
    options = {"seeds": [1, 2], "output_type": "latent"}
    alone = images(pipeline, [0, 4], **options)
    assert torch.equal(images(pipeline, [0, 4], guide=guide, guidance_scale=1.0, **options), alone)
    assert torch.equal(
        images(pipeline, [0, 4], guide=guide, guidance_scale=0.0, **options), images(weak, [0, 4], **options)
    )
    guided = images(pipeline, [0, 4], guide=guide, guidance_scale=2.0, num_inference_steps=1, **options)
    ends = [images(p, [0, 4], num_inference_steps=1, **options) for p in (pipeline, weak)]
    torch.testing.assert_close(guided, ends[1] + 2.0 * (ends[0] - ends[1]), rtol=1e-4, atol=1e-5)


def test_a_guide_of_other_latents_or_classes_is_refused(pipeline, tmp_path, random_dit, vae):
    other = to_stock(random_dit(sample_size=8))
    save_pipeline(tmp_path / "size", other, vae, flow_scheduler(1.5), pipeline.id2label)
    with pytest.raises(ValueError, match="the guide is a model of 3 x 8 x 8 latents, not 3 x 4 x 4"):
        pipeline.load_guide(tmp_path / "size")
    with pytest.raises(ValueError, match="the guide is a model of 3 x 8 x 8 latents"):
        images(pipeline, [0], guide=other)
    save_pipeline(tmp_path / "classes", to_stock(random_dit()), vae, flow_scheduler(1.5), {0: "cat"})
    with pytest.raises(ValueError, match="has other classes than this pipeline"):
        pipeline.load_guide(tmp_path / "classes")


def test_a_guide_that_predicts_something_else_is_refused(pipeline, tmp_path, random_dit, vae):
    def guide(name, scheduler, tokenizer=vae):
        save_pipeline(tmp_path / name, to_stock(random_dit(depth=1)), tokenizer, scheduler, pipeline.id2label)
        return tmp_path / name

    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
    with pytest.raises(ValueError, match="was trained on another objective or noise schedule than this pipeline"):
        pipeline.load_guide(guide("ddpm", ddpm_scheduler("epsilon", linear)))
    with torch.no_grad():
        (other := deepcopy(vae)).quantize.embedding.weight[0] += 1
    with pytest.raises(ValueError, match="was trained on another tokenizer than this pipeline"):
        pipeline.load_guide(guide("tokenizer", pipeline.scheduler, other))
    pipeline.load_guide(guide("shift", flow_scheduler(3.0, "euler")))  # what the shift changes are the steps alone
    epsilon = ClassConditionalPipeline.from_pretrained(tmp_path / "ddpm")
    epsilon.load_guide(guide("ancestral", ddpm_scheduler("epsilon", linear, "ddpm")))
    for name, scheduler in {
        "v": ddpm_scheduler("v_prediction", linear),
        "cosine": ddpm_scheduler("epsilon", {"beta_schedule": "squaredcos_cap_v2"}),
        "flow": pipeline.scheduler,
    }.items():
        with pytest.raises(ValueError, match="another objective"):
            epsilon.load_guide(guide(name, scheduler))


@pytest.mark.slow
def test_as_many_steps_as_there_are_timesteps_work(pipeline):
    # Neighbouring timesteps are equal after rounding then, on which the stock lookup of the first step fails.
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=4.0)
    calls = []
    images(
        pipeline,
        [0],
        seeds=[0],
        num_inference_steps=600,
        output_type="latent",
        callback_on_step_end=lambda *call: calls.append(call[1]),
    )
    assert calls == list(range(600))
    assert pipeline.scheduler.step_index == 600


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional_one(pipeline, monkeypatch):
    evaluated = []
    real = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda x, **k: (evaluated.append(k["class_labels"].tolist()), real(x, **k))[1]
    )
    options = {"seeds": [1, 2], "output_type": "latent"}
    images(pipeline, [0, 4], guidance_scale=1.0, **options)
    assert evaluated == [[0, 4]] * STEPS
    evaluated.clear()
    zero = images(pipeline, [0, 4], guidance_scale=0.0, **options)
    assert evaluated == [[1000, 1000]] * STEPS
    assert torch.equal(zero, images(pipeline, [None, None], **options))
    evaluated.clear()
    images(pipeline, [0, 4], guidance_scale=3.0, guidance_interval=(0.0, 0.5), **options)
    assert evaluated[0] == [0, 4]
    assert evaluated[-1] == [0, 4, 1000, 1000]


def test_time_and_class_are_embedded_once_for_each_class_of_a_batch(pipeline):
    rows = []
    pipeline.transformer.modulation.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    images(pipeline, [0, 4, 4, 0, 4], seeds=range(5), guidance_scale=2.0)
    assert rows == [3] * STEPS  # 0, 4 and "no class"


def test_guidance_approaches_the_conditional_model_from_both_sides(pipeline):
    options = {"seeds": [1, 2], "output_type": "latent"}
    exact = images(pipeline, [0, 4], guidance_scale=1.0, **options)
    for scale in (0.9999, 1.0001):
        near = images(pipeline, [0, 4], guidance_scale=scale, **options)
        torch.testing.assert_close(near, exact, rtol=1e-2, atol=1e-2)


def test_callback_sees_every_step_of_every_batch_and_may_change_the_latents(pipeline):
    calls = []

    def record(pipe, step, timestep, values):
        calls.append((pipe, step, int(timestep), values["latents"].shape[0]))

    plain = images(pipeline, [0, 1, 2], seeds=[0, 1, 2], batch_size=2, callback_on_step_end=record)
    pipeline.scheduler.set_timesteps(STEPS)
    times = pipeline.scheduler.timesteps.tolist()
    assert calls == [(pipeline, i, times[i], count) for count in (2, 1) for i in range(STEPS)]

    def zero_at_the_end(pipe, step, timestep, values):
        return {"latents": values["latents"] * (step < STEPS - 1)}

    zeroed = images(pipeline, [0, 1], seeds=[0, 1], output_type="latent", callback_on_step_end=zero_at_the_end)
    assert torch.equal(zeroed, torch.zeros(2, 3, 4, 4))
    assert torch.equal(images(pipeline, [0, 1, 2], seeds=[0, 1, 2], batch_size=2), plain)


def test_output_types_show_the_same_images(pipeline):
    options = {"seeds": [0, 1], "num_inference_steps": STEPS}
    tensor = pipeline([0, 1], output_type="pt", **options).images
    array = pipeline([0, 1], output_type="np", **options).images
    pictures = pipeline([0, 1], **options).images
    latents = pipeline([0, 1], output_type="latent", **options).images
    assert tensor.shape == (2, 3, 16, 16)
    assert 0 <= tensor.min() < tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert all(
        np.array_equal(np.asarray(p), (a * 255).round().astype("uint8")) for p, a in zip(pictures, array, strict=True)
    )
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(tensor, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    (unnamed,) = pipeline([0, 1], output_type="np", return_dict=False, **options)
    np.testing.assert_array_equal(unnamed, array)


def test_decoding_in_parts_changes_nothing(pipeline, monkeypatch):
    latents = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        whole = pipeline.decode(latents)
        monkeypatch.setattr("nsvq.pipelines.pipeline._DISTANCES", 2 * 16 * 16)
        torch.testing.assert_close(pipeline.decode(latents), whole, rtol=0, atol=2e-6)


def test_progress_bar_counts_the_steps_of_all_batches(folder, capsys):
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    images(pipeline, [0, 1, 2], seeds=[0, 1, 2], batch_size=2)
    assert f"{2 * STEPS}/{2 * STEPS}" in capsys.readouterr().err


def test_classes_are_found_by_id_name_and_synonym(pipeline):
    assert pipeline.class_ids([3, "goldfish", "tench, Tinca tinca", "Tinca Tinca", " tench"]) == [3, 1, 0, 0, 0]
    assert pipeline.class_ids("golden retriever") == [4]
    named = images(pipeline, ["golden retriever", "tench"], seeds=[0, 1])
    assert torch.equal(named, images(pipeline, [4, 0], seeds=[0, 1]))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (5, "class 5 does not exist: there are 0 (tench, Tinca tinca), 1 (goldfish), ..., 4 (golden retriever)"),
        (-1, "class -1 does not exist"),
        (1000, "class 1000 does not exist"),
        (0.5, "class 0.5 does not exist"),
        ("goldfisch", "class 'goldfisch' does not exist: did you mean 'goldfish'"),
        ("retriever", "class 'retriever' does not exist: did you mean 'golden retriever'"),
        ("zebra", "class 'zebra' does not exist"),
        ("crane", "'crane' is the name of classes 2, 3: give the id"),
    ],
)
def test_a_class_that_does_not_exist_is_told_with_those_near_it(pipeline, label, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        pipeline([0, label])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "2 images need 2 seeds"),
        ({"seeds": [1, 2], "generator": torch.Generator()}, "seeds or a generator"),
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval must be"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"num_inference_steps": 0}, "must be 1 or more"),
        ({"batch_size": 0}, "must be 1 or more"),
        ({"sampler": "ddim"}, "'ddim' is no sampler of rectified flow"),
    ],
)
def test_an_argument_without_meaning_is_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline([0, 1], **options)
    with pytest.raises(ValueError, match="empty"):
        pipeline([])


def test_what_is_pushed_to_the_hub_loads_with_stock_diffusers_and_gives_equal_images(pipeline, tmp_path, monkeypatch):
    """The network calls alone are replaced: uploading is a copy, and the local copy stands for the download."""
    repository = tmp_path / "hub" / "someone" / "pipeline"

    def upload(repo_id, folder_path, **options):
        assert repo_id == "someone/pipeline"
        shutil.copytree(folder_path, repository)
        return "done"

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *a, **o: ModelCard("---\ntags: []\n---\n# x"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    assert pipeline.push_to_hub("someone/pipeline") == "done"
    again = ClassConditionalPipeline.from_pretrained(repository)
    assert again.id2label == pipeline.id2label
    options = {"seeds": [3], "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(again([1], **options).images, pipeline([1], **options).images)
    assert isinstance(DiffusionPipeline.from_pretrained(repository).transformer, DiTTransformer2DModel)
    with pytest.raises(ValueError, match="not supported: max_shard_size; weights are always safetensors"):
        pipeline.save_pretrained(tmp_path / "other", max_shard_size="1GB")
