import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from instrumented import attempts, samples
from PIL import Image
from safetensors.torch import load_file

from nsvq.common import checkpoints
from nsvq.diffusion import train, trainer
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.objectives import DDPMConfig, FlowConfig, Objective, drop_labels, make_objective
from nsvq.diffusion.samplers import sample
from nsvq.diffusion.train import main
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.eval import generation
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.latents import train_batches

ROOT = Path(__file__).parents[2]
TINY = """
steps: 8
model: {size: tiny, depth: 2, width: 32, heads: 2}
optim: {lr: 1.0e-3, warmup_steps: 4, ema_decay: 0.5}
sampling: {images: 3, steps: 2}
run: {batch_size: 8, workers: 0, log_every: 2, sample_every: 100, checkpoint_every: 100, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Kept between tests: all of them train on the same images."""
    return tmp_path_factory.mktemp("cache") / "latents"


@pytest.fixture
def arguments(tmp_path, tokenizer_folder, image_folder, latents):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    return [
        "--config",
        config,
        "--tokenizer",
        tokenizer_folder,
        "--data",
        image_folder,
        "--data.image_size",
        16,
        "--data.holdout",
        0.05,
        "--cache",
        latents,
    ]


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "memory_gib")} for row in rows
    ]


def checkpoint(out, step):
    folder = out / "checkpoints" / f"step-{step}"
    state = torch.load(folder / "state.pt")
    moments = state["optimizers"]["model"]["state"]
    return {
        **load_file(folder / "model.safetensors"),
        **{f"ema/{i}": value for i, value in enumerate(state["ema"]["shadow_params"])},
        **{f"{i}/{name}": value for i, values in moments.items() for name, value in values.items()},
    }


