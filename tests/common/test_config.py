import re
from importlib import import_module
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from nsvq.common.config import Config, describe, differences, merged, parse, read_config, to_dict
from nsvq.common.run import RunConfig
from nsvq.errors import UsageError


class Inner(Config):
    rate: float = Field(0.1, gt=0, description="How fast.")
    kind: Literal["a", "b"] = "a"
    names: list[str] = Field(default_factory=list)


class Outer(Config):
    """An example."""

    renamed: ClassVar[dict[str, str]] = {"pace": "inner.rate", "inner.speed": "inner.rate"}
    steps: int = Field(10, ge=1, description="How long.")
    flag: bool = False
    inner: Inner = Inner()
    extra: Inner | None = Field(None, description="Another one.")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 20\ninner: {rate: 0.5, kind: b}\n")
    return path


def test_arguments_go_over_the_file_and_the_file_over_defaults(file):
    config = parse(Outer, ["--config", str(file), "--inner.rate", "1e-3", "--flag"])
    assert (config.steps, config.flag, config.inner.rate, config.inner.kind) == (20, True, 0.001, "b")
    assert parse(Outer, ["--steps=7"], default_file=file).inner.rate == 0.5
    assert parse(Outer, ["--inner.names", "x", "y z"]).inner.names == ["x", "y z"]
    assert parse(Outer, ["--inner.names", "x"]).inner.names == ["x"]
    assert parse(Outer, ["--inner.names", "[]"]).inner.names == []


