"""The links of all pages, and the commands of those in docs/ that are to be typed, as they stand there, at toy size.

Such a command is a line of a block of ```bash. Numbers that make a run small come behind it."""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, VQModel
from PIL import Image

from nsvq.data.__main__ import main as describe
from nsvq.data.make_shards import main as make_shards
from nsvq.diffusion.train import main as train_diffusion
from nsvq.eval.generation import main as measure_generation
from nsvq.eval.page import main as write_page
from nsvq.eval.reconstruction import main as measure_reconstruction
from nsvq.pipelines.sample import main as sample
from nsvq.pipelines.summary import main as summary
from nsvq.tokenizer.convert import main as convert
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.train import main as train_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "-m nsvq.data": describe,
    "data/make_shards.py": make_shards,
    "tokenizer/train.py": train_tokenizer,
    "tokenizer/convert.py": convert,
    "diffusion/train.py": train_diffusion,
    "pipelines/sample.py": sample,
    "pipelines/summary.py": summary,
    "eval/reconstruction.py": measure_reconstruction,
    "eval/generation.py": measure_generation,
    "eval/page.py": write_page,
}
MEASURED = {"features": "none", "batch_size": 8, "workers": 0}
SMALL_OF = {  # of the other scripts, as SMALL
    "diffusion/train.py": {
        "data.image_size": 32,
        "steps": 2,
        "model.size": "tiny",
        "sampling.steps": 2,
        "run.batch_size": 8,
        "run.workers": 0,
        "run.trackers": [],
        "run.mixed_precision": "no",
    },
    "data/make_shards.py": {"workers": 0},
    "pipelines/sample.py": {"steps": 2},
    "eval/reconstruction.py": MEASURED | {"lpips": "none", "limit": 8},
    "eval/generation.py": MEASURED | {"samples": 4, "steps": 2, "metrics": "isc", "data.image_size": 32},
}
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
    found = []
    for line in words:
        assert line[0] == "python" or line[:2] in (["accelerate", "launch"], ["hf", "upload"])
        at = 1 if line[0] == "python" and line[1] != "-m" else 2
        script = " ".join(line[1:3]) if line[1] == "-m" else line[at]
        found.append(("hf upload", line[2:]) if line[0] == "hf" else (script, line[3 if line[1] == "-m" else at + 1 :]))
    return found


def code_of(page):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
    return code


def small(arguments, options=SMALL, **changes):
    """Arguments behind `arguments` for a toy run; those of `changes` in place of theirs."""
    given = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    given |= {"data.source"} if "data" in given else set()
    for key in changes.keys() & given:
        at = arguments.index(f"--{key}")
        arguments, given = [*arguments[:at], *arguments[at + 2 :]], given - {key}
    found = []
    for key, value in (options | changes).items():
        if key not in given:
            found += [f"--{key}", *([*map(str, value)] or ["[]"] if isinstance(value, list) else [str(value)])]
    return [*arguments, *found]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder to run commands in, with the configs."""
    monkeypatch.setattr("nsvq.data.shards.CACHE", tmp_path / "indexes")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_link_between_files_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(pages) > 25
    lost = []
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#\s]+)?(#[^)\s]*)?\)", text):
            file = (page.parent / link[0]).resolve() if link[0] else page
            if "://" in link[0]:
                continue
            headings = (
                re.findall(r"^#+ (.*)$", file.read_text(), re.M) if file.suffix == ".md" and file.is_file() else []
            )
            anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            if not file.exists() or (link[1] and link[1] not in anchors):
                lost.append(f"{page.name}: {link[0]}{link[1]}")
    assert lost == []


def test_every_import_of_ours_in_a_page_resolves():
    lost, found = [], 0
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom | ast.Import)]
            for line in {ast.unparse(node) for node in imports}:
                if re.match(r"(from|import) nsvq\b", line):
                    found += 1
                    try:
                        exec(line, {})
                    except ImportError as error:
                        lost.append(f"{page.name}: {line}: {error}")
    assert lost == []
    assert found > 8


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


def photos(folder):
    """Class folders of noise, larger than what trains on them."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")


def run_page(run_script, page, **changes):
    for script, arguments in commands(page):
        if script == "hf upload":
            continue
        options = SMALL if script == "tokenizer/train.py" else SMALL_OF.get(script, {})
        run_script(SCRIPTS[script], *small(arguments, options, **changes.get(script, {})))