def exported(out):
    return load_file(out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("conditional", ["true", "false"])
@pytest.mark.parametrize("variant", ["modern", "unet"])
def test_every_variant_trains_with_and_without_classes_into_its_pipeline(
    run_script, arguments, tmp_path, variant, conditional
):
    text = arguments[1].read_text().replace("steps: 8", "steps: 2")
    if variant == "unet":
        text = text.replace("{size: tiny, depth: 2, width: 32, heads: 2}", "{width: 32, multipliers: [1], layers: 1}")
    arguments[1].write_text(text)
    run_script(
        main,
        *arguments,
        "--out",
        tmp_path / "run",
        "--model.variant",
        variant,
        "--model.conditional",
        conditional,
        "--optim.ema_decay",
        0.0,
    )
    weights = load_file(next((tmp_path / "run" / "checkpoints" / "step-2").glob("model.safetensors")))
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    unconditional_unet = (variant, conditional) == ("unet", "false")
    assert index["_class_name"] == ("LDMPipeline" if unconditional_unet else "DiTPipeline")
    assert index.get("id2label", {}) == ({"0": "ant", "1": "bee"} if conditional == "true" else {})
    part = "unet" if unconditional_unet else "transformer"
    saved = load_file(tmp_path / "run" / "pipeline" / part / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == weights.keys()
    labels = {"class_embed.weight", "class_embedding.weight"}
    assert all(torch.equal(saved[name], value) for name, value in weights.items() if name not in labels)


def test_a_run_that_signals_stop_ends_with_the_same_weights_to_the_bit(run_instrumented, arguments, distance, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments += [*distance, "--run.accumulation", 2, "--run.log_every", 3, "--run.checkpoint_every", 3, "--out"]
    run_instrumented(train, *arguments, whole, "--run.sample_every", 1, record=tmp_path / "whole-record")
    command = [*arguments, parts]
    for position, workers in ((12, 0), (33, 2)):  # in the second micro-batch of step 2 and the first of step 5
        with pytest.raises(Stopped, match=f"SIGTERM at step {position // 8 + 1}; the same command") as stopped:
            run_instrumented(
                train, *command, "--run.workers", workers, record=tmp_path / "parts-record", signal_at=position
            )
        assert stopped.value.exit_code == 143
        assert not (parts / "pipeline").exists()
    run_instrumented(train, *command, record=tmp_path / "parts-record")
    assert same(checkpoint(parts, 8), checkpoint(whole, 8))
    assert same(exported(parts), exported(whole))
    # Step 2 had nothing to tell but a distance, which gave way to the signal.
    assert metrics(parts) == [row for row in metrics(whole) if row["step"] != 2]
    assert ["fd_tiny" in row for row in metrics(whole)] == [True, False, True, True, True]  # steps 2, 3, 4, 6 and 8
    assert samples(tmp_path / "whole-record") == samples(tmp_path / "parts-record")
    assert [first for first, _ in attempts(tmp_path / "parts-record")] == [0, 16, 40]


def test_samples_and_distances_change_no_weight(run_script, arguments, distance, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "without", "--steps", 4)
    run_script(main, *arguments, "--out", tmp_path / "with", "--steps", 4, "--run.sample_every", 1, *distance)
    assert same(exported(tmp_path / "with"), exported(tmp_path / "without"))


def test_the_distance_in_training_is_that_of_the_evaluation(
    run_script, arguments, distance, image_folder, tiny_extractor, tmp_path
):
    out, result = tmp_path / "out", tmp_path / "result.json"
    run_script(main, *arguments, "--out", out, *distance, "--sampling.fd_guidance_scale", 100)
    run_script(
        generation.main,
        "--pipeline",
        out / "pipeline",
        "--data",
        image_folder,
        "--data.holdout",
        0.05,
        "--features",
        tiny_extractor,
        "--metrics",
        "fid",
        "--samples",
        20,
        "--steps",
        2,
        "--guidance_scale",
        100,
        "--workers",
        0,
        "--cache",
        tmp_path / "others",
        "--output",
        result,
    )
    measured = json.loads(result.read_text())["metrics"]["fd_tiny"]
    assert metrics(out)[-1]["fd_tiny"] == pytest.approx(measured, rel=1e-6)
    assert metrics(out)[-1]["fd_tiny"] != metrics(out)[0]["fd_tiny"]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_ddpm_on_quantized_latents_of_several_crops_is_trained_and_exported(
    run_script, arguments, prediction, tmp_path
):
    arguments[arguments.index("--cache") + 1] = tmp_path / "latents"
    out = tmp_path / "out"
    run_script(
        main,
        *arguments,
        "--out",
        out,
        "--steps",
        2,
        "--objective.name",
        "ddpm",
        "--objective.prediction",
        prediction,
        "--latents",
        "quantized",
        "--cache_crops",
        2,
    )
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.scheduler.config.prediction_type == {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    card = (out / "pipeline" / "README.md").read_text()
    assert "Objective: DDPM of 1000 steps" in card
    assert "ADM's centre crop and 1 of its random crops, and the mirror image of each" in card
    assert "Latents: quantized" in card


def test_a_finished_run_that_is_started_again_exports_again(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 2)
    before, log = exported(tmp_path / "out"), metrics(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pipeline")
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 2)
    assert same(exported(tmp_path / "out"), before)
    assert metrics(tmp_path / "out") == log


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_asked_for_them_at_once(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "whole", "--steps", 4)
    for steps, checkpointing in ((2, False), (4, True)):  # which changes no number either
        how = ("--steps", steps, "--model.gradient_checkpointing", checkpointing)
        run_script(main, *arguments, "--out", tmp_path / "parts", *how)
    assert same(exported(tmp_path / "parts"), exported(tmp_path / "whole"))
    assert same(checkpoint(tmp_path / "parts", 4), checkpoint(tmp_path / "whole", 4))
    with pytest.raises(UsageError, match="trained for 4 steps: --steps 3 is too few"):
        run_script(main, *arguments, "--out", tmp_path / "parts", "--steps", 3)


def test_micro_batches_change_no_number(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "one", "--steps", 4)
    run_script(main, *arguments, "--out", tmp_path / "four", "--steps", 4, "--run.accumulation", 4)
    one, four = exported(tmp_path / "one"), exported(tmp_path / "four")
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_ranks_are_one_rank_of_the_double_batch_also_from_two_to_one_and_back(
    run_instrumented, run_two_ranks, arguments, distance, tmp_path
):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    arguments += distance
    run_instrumented(train, *arguments, "--out", alone, record=tmp_path / "alone-record", nan_at=[15])
    how = {"record": tmp_path / "shared-record", "nan_at": [15]}  # of the second rank, in step 2
    arguments += ["--out", shared]
    code, error = run_two_ranks("diffusion", *arguments, **how, signal_at=22)  # the second rank, in step 3
    assert "SIGTERM at step 3" in error
    assert code != 0
    with pytest.raises(Stopped, match="at step 5"):
        run_instrumented(train, *arguments, **how, signal_at=32)
    code, error = run_two_ranks("diffusion", *arguments, **how)
    assert code == 0, error
    assert samples(tmp_path / "alone-record") == samples(tmp_path / "shared-record")
    torch.testing.assert_close(exported(shared), exported(alone), rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(alone), metrics(shared), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert metrics(shared)[-1]["skipped_steps"] == 1


def test_networks_that_fsdp_splits_train_as_whole_ones_do_also_from_one_to_the_other_and_back(
    run_instrumented, run_two_ranks, arguments, distance, tmp_path
):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    arguments += [*distance, "--export_every", 4]
    run_instrumented(train, *arguments, "--out", alone, record=tmp_path / "record", nan_at=[15])
    how = {"record": tmp_path / "record", "nan_at": [15], "shard": True}
    arguments += ["--out", shared]
    code, error = run_two_ranks("diffusion", *arguments, **how, signal_at=22)
    assert "SIGTERM at step 3" in error
    assert code != 0
    with pytest.raises(Stopped, match="at step 5"):
        run_instrumented(train, *arguments, record=tmp_path / "record", signal_at=32)
    code, error = run_two_ranks("diffusion", *arguments, **how)
    assert code == 0, error
    torch.testing.assert_close(exported(shared), exported(alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(checkpoint(shared, 8), checkpoint(alone, 8), rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(alone), metrics(shared), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (shared / "samples" / "step-8.png").is_file()
    assert (shared / "pipelines" / "step-4" / "model_index.json").is_file()


def test_a_full_disk_keeps_the_run_alive_and_it_writes_again_when_there_is_room(
    run_script, arguments, small_disk, monkeypatch, capsys
):
    ballast, steps, real = small_disk / "ballast", itertools.count(1), Objective.losses

    def losses(*inputs):
        step = next(steps)
        if step == 3:
            with contextlib.suppress(OSError), open(ballast, "wb") as file:
                file.write(bytes(2**20))
        if step == 6:
            ballast.unlink()
        return real(*inputs)

    monkeypatch.setattr(Objective, "losses", losses)
    out = small_disk / "out"
    run_script(
        main,
        *arguments,
        "--out",
        out,
        "--run.checkpoint_every",
        2,
        "--run.log_every",
        1,
        "--run.keep_checkpoints",
        1,
        "--model.depth",
        1,
        "--model.width",
        16,
    )
    told = capsys.readouterr().err
    for step in (4, 5):  # as planned, and tried again
        assert f"warning: no checkpoint at step {step} (" in told
    assert checkpoints.newest_good(out / "checkpoints")[0].name == "step-8"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-8"]
    assert [row["step"] for row in metrics(out)] == list(range(1, 9))


def test_metrics_are_means_over_the_interval_with_warmup_and_quartiles(run_script, arguments, tmp_path, monkeypatch):
    recorded, real = [], Objective.losses

    def record(objective, network, latents, noise, levels, labels):
        losses = real(objective, network, latents, noise, levels, labels)
        recorded.append((losses.detach(), levels))
        return losses

    monkeypatch.setattr(Objective, "losses", record)
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 6)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["samples_seen"] for row in rows] == [16, 32, 48]
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3])
    for i, row in enumerate(rows):
        losses, levels = (torch.cat(parts) for parts in zip(*recorded[2 * i : 2 * i + 2], strict=True))
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert row["grad_norm"] > 0
        for q in range(4):
            inside = (levels >= q / 4) & (levels < (q + 1) / 4)
            mean = row.get(f"loss_level_q{q + 1}")
            assert (mean is not None) == bool(inside.any())
            if mean is not None:
                assert mean == pytest.approx(losses[inside].mean().item(), rel=1e-5)


def test_pictures_and_pipeline_come_from_the_averaged_weights(run_script, arguments, tmp_path, monkeypatch):
    drawn = []
    real = trainer.sample
    monkeypatch.setattr(
        trainer, "sample", lambda model, *a, **k: (drawn.append(model.proj_out.weight.clone()), real(model, *a, **k))[1]
    )
    run_script(main, *arguments, "--out", tmp_path / "out", "--steps", 4, "--run.sample_every", 2)
    state = checkpoint(tmp_path / "out", 4)
    names = [name for name, _ in DiT(4, 3, 2, depth=2, width=32, heads=2).named_parameters()]
    averaged = state[f"ema/{names.index('proj_out.weight')}"]
    assert len(drawn) == 2
    assert torch.equal(drawn[-1], averaged)
    assert torch.equal(exported(tmp_path / "out")["proj_out_2.weight"], averaged)
    assert not torch.equal(averaged, state["proj_out.weight"])
    assert Image.open(tmp_path / "out" / "samples" / "step-4.png").size == (2 * 18 + 2, 2 * 18 + 2)


def test_earlier_pipelines_are_kept_with_their_averaged_weights_and_guide_the_last(run_script, arguments, tmp_path):
    out = tmp_path / "out"
    run_script(main, *arguments, "--out", out, "--steps", 4, "--run.checkpoint_every", 2, "--export_every", 2)
    names = [name for name, _ in DiT(4, 3, 2, depth=2, width=32, heads=2).named_parameters()]
    for step in (2, 4):
        kept = load_file(out / "pipelines" / f"step-{step}" / "transformer" / "diffusion_pytorch_model.safetensors")
        averaged = checkpoint(out, step)[f"ema/{names.index('proj_out.weight')}"]
        assert torch.equal(kept["proj_out_2.weight"], averaged)
    assert same(exported(out), kept)
    run_script(main, *arguments, "--out", tmp_path / "without", "--steps", 4)
    assert same(exported(tmp_path / "without"), kept)
    ClassConditionalPipeline.from_pretrained(out / "pipeline").load_guide(out / "pipelines" / "step-2")


def test_a_batch_that_is_not_a_number_changes_nothing_but_the_count_of_skipped_steps(
    run_instrumented, arguments, tmp_path
):
    out, in_step_3 = tmp_path / "out", [21]  # in its second micro-batch
    run_instrumented(
        train,
        *arguments,
        "--out",
        out,
        "--run.accumulation",
        2,
        "--run.checkpoint_every",
        1,
        "--run.log_every",
        1,
        record=tmp_path / "record",
        nan_at=in_step_3,
    )
    assert same(checkpoint(out, 2), checkpoint(out, 3))
    assert not same(checkpoint(out, 3), checkpoint(out, 4))
    assert [row["skipped_steps"] for row in metrics(out)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert ["loss" in row for row in metrics(out)] == [True, True, False, True, True, True, True, True]


def test_many_such_batches_in_a_row_end_the_run_with_the_ids_and_a_dump(run_instrumented, arguments, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"not finite in 2 steps in a row, up to step 6") as error:
        run_instrumented(
            train,
            *arguments,
            "--out",
            out,
            "--run.skip_limit",
            2,
            "--run.checkpoint_every",
            1,
            record=tmp_path / "record",
            nan_at=[16, 32, 40],
        )
    ids = [id for position, id in samples(tmp_path / "record").items() if 40 <= position < 48]
    assert ", ".join(ids) in str(error.value)
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == "step-5"
    (batch,) = torch.load(out / "failed" / "step-6-batches-0.pt", weights_only=True)
    assert batch["id"] == ids
    assert batch["latents"].isnan().any()
    assert (
        checkpoints.read(out / "failed" / "step-6")[0]["model"].keys()
        == load_file(out / "checkpoints" / "step-5" / "model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (["--tokenizer", "nowhere/tokenizer"], UserError, "there is no tokenizer at nowhere/tokenizer: train one"),
        (["--model.width", "2"], UsageError, "model.width"),
        (["--model.patch_size", "3"], UsageError, "patches of side 3"),
        (["--run.batch_size", "9", "--run.accumulation", "2"], UsageError, "must be a multiple of ranks"),
        (["--objective.name", "ddpm", "--sampling.steps", "30"], UsageError, "sampling.steps = 30 must divide 1000"),
        (["--objective.name", "ddpm", "--objective.shift", "2"], UsageError, "objective.shift is a key of another"),
        (["--model.sizes", "S"], UsageError, "did you mean model.size"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(run_script, arguments, tmp_path, change, error, text):
    for key in change[::2]:
        if key in arguments:
            del arguments[arguments.index(key) : arguments.index(key) + 2]
    with pytest.raises(UserError) as raised:
        run_script(main, *arguments, "--out", tmp_path / "out", *change)
    assert type(raised.value) is error
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_tokenizer_of_ours_of_images_of_another_size_ends_a_run_before_it_encodes(
    run_script, arguments, tmp_path, tokenizer_folder, monkeypatch
):
    encoding = Exception("it goes on")
    monkeypatch.setattr(train, "open_cache", lambda *_, **__: (_ for _ in ()).throw(encoding))
    arguments[arguments.index("--data.image_size") + 1] = 32
    with pytest.raises(Exception, match="it goes on"):  # others' tokenizers are made for all sizes
        run_script(main, *arguments, "--out", tmp_path / "out")
    shutil.copytree(tokenizer_folder, tmp_path / "ours")
    (tmp_path / "ours" / "nsvq.json").write_text("{}")
    arguments[arguments.index("--tokenizer") + 1] = tmp_path / "ours"
    told = r"trained on images of 16 pixels, and data\.image_size is 32: give --data\.image_size 16"
    with pytest.raises(UsageError, match=told):
        run_script(main, *arguments, "--out", tmp_path / "out")


def test_latents_of_another_scale_are_said_with_the_factor_that_mends_them(
    run_script, arguments, tmp_path, tokenizer_folder, capsys
):
    config = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer") / "config.json"
    arguments[arguments.index("--tokenizer") + 1] = config.parent
    factor = 10.0
    for name, said in (("far", True), ("mended", False)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": factor}))
        arguments[arguments.index("--cache") + 1] = tmp_path / name / "latents"
        run_script(main, *arguments, "--out", tmp_path / name, "--steps", 1)
        std = json.loads((tmp_path / name / "latents" / "manifest.json").read_text())["overall_std"]
        told = re.search(
            r"warning: the latents' standard deviation is (\S+), .* to (\S+) \(it is 10\)", capsys.readouterr().err
        )
        assert bool(told) == said
        if told:
            assert float(told[1]) == pytest.approx(std, rel=0.01)
            factor = float(told[2])
    assert std == pytest.approx(1, rel=0.01)


def test_a_network_trains_on_the_latents_of_an_autoencoder_and_samples_in_the_stock_pipeline(
    run_script, arguments, tmp_path
):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    kl = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.3)
    kl.save_pretrained(tmp_path / "kl")
    for key, value in {"--tokenizer": tmp_path / "kl", "--cache": tmp_path / "cache"}.items():
        arguments[arguments.index(key) + 1] = value
    with pytest.raises(UsageError, match="an AutoencoderKL has no codebook: use latents: continuous"):
        run_script(main, *arguments, "--out", tmp_path / "quantized", "--latents", "quantized")
    run_script(main, *arguments, "--out", tmp_path / "out")
    folder = tmp_path / "out" / "pipeline"
    own = ClassConditionalPipeline.from_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock.vae) is AutoencoderKL
    how = {"guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "pt"}
    images = stock([0, 1], generator=[torch.Generator().manual_seed(i) for i in (3, 4)], **how).images
    torch.testing.assert_close(own([0, 1], seeds=[3, 4], **how).images, images, rtol=0, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "(`AutoencoderKL`, without a codebook)" in card
    assert "quantize" not in card


@pytest.mark.parametrize(("folder", "what"), [("", "no labels"), ("ant", "one class, 'ant'")])
def test_a_network_that_is_to_learn_classes_ends_without_them_before_it_encodes(
    run_script, arguments, tmp_path, image_folder, monkeypatch, capsys, folder, what
):
    shutil.copytree(image_folder / "ant", tmp_path / "images" / folder)
    monkeypatch.setattr(train, "open_cache", None)
    arguments[arguments.index("--data") + 1] = tmp_path / "images"
    with pytest.raises(UsageError, match=f"has {what}, and the model is to learn classes") as caught:
        run_script(main, *arguments, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "data: trains on " in capsys.readouterr().out


class TwoPoints:
    """A cache of two classes, all of whose latents are -1 or +1."""

    shape, views = (2, 4, 4), 1

    def __len__(self):
        return 64

    def read(self, index, view):
        return torch.full(self.shape, 2.0 * (index % 2) - 1), index % 2


@pytest.mark.parametrize("config", [FlowConfig(), DDPMConfig()], ids=["flow", "ddpm"])
@pytest.mark.slow
def test_a_trained_network_samples_the_class_that_was_asked_for(config):
    objective = make_objective(config, TwoPoints.shape)
    model = DiT(sample_size=4, in_channels=2, num_classes=2, patch_size=2, depth=2, width=32, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batches = train_batches(TwoPoints(), batch_size=32, seed=0)
    for batch in itertools.islice(batches, 600):
        levels = objective.levels(batch["time_normal"])
        labels = drop_labels(batch["labels"], batch["drop_uniform"], 0.2, model.null_class)
        objective.losses(model, batch["latents"], batch["noise"], levels, labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    labels = torch.tensor([0, 1] * 32)
    got = sample(model, objective.scheduler(), torch.randn(64, 2, 4, 4), labels, model.null_class, steps=20)
    assert (got - (2.0 * labels.view(-1, 1, 1, 1) - 1)).abs().median() < 0.3
    assert (got.mean((1, 2, 3)).sign() == 2 * labels - 1).float().mean() > 0.75  # by chance 0.5 +- 0.06
    unlabelled = sample(
        model,
        objective.scheduler(),
        torch.randn(256, 2, 4, 4),
        torch.zeros(256, dtype=torch.int64),
        2,
        steps=20,
        guidance_scale=0.0,
    )
    signs = unlabelled.mean((1, 2, 3)).sign()
    assert 32 < (signs > 0).sum() < 224, signs.sum()