def test_words_and_numbers_mean_what_they_look_like(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("inner: {rate: 1e-4, names: [no, on, off, 12]}\n")
    with pytest.raises(UsageError, match=r"names\.3 = 12"):
        parse(Outer, ["--config", str(path)])
    path.write_text("inner: {rate: 1e-4, names: [no, on]}\nflag: true\n")
    config = parse(Outer, ["--config", str(path), "--inner.names", "no", "yes"])
    assert (config.inner.rate, config.inner.names, config.flag) == (1e-4, ["no", "yes"], True)
    assert parse(RunConfig, ["--mixed_precision", "no"]).mixed_precision == "no"


def test_a_resolved_config_reads_back_as_itself(file):
    config = parse(Outer, ["--config", str(file)])
    assert Outer(**to_dict(config)) == config


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--inner.ratte", "1"], ["inner.ratte", "did you mean inner.rate?"]),
        (["--stepz", "1"], ["stepz", "did you mean steps?"]),
        (["--outer.rate", "1"], ["outer.rate", "did you mean inner.rate?"]),
        (["--pace", "1"], ["unknown key --pace: it is now inner.rate"]),
        (["--inner.speed", "1"], ["unknown key --inner.speed: it is now inner.rate"]),
        (["--extra", "false"], ["extra = False: it must be a section"]),
        (["--steps", "0"], ["steps = 0", "greater than or equal to 1"]),
        (["--steps", "two"], ["steps = 'two'", "integer"]),
        (["--inner.kind", "c"], ["inner.kind = 'c'", "'a' or 'b'"]),
        (["--inner.rate", ".nan"], ["inner.rate", "finite"]),
        (["--steps", "1", "--steps", "2"], ["--steps is given twice"]),
        (["steps"], ["'steps'", "--key value"]),
        (["--config", "nowhere.yaml"], ["cannot read the config nowhere.yaml"]),
    ],
)
def test_a_wrong_option_is_one_line_with_key_value_and_remedy(arguments, parts):
    with pytest.raises(UsageError) as caught:
        parse(Outer, arguments)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["steps: [", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        parse(Outer, ["--config", str(path)])


def test_every_problem_of_a_file_is_told_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: 0\npace: 2\ninner: {spede: 3}\n")
    message = r"steps = 0.*unknown key inner\.spede.*unknown key pace: it is now inner\.rate"
    with pytest.raises(UsageError, match=message):
        parse(Outer, ["--config", str(path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "'a' is given twice"),
        (b"run: {x: 1}\nother: 1\nrun: {y: 2}\n", "'run' is given twice"),
        ("a: \u00e9".encode("latin-1"), "it is not in UTF-8"),
    ],
)
def test_a_file_that_loses_a_key_or_is_in_another_encoding_is_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
    path.write_bytes("\ufeffa: \u00e9".encode())
    assert read_config(path) == {"a": "\u00e9"}


def test_a_file_holds_what_it_changes_in_its_base_and_arguments_go_over_both(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "root.yaml").write_text(
        "steps: 20\ninner: {rate: 0.5, kind: b, names: [x, y]}\nextra: {rate: 3}\n"
    )
    (tmp_path / "bases" / "middle.yaml").write_text("base: root.yaml\ninner: {rate: 2, names: [z]}\n")
    path = tmp_path / "run.yaml"
    path.write_text("base: bases/middle.yaml\nsteps: 30\nextra: null\n")
    config = parse(Outer, ["--config", str(path), "--inner.rate", "7"])
    assert to_dict(config) == {
        "steps": 30,
        "flag": False,
        "inner": {"rate": 7, "kind": "b", "names": ["z"]},
        "extra": None,
    }
    assert parse(Outer, ["--config", str(path), "--extra.kind", "b"]).extra == Inner(kind="b")  # revived with defaults


def test_a_section_that_chooses_another_kind_starts_anew():
    base = {"quantizer": {"name": "vq", "init": "latents"}, "loss": {"a": 1, "b": 2}, "data": "synthetic"}
    changed = merged(base, {"quantizer": {"name": "fsq"}, "loss": {"b": 3}})
    assert changed == {"quantizer": {"name": "fsq"}, "loss": {"a": 1, "b": 3}, "data": "synthetic"}
    assert merged(base, {"quantizer": {"name": "vq", "k": 8}})["quantizer"] == {"name": "vq", "init": "latents", "k": 8}
    assert merged(base, {"quantizer": {"init": "uniform"}})["quantizer"] == {"name": "vq", "init": "uniform"}
    assert merged(base, {"data": "photos"})["data"] == "photos"
    with pytest.raises(UsageError, match="data: its base gives it in the short form 'synthetic'"):
        merged(base, {"data": {"image_size": 64}})


def test_a_base_that_is_no_file_or_a_circle_is_told_with_the_files(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(UsageError, match=r"a\.yaml: its base .*b\.yaml is no file"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UsageError, match=r"each other's base: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_config(tmp_path / "a.yaml")


def test_help_names_every_key_with_type_default_and_meaning():
    text = describe(Outer)
    assert "--inner.rate float (default: 0.1)\n        How fast." in text
    assert "--inner.kind {a,b} (default: a)" in text
    assert "--steps int (default: 10)\n        How long." in text
    assert "--extra a section or null (default: null)\n        Another one." in text


def test_help_says_once_what_there_is_to_choose_among_and_which_is_the_default():
    from nsvq.diffusion.config import TrainConfig

    text = describe(TrainConfig)
    assert text.count("--objective.name") == 1
    assert "--objective.name {flow,ddpm} (default: flow)\n        flow: " in text
    assert "with model.variant dit or modern:" in text
    assert "--run.accumulation int or {auto} (default: auto)" in text


def test_help_shows_what_the_same_command_without_it_uses(file, capsys):
    def told(*arguments, **how):
        with pytest.raises(SystemExit) as end:
            parse(Outer, [*arguments], **how)
        assert end.value.code == 0
        return capsys.readouterr().out

    for text in (told("--help", default_file=file), told("-h", "--config", str(file))):
        assert f"--config FILE (default: {file}, " in text
        assert "--steps int (default: 20)" in text
        assert "--inner.rate float (default: 0.5)" in text
        assert "--inner.kind {a,b} (default: b)" in text
        assert "--extra a section or null (default: null)" in text
        assert "--extra.rate float (default: 0.1)" in text
    text = told("--steps", "7", "--extra.rate", "3", "--help", default_file=file)
    assert "--steps int (default: 7)" in text
    assert "--inner.rate float (default: 0.5)" in text
    assert "--extra a section or null\n" in text
    assert "--extra.rate float (default: 3.0)" in text


def test_help_needs_no_required_key(capsys):
    class Needs(Config):
        folder: str = Field(description="Where.")
        steps: int = Field(3, description="How long.")

    for arguments, default in (["--help"], "(required)"), (["--folder", "here", "--help"], "(default: here)"):
        with pytest.raises(SystemExit):
            parse(Needs, arguments)
        assert f"--folder str {default}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "shown"),
    [
        ("tokenizer", ["quantizer.name ema", "quantizer.decay 0.98", "nsvq.revive 5.0", "run.batch_size 128"]),
        ("diffusion", ["run.batch_size 256"]),
        ("autoregressive", ["schedule.steps 1501000"]),
    ],
)
def test_help_of_a_trainer_shows_its_default_recipe(stage, shown, run_script, capsys):
    with pytest.raises(SystemExit):
        run_script(import_module(f"nsvq.{stage}.train").main, "--help")
    found = re.findall(r"^  --(\S+) .*\(default: (.*)\)$", capsys.readouterr().out, re.M)
    assert set(shown) <= {f"{key} {value}" for key, value in found}


def test_differences_name_the_leaves():
    old, new = to_dict(Outer()), to_dict(Outer(steps=3, inner=Inner(rate=2)))
    assert differences(old, new) == ["steps: 10 -> 3", "inner.rate: 0.1 -> 2.0"]


def test_every_config_of_the_repository_is_valid():
    from pathlib import Path

    from nsvq.autoregressive.config import TrainConfig as AutoregressiveConfig
    from nsvq.common.config import read_config, read_yaml, validate
    from nsvq.diffusion.config import TrainConfig as DiffusionConfig
    from nsvq.tokenizer.config import TrainConfig as TokenizerConfig

    root = Path(__file__).parents[2] / "configs"
    files = [
        path for path in root.rglob("*.yaml") if path.parent.name != "accelerate" and "runs" not in read_yaml(path)
    ]
    assert len(files) >= 10
    for path in files:
        values = read_config(path)
        schema = DiffusionConfig if values.keys() & {"tokenizer", "steps"} else TokenizerConfig
        if "steps" in values.get("schedule", {}):
            schema = AutoregressiveConfig
        assert validate(schema, values, source=path.name)
        for key, text in _undocumented(schema):
            assert text, f"{schema.__name__}: {key} has no description"


def _undocumented(schema):
    from nsvq.common.config import _leaves

    return [(key, field.description) for key, field in _leaves(schema).items()]