def test_the_pages_on_own_data_and_on_the_report_run_as_they_stand(run_script, clone, capsys):
    photos(clone / "photos")
    holdout = {"data.holdout": 0.25}
    scripts = ("tokenizer/train.py", "diffusion/train.py", "data/make_shards.py", "-m nsvq.data")
    changes = dict.fromkeys((*scripts, "eval/reconstruction.py", "eval/generation.py"), holdout)
    changes["eval/generation.py"] = holdout | {"cache": clone / "references"}
    changes["eval/reconstruction.py"] = changes["eval/generation.py"]
    short = {"schedule.epochs": 1, "schedule.epoch_samples": 16, "nsvq.freeze": "null"}
    changes["tokenizer/train.py"] = holdout | short
    run_page(run_script, "your-data.md", **changes)
    said = capsys.readouterr().out
    assert "data: trains on 18 images of 'train', measures on the 6 " in said
    assert "2 classes ('cat', 'dog')" in said
    for picture in ("grid.png", "samples.png"):
        assert Image.open(clone / picture).size[0] > 32
    assert Tokenizer.from_pretrained(clone / "runs/photos-shards/tokenizer").image_size == 32
    assert list((clone / "indexes").iterdir()), "indexes of shards are not left in the user's cache"
    run_page(run_script, "report.md", **changes)
    page = (clone / "report.html").read_text()
    text = (ROOT / "docs" / "report.md").read_text()
    for heading in (
        "How often codes are used",
        "Reconstructions, worst",
        "Samples by class",
        "Training: runs/photos-dit",
    ):
        assert heading in page
        assert heading.partition(",")[0].partition(":")[0].lower() in text.lower()
    for part in ("All settings", "All that made these numbers"):
        assert part in page
        assert f"| {part.lower()} |" in text


def test_what_the_page_on_publishing_uploads_loads_with_stock_diffusers(
    run_script, clone, tokenizer_folder, image_folder, monkeypatch
):
    hf = pytest.importorskip("huggingface_hub.cli.hf")
    shutil.copytree(tokenizer_folder, clone / "runs" / "photos" / "tokenizer")
    dit = ["--data", str(image_folder), "--tokenizer", str(tokenizer_folder), "--out", "runs/photos-dit"]
    size = {"data.image_size": 16, "model.patch_size": 1}
    run_script(train_diffusion, *small(dit, SMALL_OF["diffusion/train.py"] | size))

    def upload(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, clone / "hub" / repo_id)

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    for script, arguments in commands("publishing.md"):
        if script == "hf upload":
            hf.app(["upload", *arguments], standalone_mode=False)
    monkeypatch.chdir(clone / "hub")  # where the ids are folders
    names: dict = {}
    exec(code_of("publishing.md"), names)
    assert isinstance(names["pipeline"], DiffusionPipeline)
    assert isinstance(names["tokenizer"], VQModel)
    card = (clone / "hub/someone/photos-dit/README.md").read_text()
    assert "# license: to be set by whoever publishes" in card


def test_the_quantizer_of_the_page_is_whole():
    names: dict = {}
    exec(code_of("your-quantizer.md"), names)
    quantizer = names["Mine"](names["MineConfig"](name="mine", codebook_size=8), 3)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = quantizer(z)
    nearest = torch.cdist(z.detach().permute(0, 2, 3, 1).reshape(-1, 3), quantizer.weight).argmin(1)
    assert torch.equal(found.indices.flatten(), nearest)
    (found.z_q.sum() + sum(found.losses.values())).backward()
    assert quantizer.weight.grad.abs().sum() > 0
    assert z.grad.abs().sum() > 0


def test_the_generator_of_the_page_learns_goes_on_and_draws(
    run_script, clone, tokenizer_folder, image_folder, monkeypatch
):
    (clone / "mine.py").write_text(code_of("your-generator.md"))
    monkeypatch.syspath_prepend(clone)
    mine = importlib.import_module("mine")
    options = SMALL_OF["diffusion/train.py"] | {"data.image_size": 16, "steps": 12, "run.log_every": 1}
    options = {key: value for key, value in options.items() if not key.startswith(("model", "sampling.steps"))}
    command = small(["--data", str(image_folder), "--tokenizer", str(tokenizer_folder)], options)
    with monkeypatch.context() as patch:
        patch.setattr(mine.MineTrainer, "export", lambda self: 1 / 0)  # after the last checkpoint
        with pytest.raises(ZeroDivisionError):
            run_script(mine.main, *command)
    run_script(mine.main, *command)
    losses = [json.loads(line)["loss"] for line in (clone / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    assert (clone / "runs/mine/samples/step-12.png").is_file()
    assert (clone / "runs/mine/pipeline/mine.safetensors").is_file()
