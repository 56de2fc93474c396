import json
import shutil
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from instrumented import attempts, samples
from PIL import Image
from safetensors.torch import load_file

from nsvq.autoregressive import train
from nsvq.autoregressive.config import TrainConfig
from nsvq.autoregressive.model import NextToken, make_llama
from nsvq.autoregressive.train import main
from nsvq.autoregressive.trainer import AutoregressiveTrainer
from nsvq.common import config as configs
from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.errors import Stopped, UsageError, UserError
from nsvq.eval import generation
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.pretrained import Tokenizer

TINY = """
schedule: {steps: 8, warmup_steps: 2}
model: {size: tiny, depth: 2, width: 32, heads: 2}
optim: {lr: 1.0e-3, ema_decay: 0.5}
sampling: {images: 3}
held_out: {every: 4}
run: {batch_size: 8, workers: 0, log_every: 2, sample_every: 100, checkpoint_every: 100, keep_checkpoints: 100,
      trackers: [], mixed_precision: "no"}
"""


@pytest.fixture(scope="session")
def codes(tmp_path_factory):
    """Kept between tests: all of them train on the same images."""
    return tmp_path_factory.mktemp("cache") / "codes"


@pytest.fixture
def arguments(tmp_path, tokenizer_folder, image_folder, codes):
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
        codes,
    ]


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in rows]


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
    return load_file(out / "pipeline" / "transformer" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_earlier_pipelines_are_kept_with_their_averaged_weights(run_script, arguments, tmp_path):
    out = tmp_path / "out"
    run_script(main, *arguments, "--out", out, "--export_every", 4, "--run.checkpoint_every", 4)
    averaged = [value for name, value in checkpoint(out, 4).items() if name.startswith("ema/")]
    kept = load_file(out / "pipelines" / "step-4" / "transformer" / "model.safetensors")
    assert sorted(map(_sum, kept.values())) == sorted(map(_sum, averaged))
    assert not same(exported(out), kept)


def _sum(tensor):
    return float(tensor.double().sum())


@pytest.mark.parametrize("tied", [False, True])
def test_teacher_forced_logits_of_the_exported_folder_are_the_trainers(run_script, arguments, tmp_path, tied):
    out = tmp_path / "out"
    run_script(main, *arguments, "--out", out, "--model.tie_embeddings", tied, "--run.sample_every", 4)
    config = configs.validate(TrainConfig, configs.read_yaml(out / "config.yaml")["config"])
    llama = make_llama(config.model, codes=32, classes=2, tokens=16)
    model, state = NextToken(llama, 32, config.model.dropout).eval(), checkpoint(out, 8)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(state[f"ema/{i}"])
    ids, codes = torch.tensor([32, 33, 34]), torch.randint(32, (3, 16))
    sequence = torch.cat([ids[:, None], codes], dim=1)
    pipeline = ClassConditionalPipeline.from_pretrained(out / "pipeline")
    logits = pipeline.transformer(sequence).logits
    torch.testing.assert_close(logits, llama(sequence).logits)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1, :32].flatten(0, 1), codes.flatten())
    torch.testing.assert_close(model(ids, codes), expected)
    model.load_state_dict(load_file(out / "checkpoints" / "step-8" / "model.safetensors"))
    assert not torch.equal(logits, llama(sequence).logits)  # the averages are not the live weights
    assert pipeline.id2label == {0: "ant", 1: "bee"}
    # Pictures are those of the averages too, without dropout.
    drawn = pipeline([0, 0, 1], seeds=[0, 1, 2], guidance_scale=2.0, output_type="np").images
    shown = np.asarray(Image.open(out / "samples" / "step-8.png"))
    assert shown.shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    for i, image in enumerate(drawn):
        tile = shown[2 + 18 * (i // 2) :, 2 + 18 * (i % 2) :][:16, :16]
        assert np.abs(tile - 255 * image).max() <= 1.5
    assert (out / "samples" / "step-4.png").is_file()


def test_bits_on_held_out_codes_are_those_of_a_dense_float64_computation(run_script, arguments, tmp_path, image_folder):
    out = tmp_path / "out"
    arguments[arguments.index(0.05)], arguments[arguments.index("--cache") + 1] = 0.2, tmp_path / "codes"
    run_script(main, *arguments, "--out", out, "--run.batch_size", 2)
    pipeline = ClassConditionalPipeline.from_pretrained(out / "pipeline")
    tokenizer, bits = Tokenizer(pipeline.vae), []
    data = DataConfig(source=str(image_folder), image_size=16, holdout=0.2)
    for batch in eval_batches(data, "test", batch_size=1):
        codes = tokenizer.encode(batch["image"]).flatten(1)
        sequence = torch.cat([32 + batch["label"][:, None], codes], 1)
        scores = pipeline.transformer.double()(sequence).logits[0, :-1, :32].log_softmax(1)
        bits.append(-scores[torch.arange(16), codes[0]].sum().item() / np.log(2))
    assert 4 < len(bits) < 16
    measured = {row["step"]: row["held_out_bits"] for row in metrics(out) if "held_out_bits" in row}
    assert list(measured) == [4, 8]
    assert measured[8] == pytest.approx(np.mean(bits), rel=1e-6)
    assert measured[8] != measured[4]


def test_the_distance_in_training_is_that_of_the_evaluation(
    run_script, arguments, distance, image_folder, tiny_extractor, tmp_path, monkeypatch
):
    out, result = tmp_path / "out", tmp_path / "result.json"
    run_script(main, *arguments, "--out", out, *distance, "--sampling.fd_guidance_scale", 3, "--sampling.top_k", 9)
    options = ["--pipeline", out / "pipeline", "--data", image_folder, "--data.holdout", 0.05, "--workers", 0]
    options += ["--features", tiny_extractor, "--metrics", "fid", "--samples", 20, "--cache", tmp_path / "others"]
    run_script(generation.main, *options, "--guidance_scale", 3, "--top_k", 9, "--output", result)
    found = [row["fd_tiny"] for row in metrics(out) if "fd_tiny" in row]
    assert found[-1] == pytest.approx(json.loads(result.read_text())["metrics"]["fd_tiny"], rel=1e-6)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run_script(generation.main, *options, "--guidance_scale", 3, "--top_k", 9, "--compile", "true", "--output", result)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert found[-1] == pytest.approx(json.loads(result.read_text())["metrics"]["fd_tiny"], rel=1e-6)
    assert len(set(found)) == 4  # steps 2, 4, 6, 8


def test_a_run_that_a_signal_ended_goes_on_bit_exactly(run_instrumented, arguments, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_instrumented(train, *arguments, "--out", whole, record=tmp_path / "whole-record")
    how = {"record": tmp_path / "parts-record", "signal_at": 28}
    with pytest.raises(Stopped, match="SIGTERM at step 4"):
        run_instrumented(train, *arguments, "--out", parts, **how)
    run_instrumented(train, *arguments, "--out", parts, record=how["record"])
    assert [start for start, _ in attempts(how["record"])] == [0, 32]
    assert samples(how["record"]) == samples(tmp_path / "whole-record")
    assert same(checkpoint(parts, 8), checkpoint(whole, 8))
    assert same(exported(parts), exported(whole))
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize(
    "changed",
    [
        ["--model.gradient_checkpointing", True, "--held_out.every", 2, "--held_out.images", 1],
        ["--model.compile", True],
    ],
)
def test_what_changes_no_number_may_change_when_a_run_goes_on(
    run_instrumented, arguments, tmp_path, monkeypatch, changed
):
    compiled = []

    def compile(module, compile=torch.nn.Module.compile):
        compiled.append(type(module).__name__)
        compile(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    whole, parts, how = tmp_path / "whole", tmp_path / "parts", {"record": tmp_path / "record"}
    run_instrumented(train, *arguments, "--out", whole, **how)
    with pytest.raises(Stopped, match="SIGTERM at step 4"):
        run_instrumented(train, *arguments, "--out", parts, **how, signal_at=28)
    run_instrumented(train, *arguments, "--out", parts, *changed, **how)
    assert compiled == ["LlamaDecoderLayer"] * 2 * ("--model.compile" in changed)
    torch.testing.assert_close(checkpoint(parts, 8), checkpoint(whole, 8), rtol=1e-4, atol=1e-6)
    measured = {row["step"]: row["held_out_bits"] for row in metrics(parts) if "held_out_bits" in row}
    assert list(measured) == ([4, 8] if compiled else [4, 6, 8])


def test_a_tokenizer_of_ours_of_images_of_another_size_ends_a_run_before_it_encodes(
    run_script, arguments, tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(train, "open_cache", None)
    shutil.copytree(tokenizer_folder, tmp_path / "ours")
    (tmp_path / "ours" / "nsvq.json").write_text("{}")
    for key, value in {"--tokenizer": tmp_path / "ours", "--data.image_size": 32}.items():
        arguments[arguments.index(key) + 1] = value
    with pytest.raises(UsageError, match=r"trained on images of 16 pixels, and data\.image_size is 32"):
        run_script(main, *arguments, "--out", tmp_path / "out")


def test_without_dropout_micro_batches_change_no_number(run_script, arguments, tmp_path):
    for name, count in (("one", 1), ("four", 4)):
        run_script(main, *arguments, "--out", tmp_path / name, "--model.dropout", 0.0, "--run.accumulation", count)
    torch.testing.assert_close(exported(tmp_path / "one"), exported(tmp_path / "four"), rtol=1e-4, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(("shard", "tied"), [(False, True), (True, False)])
def test_two_ranks_are_one_rank_of_the_double_batch_also_where_fsdp_splits_the_network(
    run_script, run_two_ranks, arguments, tmp_path, shard, tied
):
    arguments += ["--model.dropout", 0.0, "--model.tie_embeddings", tied]
    run_script(main, *arguments, "--out", tmp_path / "alone")
    code, error = run_two_ranks(
        "autoregressive", *arguments, "--out", tmp_path / "shared", shard=shard, record=tmp_path / "record"
    )
    assert code == 0, error
    torch.testing.assert_close(exported(tmp_path / "shared"), exported(tmp_path / "alone"), rtol=1e-4, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "shared"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert (tmp_path / "shared" / "samples" / "step-8.png").is_file()


@pytest.mark.parametrize("images", [1, 2])
def test_a_rank_without_a_held_out_image_adds_nothing(images):
    trainer, ranks = object.__new__(AutoregressiveTrainer), 4
    trainer.accelerator = SimpleNamespace(process_index=2, num_processes=ranks, reduce=lambda total, _: total)
    trainer.held_out, trainer.micro_batch = [None] * images, 8
    model = TrainConfig(model={"size": "tiny", "depth": 1, "width": 32, "heads": 2}).model
    trainer.drawn, trainer.codes, trainer.device = make_llama(model, 4, 2, 9), 4, "cpu"
    assert trainer.held_out_bits() == 0


def test_the_rate_rises_stays_and_falls_to_its_hundredth(monkeypatch):
    trainer = object.__new__(AutoregressiveTrainer)
    trainer.config = TrainConfig(schedule={"steps": 101, "warmup_steps": 2, "hold": 0.1})
    trainer.run = type("Run", (), {})()
    rates = []
    for trainer.run.step in range(101):
        rates.append(trainer.rate_factor())
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:11] == [1.0] * 9
    assert rates[55] == pytest.approx(1 - 0.99 * 0.5)
    assert rates[100] == pytest.approx(0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]


@pytest.mark.parametrize(("share", "expected"), [(0.0, {32, 33}), (1.0, {34})])
def test_classes_are_dropped_in_the_share_asked_for(run_script, arguments, tmp_path, monkeypatch, share, expected):
    seen, real = set(), NextToken.forward

    def spy(self, ids, codes):
        seen.update(ids.tolist() if self.training else ())
        return real(self, ids, codes)

    monkeypatch.setattr(NextToken, "forward", spy)
    run_script(main, *arguments, "--out", tmp_path / "out", "--model.class_dropout", share)
    assert seen == expected


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (["--tokenizer", "nowhere/tokenizer"], UserError, "there is no tokenizer at nowhere/tokenizer: train one"),
        (["--model.width", "36", "--model.heads", "4"], UsageError, "width 36 must be a multiple of 2 x heads"),
        (["--steps", "3"], UsageError, "unknown key --steps"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(run_script, arguments, tmp_path, change, error, text):
    if change[0] in arguments:
        del arguments[arguments.index(change[0]) : arguments.index(change[0]) + 2]
    with pytest.raises(UserError) as raised:
        run_script(main, *arguments, "--out", tmp_path / "out", *change)
    assert type(raised.value) is error
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_number_of_steps_is_another_run(run_script, arguments, tmp_path):
    run_script(main, *arguments, "--out", tmp_path / "out", "--schedule.steps", 2)
    with pytest.raises(UsageError, match="holds a run of another config"):
        run_script(main, *arguments, "--out", tmp_path / "out", "--schedule.steps", 4)
