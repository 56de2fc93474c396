import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, VQModel
from PIL import Image
from transformers import AutoModelForCausalLM

from nsvq.autoregressive.model import ModelConfig, make_llama
from nsvq.autoregressive.sampling import TokenPipeline
from nsvq.errors import UsageError
from nsvq.pipelines import sample
from nsvq.pipelines.autoregressive import AutoregressivePipeline, save_pipeline
from nsvq.pipelines.class_names import ClassNames
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.vqmodel import QuantizerVQModel

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "golden retriever"}
SECTIONS = {
    "model": {"class_dropout": 0.1},
    "schedule": {"warmup_steps": 7},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.05, "clip_grad_norm": 1.0, "ema_decay": 0.999},
}


def random_llama(classes=5):
    torch.manual_seed(5)
    model = make_llama(ModelConfig(size="tiny", depth=2, width=32, heads=2), 16, classes, 16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def llama():
    return random_llama()


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory, llama, vae, about):
    """A pipeline as a run leaves it."""
    key = about["latents"]["key"] | {"latents": "codes"}
    latents = {"key": key, "shape": [2, 4, 4], "count": 5000, "bad_images": 7}
    about = about | {"latents": latents, "config": about["config"] | SECTIONS, "objective": "the next code"}
    path = tmp_path_factory.mktemp("run") / "pipeline"
    save_pipeline(path, llama, vae, NAMES, about)
    return path


@pytest.fixture
def pipeline(tokens_folder):
    loaded = ClassConditionalPipeline.from_pretrained(tokens_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_code_in_the_folder_finds_classes_as_ours_does():
    names = {0: "crane, bird", 1: "crane", 2: "Golden Retriever", 3: "tench, Tinca tinca", 4: "drake, duck", 5: "duck"}
    ours, shipped = ClassNames(), object.__new__(TokenPipeline)
    for each in (ours, shipped):
        vars(each).update(id2label=names, null_class=6)
    labels = ["crane", " golden retriever", "tinca tinca", "drake", "duck", "bird", 3, None, "crane, BIRD"]
    assert shipped.class_ids(labels) == ours.class_ids(labels) == [1, 2, 3, 4, 5, 0, 3, 6, 0]
    names[6] = "drake"
    names[7] = "Drake"
    for label in ("drake", "swan", 9):
        for each in (ours, shipped):
            with pytest.raises(ValueError, match=r"drake|swan|9"):
                each.class_ids(label)


def test_the_folder_gives_our_class_the_same_network_and_names(pipeline, llama, tokens_folder, tmp_path):
    assert type(pipeline) is AutoregressivePipeline
    assert pipeline.id2label == NAMES
    assert all(torch.equal(a, b) for a, b in zip(pipeline.transformer.parameters(), llama.parameters(), strict=True))
    pipeline.save_pretrained(tmp_path / "again")
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "again")
    assert again.id2label == NAMES
    assert torch.equal(
        again([1], seeds=[3], output_type="latent").images, pipeline([1], seeds=[3], output_type="latent")[0]
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tokens_folder)


# Loads a folder where this project is not installed, samples it as a pipeline, and runs the code of its card.
ELSEWHERE = """
import sys, torch
sys.modules |= dict.fromkeys(["nsvq"])  # None: importing it fails
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(["goldfish", 4, None], guidance_scale=2.0, seeds=[3, 4, 5], output_type="pt").images
blocks = open(sys.argv[1] + "/README.md").read().split("```python\\n")[1:]
card = {}
for block in blocks:
    code = block.split("```")[0].replace("path/to/this/folder", sys.argv[1])
    exec(code.replace("image = pipeline", "picture = pipeline"), card)
torch.save((type(pipeline).__name__, images, card["tokens"], card["image"], card["picture"].size), sys.argv[2])
"""


