import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nsvq.common.config import parse, read_yaml, validate
from nsvq.data.config import DataConfig
from nsvq.errors import UsageError, UserError
from nsvq.eval.config import ReconstructionConfig
from nsvq.tokenizer.config import TrainConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
evidence, evidence_study, evidence_page = map(importlib.import_module, ("evidence", "evidence_study", "evidence_page"))
sys.path.remove(str(ROOT / "benchmarks"))
STUDIES = [p for p in sorted((ROOT / "configs" / "evidence").glob("*.yaml")) if "runs" in read_yaml(p)]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_run_of_every_study_is_a_valid_training_config_of_its_own(path):
    study = evidence_study.read_study(path)
    configs = [evidence_study.training_config(study, name, 5, DataConfig(source="synthetic")) for name in study.runs]
    assert all(validate(TrainConfig, values).run.seed == 5 for values in configs)
    for generator in study.generators.values():
        values = evidence_study.generator_config(generator, 5, DataConfig(source="here"), "x.py")
        assert validate(evidence_study.STAGES[generator.stage], values).run.seed == 5
    assert len({json.dumps(values) for values in configs}) == len(configs)


def test_a_wrong_study_is_told_by_name():
    base = read_yaml(ROOT / "configs" / "evidence" / "ratio.yaml")
    with pytest.raises(UsageError, match="'nobody' is not one of the runs"):
        validate(evidence_study.Study, base | {"against": "nobody"})
    generator = {"stage": "diffusion", "config": "x.yaml", "samples": {"sampels": 10}}
    with pytest.raises(UsageError, match="sampels"):
        validate(evidence_study.Study, base | {"generators": {"DiT": generator}})
    with pytest.raises(UsageError, match="unknown: psnrr"):
        validate(evidence_study.Study, base | {"columns": ["psnrr"]})


def test_a_record_is_named_after_what_decides_its_numbers():
    values = {"data": {"source": "here", "image_size": 64}, "optim": {"lr": 1e-3}}
    key = evidence_study.record_key(values, "photos", [])
    assert key == evidence_study.record_key(values | {"data": {"source": "there", "image_size": 64}}, "photos", [])
    others = [(values, "others", []), (values, "photos", ["--limit", "9"]), (values | {"optim": {}}, "photos", [])]
    assert len({key, *(evidence_study.record_key(*other) for other in others)}) == 4


def test_the_table_holds_means_and_spread_and_the_comparison_is_seed_by_seed():
    def run(psnr, error, distance):
        return {"psnr": psnr, "relative_error": error, "rfd_x": distance}

    runs = {
        "vq": {0: run(20.0, 0.2, 10.0), 1: run(22.0, 0.4, 20.0)},
        "nsvq": {0: run(21.0, 0.1, 9.0), 1: run(25.0, 0.1, 16.0)},
        "late": {7: run(30.0, 0.1, 1.0)},
    }
    lines = evidence_page.table({n: list(r.values()) for n, r in runs.items()}, ["psnr", "rf"]).splitlines()
    assert lines[0] == "| run | seeds | PSNR, dB | FD |"
    assert lines[2] == "| vq | 2 | 21.00 ± 1.41 | 15.0 ± 7.1 |"
    assert lines[4] == "| late | 1 | 30.00 | 1.0 |"
    lines = evidence_page.comparison(runs, "vq", dict.fromkeys(runs, "vq")).splitlines()
    assert lines[2:] == ["| nsvq | 2 | +2.00 ± 1.41 | 0.38x ± 0.18x | 0.85x ± 0.07x |"]


def test_drift_is_taken_from_stage_1_and_utilization_from_its_lowest_epoch():
    lines = [
        {"phase": "stage1", "drift_rms": 9.0},
        {"phase": "stage1", "drift_rms": 1.0, "utilization": 0.5},
        {"phase": "stage1", "drift_rms": 3.0, "utilization": 0.25},
        {"phase": "stage1", "drift_rms": 2.0},
        {"phase": "stage2", "drift_rms": 0.0, "utilization": 0.75},
    ]
    lines = [line | {"images_per_second": 8 * i, "memory_gib": i, "latent_rms": 1} for i, line in enumerate(lines)]
    found = evidence.training_metrics(lines, 16)
    assert (found["drift_rms"], found["lowest_utilization"]) == (2.5, 0.25)
    assert (found["step_ms"], found["memory_gib"]) == (500, 4)


def test_a_page_says_which_runs_were_made_on_which_machine(tmp_path):
    study = evidence_study.Study(title="t", question="q", base="b.yaml", seeds=[0, 1], runs={"vq": {}, "nsvq": {}})
    metrics = {"psnr": 1.0, "relative_error": 1.0, "utilization": 1.0}
    old, new = ({"metrics": metrics, "curve": [], "code": "1", "machine": name} for name in ("fast", "slow"))
    evidence_page.write_page(study, {"vq": {0: old}, "nsvq": {0: old, 1: new}}, ["x"], tmp_path / "p.md")
    page = (tmp_path / "p.md").read_text()
    assert "- vq: `as the base` on machine 1\n- nsvq: `as the base` on machine 1, 2\n" in page
    assert "Machine: (1) fast; (2) slow." in page
    evidence_page.write_page(study, {"vq": {0: old}, "nsvq": {}}, ["x"], tmp_path / "p.md")
    assert "on machine" not in (tmp_path / "p.md").read_text()


