import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, VQModel

from common.errors import UserError
from diffusion.model import SIZES, DiT
from pipelines import ClassConditionalPipeline
from pipelines.export import save_pipeline, to_stock

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "golden retriever"}


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_exported_and_own_outputs_agree_with_and_without_class(size, patch_size):
    _, width, heads = SIZES[size]
    model = DiT(4, 3, num_classes=7, patch_size=patch_size, depth=1, width=width, heads=heads).eval()
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


def test_a_thousand_classes_are_exported_and_more_are_refused():
    model = DiT(4, 3, num_classes=1000, depth=1, width=16, heads=2)
    table = to_stock(model).transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(table, model.class_embed.weight)
    with pytest.raises(UserError, match="stock DiTPipeline hard-codes 1000 as its null class"):
        to_stock(DiT(4, 3, num_classes=1001, depth=1, width=16, heads=2))


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
