import json

import yaml

from nsvq.common.config import to_dict
from nsvq.pipelines.card import write_card
from nsvq.tokenizer.config import TrainConfig


def test_card_says_what_was_trained_on_what_and_how(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front_matter = yaml.safe_load(front)
    assert front_matter["library_name"] == "diffusers"
    assert front_matter["datasets"] == ["someone/pets"]
    assert "arxiv:2606.11363" in front_matter["tags"]
    assert "license" not in front_matter  # for whoever publishes the model to say
    facts = [
        "someone/pets",
        "5000 training images",
        "16 x 16 pixels",
        "4 x 4 x 3",
        "Classes: 5",
        "golden retriever",
        "Steps: 400",
        "batch 256",
        "102400 samples",
        "0.0001",
        "s = 1.5",
        "7 images did not decode",
        "1.0100",
        "0.9000 to 1.1000",
        "0.2000",
        "abc123",
        "torch 2.6.0",
        "Not measured yet",
        "2606.11363",
        "1.2 M parameters",
    ]
    assert [fact for fact in facts if fact not in " ".join(body.split())] == []


def test_card_tells_how_the_tokenizer_was_trained_where_its_folder_says_so(folder):
    about = json.loads((folder / "nsvq.json").read_text())
    config = to_dict(
        TrainConfig(data={"source": "someone/birds"}, schedule={"epochs": 60}, nsvq={"freeze": {"latest": 40}})
    )
    (folder / "nsvq.json").write_text(json.dumps(about | {"tokenizer": {"config": config, "samples_seen": 12345}}))
    text = " ".join(write_card(folder).read_text().split())
    nsvq = "NSVQ (NS loss 0.1 at temperature 0.35, dead codes replaced after epoch 5, encoder frozen by epoch 40)"
    facts = [
        f"quantizer vq, {nsvq}; 12345 samples of `someone/birds` in 60 epochs",
        "perceptual loss vgg",
        "GAN weight 0.1",
        "SHA-256 abc123",
    ]
    assert [fact for fact in facts if fact not in text] == []
    config |= to_dict(TrainConfig(nsvq=None))
    (folder / "nsvq.json").write_text(json.dumps(about | {"tokenizer": {"config": config, "samples_seen": 12345}}))
    assert "quantizer vq, without NSVQ;" in " ".join(write_card(folder).read_text().split())
    (folder / "nsvq.json").write_text(json.dumps(about))
    write_card(folder)


def test_code_on_the_card_is_python(folder):
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")


def test_measured_numbers_come_onto_the_card_and_replace_older_ones(folder):
    result = {
        "metrics": {"fid": 12.345678, "recall": None},
        "protocol": "adm",
        "meanings": {"fid": "Frechet distance to test images", "recall": "share of real images"},
        "counts": {"samples": 200},
        "data": {"split": "test", "source": "someone/pets"},
        "setting": {"guidance_scale": 1.5, "steps": 25},
        "seeds": "sample i has seed 7 + i",
        "versions": {"nsvq": "0.1.0+abc"},
        "skipped": {"kid": "needs 1,000 images"},
        "warnings": ["recall is nan"],
        "command": "eval/generation.py --samples 200",
    }
    write_card(folder, {"Generation": result})
    text = (folder / "README.md").read_text()
    parts = [
        "### Generation",
        "| fid | 12.346 | Frechet distance to test images |",
        "| recall | - |",
        "recall is nan",
        "| kid | skipped | needs 1,000 images |",
        "eval/generation.py --samples 200",
        "Protocol `adm`: 200 samples, test split of someone/pets, guidance 1.5, 25 steps, sample i has seed 7 "
        "+ i; nsvq 0.1.0+abc.",
    ]
    assert [part for part in parts if part not in text] == []
    assert "Not measured yet" not in text
    write_card(folder)
    assert "12.346" not in (folder / "README.md").read_text()