def test_a_run_is_measured_on_the_splits_and_columns_that_it_was_trained_on():
    data = DataConfig(source="here", holdout=0.5, test_split="val", flip=False, image_size=64)
    study = evidence_study.read_study(STUDIES[0])
    values = evidence_study.training_config(study, next(iter(study.runs)), 0, data)
    words = [*map(str, evidence.same_data(values)), "--tokenizer", "x", "--output", "x.json"]
    measured = parse(ReconstructionConfig, words).data
    assert measured.model_copy(update={"image_size": 64}) == data
    assert "image_size" not in measured.model_fields_set  # it is the tokenizer's


def test_a_script_that_fails_is_told_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"vq: false .*tokenizer/train\.py .* ended with 1; see .*\.log"):
        evidence.train_and_measure("vq", {"data": {"source": "synthetic"}}, tmp_path / "run", [], "false", {})


def test_a_study_of_generation_trains_a_tokenizer_once_for_all_generators_on_it(tmp_path, monkeypatch):
    """The scripts are played: each writes what the real one would leave."""
    samples = {"samples": {"guidance_scale": [1, 3]}}
    study = {
        "title": "T",
        "question": "Q",
        "base": str(ROOT / "configs/evidence/synthetic32.yaml"),
        "against": "a",
        "generators": {
            "DiT": {"stage": "diffusion", "config": str(ROOT / "configs/evidence/dit64.yaml")} | samples,
            "Llama": {"stage": "autoregressive", "config": str(ROOT / "configs/evidence/ar64.yaml")}
            | samples
            | {"common": {"optim": {"lr": 0.25}}},
        },
        "columns": ["fd_at_", "accuracy_at_", "held_out_bits"],
        "curves": ["fd"],
        "runs": {"a": {}, "b": {"optim": {"lr": 0.5}}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    calls = []

    def play(name, script, options, folder, *how):
        calls.append((name, script))
        trained = read_yaml(folder / "study.yaml")
        line = {"phase": "stage1", "images_per_second": 1, "memory_gib": 1, "latent_rms": 2, "utilization": 1}
        if script == "tokenizer/train.py":
            (folder / "metrics.jsonl").write_text(json.dumps(line))
            for part in ("checkpoints", "tokenizer"):
                (folder / part).mkdir()
        elif script == "eval/reconstruction.py":
            result = {"psnr": 20.0, "quantization_error": 0.4}
            (folder / "reconstruction.json").write_text(json.dumps({"metrics": result}))
        elif script in ("diffusion/train.py", "autoregressive/train.py"):
            tokenizer = Path(trained["tokenizer"])
            better = read_yaml(tokenizer.parent / "study.yaml").get("optim", {}).get("lr") == 0.5
            assert trained["data"]["image_size"] == 64
            assert (trained["optim"]["lr"] == 0.25) == (script == "autoregressive/train.py")
            bits = {"held_out_bits": 900} if script == "autoregressive/train.py" else {}
            line = {"step": 10, "images_per_second": 1, "fd_x": 20 if better else 40} | bits
            (folder / "metrics.jsonl").write_text(json.dumps(line))
            (folder / "checkpoints").mkdir()
        else:
            assert options[-3:] == ["--guidance_scale", "1", "3"]
            fd = json.loads((folder / "metrics.jsonl").read_text())["fd_x"]
            metrics = {scale: {"fd_x": fd / scale, "class_accuracy": scale / 4} for scale in (1.0, 3.0)}
            sweep = [{"guidance_scale": scale, "metrics": found} for scale, found in metrics.items()]
            (folder / "generation.json").write_text(json.dumps({"sweep": sweep, "metrics": {}}))

    monkeypatch.setattr(evidence, "run_script", play)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evidence.py",
            "--study",
            str(tmp_path / "study.yaml"),
            "--data",
            "synthetic",
            "--out",
            str(tmp_path / "runs"),
            "--pages",
            str(tmp_path / "pages"),
        ],
    )
    evidence.main()
    expected = 2 * ["tokenizer/train.py", "eval/reconstruction.py", "diffusion/train.py", "eval/generation.py"]
    assert [script for _, script in calls] == [*expected, *2 * ["autoregressive/train.py", "eval/generation.py"]]
    page = (tmp_path / "pages" / "study.md").read_text()
    assert "| FD of samples, guidance 1 | FD of samples, guidance 3 | in their class, guidance 1 |" in page
    assert "| b, DiT | 1 | 20.0 | 6.7 | 25.0% | 75.0% | - |" in page
    assert "| b, Llama | 1 | 20.0 | 6.7 | 25.0% | 75.0% | 900 |" in page
    assert page.count("| 1 | +0.00 | 1.00x | 0.50x | 0.50x |") == 2  # each against its own generator's
    calls.clear()
    evidence.main()
    assert not calls
    assert (tmp_path / "pages" / "study.md").read_text() == page


@pytest.mark.slow
def test_unprotected_vq_collapses_where_nsvq_does_not_and_a_finished_study_is_not_run_again(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "evidence.py", "--study", "configs/evidence/short.yaml"]
    command += ["--data", "synthetic", "--limit", 256, "--out", tmp_path / "runs", "--pages", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pages = []
    for options in (["--jobs", "2"], ["--jobs", "0"], ["--seeds", "0", "--runs", "vq"]):
        subprocess.run([*map(str, command), *options], cwd=ROOT, env=environment, check=True)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        pages.append([(tmp_path / name).read_bytes() for name in ("short.md", "short.svg")])
    assert pages[0] == pages[1] == pages[2]
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    used = {record["name"]: record["metrics"]["utilization"] for record in records}
    assert used.keys() == {"vq", "nsvq"}
    assert used["vq"] < 0.25
    assert used["nsvq"] > 0.8
    page = (tmp_path / "short.md").read_text()
    assert f"{used['nsvq']:.1%}" in page
    assert "not run yet" not in page.lower()
    assert "<svg" in (tmp_path / "short.svg").read_text()
