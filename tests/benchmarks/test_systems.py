import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from common.config import differences, read_yaml, to_dict, validate
from common.errors import UserError
from tokenizer.config import TrainConfig
from tokenizer.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarks" / "systems.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

MAY_DIFFER = ("out:", "quantizer.", "model.latent_channels:", "loss.codebook_weight:", "loss.commitment_weight:",
              "loss.nonstationary_weight:", "loss.temperature:", "schedule.freeze:", "schedule.replace:")  # fmt: skip


def other(differences):
    return [line for line in differences if not line.startswith(MAY_DIFFER)]


def config(tmp_path, **values):
    base = ROOT / "configs" / "benchmarks" / "photos64.yaml"
    values = {"out": tmp_path, "base": base, "data": {"source": "synthetic"}, "lc_features": "f.safetensors"} | values
    return benchmark.BenchmarkConfig(**values)


def test_systems_of_the_benchmark_differ_in_the_method_alone(tmp_path):
    resolved = {}
    for k in (256, 1024, 65536):
        for name in benchmark.SYSTEMS:
            values = benchmark.training_config(name, 3, tmp_path, config(tmp_path, codebook_size=k))
            resolved[name] = to_dict(validate(TrainConfig, values))
            assert resolved[name]["run"]["seed"] == 3
        for name in benchmark.SYSTEMS:
            found = [line for line in other(differences(resolved["vq"], resolved[name])) if "codebook_lr" not in line]
            assert not found, (name, found)
    assert {values["quantizer"]["name"] for values in resolved.values()} == set(QUANTIZERS)


def test_the_common_recipe_differs_in_the_method_alone_and_each_method_has_one_and_its_papers():
    common = {}
    for path in (ROOT / "configs" / "imagenet128").glob("*.yaml"):
        if not path.stem.startswith("dit"):
            common[path.stem] = to_dict(validate(TrainConfig, read_yaml(path)))
    assert set(common) == set(QUANTIZERS) | {"simvq-nsvq"}
    for name, values in common.items():
        assert not other(differences(common["nsvq"], values)), name
    papers = {path.stem for path in (ROOT / "configs" / "papers").glob("*.yaml")}
    assert papers == set(QUANTIZERS) - {"nsvq"}  # whose own recipe is the common one
    for name in papers:
        assert read_yaml(ROOT / "configs" / "papers" / f"{name}.yaml")["quantizer"]["name"] == name


def test_a_finished_run_is_kept_and_a_changed_or_broken_one_is_run(tmp_path, monkeypatch):
    calls = []

    def call(config, script, *arguments):
        calls.append(script)
        if "eval" in script:
            Path(arguments[arguments.index("--output") + 1]).write_text("{}")

    monkeypatch.setattr(benchmark, "_call", call)
    both = ["tokenizer/train.py", "eval/reconstruction.py"]
    folder = benchmark.run("vq", 0, config(tmp_path))
    assert calls == both
    assert read_yaml(folder / "benchmark.yaml")["quantizer"]["name"] == "vq"
    benchmark.run("vq", 0, config(tmp_path))
    assert calls == both
    (folder / "reconstruction.json").unlink()
    benchmark.run("vq", 0, config(tmp_path))
    benchmark.run("vq", 0, config(tmp_path, epochs=3))
    assert calls == 3 * both
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"tokenizer/train\.py.* ended with 1"):
        benchmark._call(config(tmp_path, launcher="false"), "tokenizer/train.py")


def test_the_table_holds_means_over_seeds_and_the_plot_every_run(tmp_path):
    folder = tmp_path / "vq-seed0"
    folder.mkdir()
    measured = {"psnr": 20.0, "utilization": 0.5, "perplexity_fraction": 0.25, "codebook_size": 1000,
                "bits_per_token": 9.966, "tokens_per_image": 64, "rfd_x": 3.0}  # fmt: skip
    (folder / "reconstruction.json").write_text(json.dumps({"metrics": measured}))
    lines = [
        {"images_per_second": 1},
        {"images_per_second": 8},
        {"images_per_second": 16},
        {"images_per_second": 2, "val_psnr": 1},
    ]
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line | {"memory_gib": i}) for i, line in enumerate(lines))
    )
    (folder / "benchmark.yaml").write_text(yaml.safe_dump({"run": {"batch_size": 16}}))
    one = benchmark.measurements(folder)
    assert (one["step_ms"], one["memory_gib"]) == (1000, 3)
    rows = {"vq": [one, one | {"psnr": 22.0}], "nsvq": [one | {"perplexity_fraction": 1.0}]}
    head, _, vq, nsvq = benchmark.table(rows).splitlines()
    assert (
        head
        == "| system | PSNR | FD | utilization | perplexity / K | K | bits a token | tokens | step, ms | memory, GiB |"
    )
    assert vq == "| vq | 21.00 ± 1.41 | 3.00 | 50.0% | 0.250 | 1000 | 10.0 | 64 | 1000 | 3.00 |"
    assert nsvq.startswith("| nsvq | 20.00 | 3.00 |")
    plot = benchmark.plot(rows)
    assert plot.count("<circle") == 3
    assert plot.count(">vq<") == plot.count(">nsvq<") == 1
