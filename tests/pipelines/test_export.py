import json
import os
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

from nsvq.diffusion.dit import DiT
from nsvq.diffusion.model import SIZES
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.diffusion.unet import make_unet
from nsvq.pipelines.export import from_stock, save_pipeline, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "golden retriever"}


@pytest.mark.parametrize("variant", ["dit", "modern"])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_exported_and_own_outputs_agree_with_and_without_class(size, patch_size, variant):
    _, width, heads = SIZES[size]
    model = DiT(4, 3, num_classes=7, patch_size=patch_size, depth=1, width=width, heads=heads, variant=variant).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    stock = to_stock(model)
    latents, time = torch.randn(4, 3, 4, 4), torch.tensor([0, 3, 500, 999])
    with torch.no_grad():
        for own_labels, stock_labels in [([0, 2, 5, 6], [0, 2, 5, 6]), ([7] * 4, [1000] * 4), ([7] * 4, [900] * 4)]:
            own = model(latents, time, torch.tensor(own_labels))
            exported = stock(latents, timestep=time, class_labels=torch.tensor(stock_labels)).sample
            assert own.std() > 0.1
            torch.testing.assert_close(exported, own, rtol=1e-4, atol=1e-5)


def test_every_block_is_exported_in_its_place(dit):
    model = DiT(4, 3, num_classes=2, depth=5, width=32, heads=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, time, labels = torch.randn(3, 3, 4, 4), torch.tensor([1, 400, 999]), torch.tensor([0, 1, 0])
    with torch.no_grad():
        exported = to_stock(model)(x, timestep=time, class_labels=labels).sample
        torch.testing.assert_close(exported, model(x, time, labels), rtol=1e-4, atol=1e-5)


def random_unet(num_classes):
    model = make_unet((3, 4, 4), num_classes, width=32, multipliers=(1, 2), layers=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("num_classes", [7, 0])
def test_exported_and_own_unet_agree_with_and_without_class(num_classes):
    model = random_unet(num_classes)
    stock = to_stock(model)
    assert type(stock) is UNet2DModel
    latents, time = torch.randn(4, 3, 4, 4), torch.tensor([0, 3, 500, 999])
    with torch.no_grad():
        for own_labels, stock_labels in [([0, 2, 5, 6], [0, 2, 5, 6]), ([7] * 4, [1000] * 4)]:
            own = model(latents, time, torch.tensor(own_labels))
            labels = {"class_labels": torch.tensor(stock_labels)} if num_classes else {}
            assert own.std() > 0.01
            torch.testing.assert_close(stock(latents, time, **labels).sample, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_what_is_read_back_from_the_stock_class_is_the_same_network(patch_size):
    model = DiT(4, 3, num_classes=6, patch_size=patch_size, depth=3, width=32, heads=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock, taken = to_stock(model), to_stock(model)
    back = from_stock(taken)
    assert all(parameter.is_meta for parameter in taken.parameters())
    x, time, labels = torch.randn(3, 3, 4, 4), torch.tensor([1, 400, 999]), torch.tensor([0, 5, 1000])
    with torch.no_grad():
        expected = stock(x, timestep=time, class_labels=labels).sample
        torch.testing.assert_close(back(x, timestep=time, class_labels=labels).sample, expected, rtol=1e-4, atol=1e-5)
    again = to_stock(back).state_dict()
    assert all(torch.equal(again[name], value) for name, value in stock.state_dict().items())
    other = to_stock(model)
    other.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight.data.add_(1)
    with pytest.raises(ValueError, match="embed time and class differently"):
        from_stock(other)
    assert not any(parameter.is_meta for parameter in other.parameters())


# In a process of its own, whose heap holds no room that other tests have left.
READ_BACK = """
from pathlib import Path
from nsvq.diffusion.dit import DiT
from nsvq.pipelines.export import from_stock, to_stock

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

stock = to_stock(DiT(4, 3, num_classes=6, depth=8, width=512, heads=4))
size = sum(weights.nbytes for weights in stock.parameters())
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
from_stock(stock)
print((resident("VmHWM") - before) / size)
"""


@pytest.mark.slow
def test_reading_a_network_back_holds_no_more_memory_than_the_stock_class():
    done = subprocess.run([sys.executable, "-c", READ_BACK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.15


# Loads a folder where this project is not installed, and samples.
ELSEWHERE = """
import json, sys, torch
sys.modules |= dict.fromkeys(["nsvq"])  # None: importing it fails
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
images = pipeline(**json.loads(sys.argv[3]), num_inference_steps=4, generator=generator, output_type="np").images
torch.save((type(pipeline).__name__, torch.as_tensor(images)), sys.argv[2])
"""


def load_elsewhere(folder, tmp_path, **arguments):
    """(class of the pipeline, images [N, H, W, 3]) by an interpreter that finds no package of this project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "images.pt"), json.dumps(arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "images.pt")


@pytest.mark.slow
def test_modern_ships_its_code_and_loads_where_the_project_is_not(vae, tmp_path):
    torch.manual_seed(4)
    model = DiT(4, 3, num_classes=5, depth=2, width=64, heads=2, variant="modern")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "pipeline"
    save_pipeline(folder, to_stock(model), vae, flow_scheduler(1.5), NAMES)
    shipped = folder / "transformer" / "nsvq_dit.py"
    imported = {
        word
        for line in shipped.read_text().splitlines()
        if line.startswith(("import ", "from "))
        for word in [line.split()[1].split(".")[0]]
    }
    assert imported == {"typing", "torch", "diffusers"}
    name, images = load_elsewhere(folder, tmp_path, class_labels=[0, 4], guidance_scale=3.0)
    assert name == "DiTPipeline"
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    own = ClassConditionalPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    assert type(own.transformer).__module__ == "nsvq.diffusion.dit"
    assert own.id2label == NAMES
    generator = torch.Generator().manual_seed(3)
    expected = own([0, 4], guidance_scale=3.0, num_inference_steps=4, generator=generator, output_type="np").images
    assert expected.std() > 0.05
    torch.testing.assert_close(images, torch.as_tensor(expected), rtol=0, atol=1e-4)
    own.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "transformer" / "nsvq_dit.py").read_bytes() == shipped.read_bytes()


def test_a_unet_with_classes_is_guided_in_the_stock_dit_pipeline(vae, tmp_path):
    model = random_unet(5)
    folder = tmp_path / "pipeline"
    save_pipeline(folder, to_stock(model), vae, DDIMScheduler(clip_sample=False), NAMES)
    assert not list(folder.rglob("*.py"))
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert (type(loaded), type(loaded.transformer)) == (DiTPipeline, UNet2DModel)
    latents, null = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 5])
    images = loaded(
        [1, 4], guidance_scale=2.0, num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).images
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_class, without = (model(latents, t.expand(2), y) for y in (torch.tensor([1, 4]), null))
            latents = scheduler.step(without + 2.0 * (with_class - without), t, latents).prev_sample
        expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert ClassConditionalPipeline.from_pretrained(folder).id2label == NAMES


def test_a_unet_without_classes_is_the_stock_ldm_pipeline(vae, about, tmp_path):
    model = random_unet(0)
    folder = tmp_path / "pipeline"
    about = about | {"config": about["config"] | {"model": {"variant": "unet", "class_dropout": 0.1}}}
    save_pipeline(folder, to_stock(model), vae, DDIMScheduler(clip_sample=False), {}, about)
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LDMPipeline
    images = loaded(2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(model(latents, t.expand(2), torch.zeros(2)), t, latents).prev_sample
        expected = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.as_tensor(images), expected.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    own = ClassConditionalPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    evaluated = []
    own.transformer.register_forward_hook(lambda _, inputs, output: evaluated.append(len(output.sample)))
    again = own(
        [None, None],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=5,
        guidance_scale=2.0,
        output_type="np",
    ).images
    torch.testing.assert_close(torch.as_tensor(again), torch.as_tensor(images), rtol=0, atol=1e-5)
    assert evaluated == [2] * 5  # guidance has nothing to guide from
    with pytest.raises(ValueError, match="class 0 does not exist: there are none"):
        own(0)
    own.save_pretrained(tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is LDMPipeline
    card = (folder / "README.md").read_text()
    assert "# Unconditional U-Net" in card
    assert "pipeline([None], seeds=[0])" in card
    assert "pipeline(num_inference_steps=50)" in card


def test_an_unconditional_dit_gives_the_same_for_every_label_of_the_stock_pipeline(vae, tmp_path):
    model = DiT(4, 3, num_classes=0, depth=2, width=64, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "pipeline"
    save_pipeline(folder, to_stock(model), vae, flow_scheduler(1.5), {})
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    images = [
        loaded(
            [label],
            guidance_scale=3.0,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        for label in (0, 17, 1000)
    ]
    torch.testing.assert_close(images[1], images[0])
    torch.testing.assert_close(images[2], images[0])
    own = ClassConditionalPipeline.from_pretrained(folder)
    assert own.id2label == {}
    assert own([None], num_inference_steps=4, seeds=[3], output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", ["dit", "modern", "unet"])
def test_more_than_a_thousand_classes_leave_1000_to_no_class_in_the_stock_pipeline(kind, vae, tmp_path):
    torch.manual_seed(4)
    count = 1203
    if kind == "unet":
        model = random_unet(count)
    else:
        model = DiT(4, 3, num_classes=count, depth=1, width=16, heads=2, variant=kind)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    folder, names = tmp_path / "pipeline", {i: f"name {i}" for i in range(count)}
    save_pipeline(folder, to_stock(model), vae, flow_scheduler(1.5), names)
    own = ClassConditionalPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    assert own.id2label == names
    assert own.class_ids(["name 999", "name 1000", "name 1202", None]) == [999, 1000, 1202, count]
    assert ClassConditionalPipeline(own.transformer, vae, own.scheduler).id2label == {i: str(i) for i in range(count)}
    stock = DiTPipeline(own.transformer if kind == "modern" else to_stock(model), vae, own.scheduler, names)
    stock = stock if kind == "modern" else DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    if kind != "modern":
        assert stock.get_label_ids(["name 999", "name 1000"]) == [999, 1001]
    labels, latents = torch.tensor([0, 999, 1000, 1202, count]), torch.randn(5, 3, 4, 4)
    time = torch.full((5,), 300)
    with torch.no_grad():
        expected = model(latents, time, labels)
        got = own.transformer(latents, timestep=time, class_labels=torch.tensor([0, 999, 1001, 1203, 1000])).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected[2] - expected[4]).abs().max() > 1e-3
    how = {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "pt"}
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    same = stock([999, 1001], generator=generator, **how).images
    torch.testing.assert_close(own([999, 1000], seeds=[1, 2], **how).images, same, rtol=0, atol=1e-4)
    own.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert again["id2label"] == json.loads((folder / "model_index.json").read_text())["id2label"]


def test_a_saved_folder_names_classes_of_diffusers_only(folder):
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    assert index["_class_name"] == "DiTPipeline"
    assert parts.keys() == {"transformer", "vae", "scheduler"}
    for name, (library, class_name) in parts.items():
        assert library == "diffusers"
        assert hasattr(diffusers, class_name)
        config = next((folder / name).glob("*config.json"))
        assert json.loads(config.read_text())["_class_name"] == class_name
    assert not list(folder.rglob("*.py"))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


def test_stock_diffusers_loads_what_was_saved(folder, dit, vae):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is DiTPipeline
    assert type(loaded.transformer) is DiTTransformer2DModel
    assert type(loaded.vae) is VQModel
    assert loaded.scheduler.config.flow_shift == 1.5
    expected = to_stock(dit).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.transformer.state_dict().items())
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.vae.state_dict().items())


def test_class_names_survive_saving_and_loading(folder, pipeline, tmp_path):
    stock = DiffusionPipeline.from_pretrained(folder)
    assert stock.get_label_ids(["goldfish", "Tinca tinca", "golden retriever"]) == [1, 0, 4]
    assert pipeline.id2label == NAMES
    pipeline.save_pretrained(tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is DiTPipeline
    assert DiffusionPipeline.from_pretrained(tmp_path / "again").labels == stock.labels
    assert ClassConditionalPipeline.from_pretrained(tmp_path / "again").id2label == NAMES


def test_a_folder_that_stock_diffusers_saved_again_still_loads_with_its_number_of_classes(folder, tmp_path):
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "stock")
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path / "stock")
    assert loaded.id2label == {i: str(i) for i in range(5)}


def test_a_failed_save_leaves_the_folder_as_it_was_and_a_good_one_replaces_it(
    folder, dit, vae, pipeline, tmp_path, monkeypatch
):
    target = tmp_path / "pipeline"
    shutil.copytree(folder, target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VQModel, "save_pretrained", full)
        with pytest.raises(OSError, match="no space"):
            save_pipeline(target, to_stock(dit), vae, pipeline.scheduler, {0: "other"})
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    save_pipeline(target, to_stock(dit), vae, pipeline.scheduler, {0: "other"})
    assert ClassConditionalPipeline.from_pretrained(target).id2label == {0: "other"}
    assert not (target / "README.md").exists()  # nothing of the old folder stays
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