@pytest.mark.slow
def test_where_the_project_is_not_the_folder_samples_as_a_pipeline_and_by_the_code_on_its_card(
    tokens_folder, pipeline, tmp_path
):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(tokens_folder), str(tmp_path / "images.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, images, tokens, image, size = torch.load(tmp_path / "images.pt")
    assert name == "TokenPipeline"
    how = {"guidance_scale": 2.0, "seeds": [3, 4, 5], "output_type": "pt"}
    expected = pipeline(["goldfish", "golden retriever", None], **how).images
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert tokens.shape == (1, 16)
    assert tokens.max() < 16
    torch.testing.assert_close(image.clamp(0, 1), pipeline.decode(tokens.view(1, 4, 4)), rtol=0, atol=1e-5)
    assert size == (16, 16)


def test_each_part_loads_by_its_own_library(tokens_folder, llama, vae):
    alone = AutoModelForCausalLM.from_pretrained(tokens_folder, subfolder="transformer")
    ids = torch.tensor([[17, 3, 0, 5]])
    torch.testing.assert_close(alone(ids).logits, llama(ids).logits)
    codes = VQModel.from_pretrained(tokens_folder, subfolder="vae").quantize.embedding.weight
    assert torch.equal(codes, vae.quantize.embedding.weight)
    index = json.loads((tokens_folder / "model_index.json").read_text())
    assert index["transformer"] == ["transformers", "LlamaForCausalLM"]
    assert index["vae"] == ["diffusers", "VQModel"]


def test_images_are_their_tokens_decoded_and_hang_on_their_own_seed_alone(pipeline, vae):
    how = {"guidance_scale": 1.5, "top_k": 8}
    codes = pipeline([1, "goldfish", 4, None], seeds=[7, 8, 9, 10], output_type="latent", **how).images
    assert codes.shape == (4, 4, 4)
    assert not torch.equal(codes[0], codes[1])
    expected = (Tokenizer(vae).decode(codes) / 2 + 0.5).clamp(0, 1)
    in_parts = pipeline([1, 1, 4, None], seeds=[7, 8, 9, 10], batch_size=3, output_type="pt", **how).images
    torch.testing.assert_close(in_parts, expected, rtol=0, atol=1e-5)
    alone = pipeline([4], generator=[torch.Generator().manual_seed(9)], output_type="latent", **how).images
    assert torch.equal(alone[0], codes[2])
    assert [image.size for image in pipeline([0, 1]).images] == [(16, 16)] * 2


def test_the_callback_sees_every_token_and_the_bar_counts_them(tokens_folder, capsys):
    pipeline, seen = ClassConditionalPipeline.from_pretrained(tokens_folder), []
    pipeline(
        [0, 1, 2],
        seeds=[0, 1, 2],
        batch_size=2,
        callback_on_step_end=lambda _, i, t, values: seen.append((i, t, *values["tokens"].shape)),
    )
    assert seen == [(i, i, count, i + 1) for count in (2, 1) for i in range(16)]
    assert "32/32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "empty"),
        (["goldfisch"], {}, "did you mean 'goldfish'"),
        ([5], {}, "class 5 does not exist"),
        ([0, 1], {"seeds": [1]}, "2 images need 2 seeds"),
        ([0], {"seeds": [1], "generator": torch.Generator()}, "seeds or a generator"),
        ([0], {"guidance_scale": float("nan")}, "guidance_scale"),
        ([0], {"guidance_schedule": "square"}, "guidance_schedule must be"),
        ([0], {"guidance_schedule": "linear", "guidance_power": 0.0}, "guidance_power must be above 0"),
        ([0], {"guidance_power": 2.0}, "1 unless guidance_schedule is linear"),
        ([0], {"top_p": 0.0}, "top_p"),
        ([0], {"output_type": "jpg"}, "output_type must be"),
        ([0], {"batch_size": 0}, "batch_size"),
    ],
)
def test_an_argument_without_meaning_is_refused(pipeline, labels, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(labels, **options)


def test_a_model_without_classes_is_not_guided(vae, tmp_path):
    save_pipeline(tmp_path / "pipeline", random_llama(classes=0), vae, {})
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "pipeline")
    found = [pipeline([None], seeds=[1], guidance_scale=s, output_type="latent").images for s in (1.0, 4.0)]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="there are none"):
        pipeline([0])


def test_codes_of_a_quantizer_without_a_table_are_decoded_too(tmp_path):
    torch.manual_seed(1)
    vae = QuantizerVQModel(
        quantizer={"name": "fsq", "levels": [4, 4]},
        block_out_channels=(8, 8, 8),
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        num_vq_embeddings=16,
        vq_embed_dim=2,
        sample_size=16,
    ).eval()
    save_pipeline(tmp_path / "pipeline", random_llama(), vae, NAMES)
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "pipeline")
    codes = pipeline([1, 2], seeds=[1, 2], output_type="latent").images
    expected = (Tokenizer(vae).decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline.decode(codes), expected, rtol=0, atol=1e-5)


def test_sample_py_draws_from_it_and_refuses_keys_of_diffusion(run_script, tokens_folder, pipeline, tmp_path):
    arguments = [
        "--pipeline",
        tokens_folder,
        "--classes",
        4,
        "tench",
        "--output",
        tmp_path / "grid.png",
        "--per_class",
        2,
        "--device",
        "cpu",
    ]
    how = {"temperature": 0.5, "guidance_schedule": "linear", "guidance_power": 3.0}
    options = [word for name, value in how.items() for word in (f"--{name}", value)]
    run_script(sample.main, *arguments, *options, "--seed", 3)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    expected = pipeline([4, 4, 0, 0], seeds=[3, 4, 5, 6], guidance_scale=2.0, **how).images
    assert (
        expected
        != pipeline([4, 4, 0, 0], seeds=[3, 4, 5, 6], guidance_scale=2.0, **how | {"guidance_power": 1.0}).images
    )
    assert np.abs(grid[20:36, 2:18] - np.asarray(expected[2]).astype(int)).max() <= 1
    with pytest.raises(UsageError, match="--steps means nothing to an autoregressive model"):
        run_script(sample.main, *arguments, "--steps", 3)
    with pytest.raises(UsageError, match="guidance_power must be above 0, and 1 unless"):
        run_script(sample.main, *arguments, "--guidance_power", 3)


def test_sample_py_refuses_keys_of_tokens_for_a_diffusion_model(run_script, folder, tmp_path):
    with pytest.raises(UsageError, match="--top_k means nothing to a diffusion model"):
        run_script(sample.main, "--pipeline", folder, "--classes", 4, "--output", tmp_path / "grid.png", "--top_k", 3)


def test_card_says_what_generates_what(tokens_folder):
    text = " ".join((tokens_folder / "README.md").read_text().split())
    facts = [
        "# Class-conditional autoregressive transformer",
        "tokens: 4 x 4",
        "16 codes of 3 dimensions",
        "Objective: the next code",
        "7 warm-up steps",
        "16 to 20 are the classes, 21 is",
    ]
    assert [fact for fact in facts if fact not in text] == []
    assert "The stock pipeline" not in text
