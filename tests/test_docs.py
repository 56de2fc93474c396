"""The commands of the pages in docs/ that are to be typed, as they stand there, at toy size.

Such a command is a line of a block of ```bash. Numbers that make a run small come behind it."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import VQModel

from nsvq.tokenizer.convert import main as convert
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.train import main as train_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = {"tokenizer/train.py": train_tokenizer, "tokenizer/convert.py": convert}
SMALL = {  # of a tokenizer's training; what a command says itself stays
    "data.source": "synthetic",
    "data.image_size": 32,
    "model.channels": 32,
    "model.channel_multipliers": [1, 2],
    "model.layers_per_block": 1,
    "model.latent_channels": 4,
    "model.norm_groups": 32,
    "quantizer.codebook_size": 64,
    "loss.perceptual": "none",
    "discriminator.channels": 8,
    "discriminator.layers": 1,
    "schedule.epoch_samples": 16,
    "validation.images": 8,
    "validation.probe_images": 4,
    "validation.statistics_images": 8,
    "run.batch_size": 8,
    "run.workers": 0,
    "run.trackers": [],
    "run.mixed_precision": "no",
}


def commands(page):
    """(script, arguments) of each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    words = [line for line in lines if line]
    assert all(line[0] == "python" or line[:2] == ["accelerate", "launch"] for line in words)
    return [(line[1], line[2:]) if line[0] == "python" else (line[2], line[3:]) for line in words]


def small(arguments, **changes):
    """Arguments behind `arguments` for a toy run."""
    given = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    found = []
    for key, value in (SMALL | changes).items():
        if key not in given:
            found += [f"--{key}", *([*map(str, value)] or ["[]"] if isinstance(value, list) else [str(value)])]
    return [*arguments, *found]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder to run commands in, with the configs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vqgan(folder):
    """A tiny VQGAN as taming-transformers saves it: random weights in its names."""
    model = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        num_vq_embeddings=64,
        latent_channels=4,
    )
    pieces = [
        (r"^encoder\.down_blocks\.", "encoder.down."),
        (r"^decoder\.up_blocks\.0\.", "decoder.up.1."),
        (r"^decoder\.up_blocks\.1\.", "decoder.up.0."),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in pieces:
            name = re.sub(old, new, name)
        state[name] = tensor[:, :, None, None] if re.search(r"attn.*\.(q|k|v|proj_out)\.weight", name) else tensor
    torch.save({"state_dict": state}, folder / "last.ckpt")


def test_the_page_on_warm_starts_runs_as_it_stands(run_script, clone, capsys):
    quickstart = [*small(["--config", "configs/quickstart/nsvq.yaml"]), "--out", "runs/first", "--schedule.epochs", 12]
    run_script(train_tokenizer, *quickstart)
    (clone / "runs" / "quickstart").mkdir()
    (clone / "runs" / "quickstart" / "tokenizer").symlink_to(clone / "runs" / "first" / "tokenizer")
    vqgan(clone)
    attends = {"model.attention_levels": [1]}
    for script, arguments in commands("warm-start.md"):
        if script == "tokenizer/convert.py":
            run_script(convert, *arguments)
            continue
        run_script(SCRIPTS[script], *small(arguments, **(attends if "imagenet256" in arguments[1] else {})))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init_from")]
    assert [line.rpartition("decoder, ")[2] for line in said] == [
        "no codes (they are 64, and here quantizer.codebook_size = 2048)",
        "no codes (they are 64, and here quantizer.codebook_size = 2048)",
        "and 64 codes",
        "no codes (init_codes is false)",
    ]
    runs = ["quickstart/warm", "quickstart/warm-ema", "imagenet256-vqgan-finetune", "imagenet256-vqgan-transplant"]
    for name in runs:
        assert Tokenizer.from_pretrained(clone / "runs" / name / "tokenizer").image_size == 32
        assert "init_from" in yaml.safe_load((clone / "runs" / name / "config.yaml").read_text())["inputs"]
