"""Two processes (gloo) against one, through the evaluations themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from two_ranks import run


@pytest.fixture(scope="module")
def cases(tokenizer_folder, image_folder, tiny_extractor, tmp_path_factory):
    """Evaluations by name: (which, options)."""
    common = {
        "data": {"source": str(image_folder), "max_bad_fraction": 0.5},
        "output": str(tmp_path_factory.mktemp("output") / "result.json"),
        "features": [tiny_extractor],
        "cache": None,
        "workers": 0,
    }
    pixels = np.random.default_rng(0).integers(0, 256, (41, 16, 16, 3), dtype=np.uint8)
    images = tmp_path_factory.mktemp("given") / "images.npz"
    np.savez_compressed(images, arr_0=pixels, arr_1=np.arange(41) % 3)
    recon = {**common, "tokenizer": str(tokenizer_folder), "lpips": ["none"]}
    return {
        "reconstruction": (
            "reconstruction",
            {**recon, "batch_size": 5, "pfid": {"alpha": 0.7, "beta": 0.6, "delta": 5}},
        ),
        "one image": ("reconstruction", {**recon, "limit": 1}),  # nothing is left for the second rank
        "drift": ("reconstruction", {**recon, "compare": str(tokenizer_folder), "protocol": "ours", "batch_size": 2}),
        "generation": ("generation", {**common, "pipeline": "fake", "samples": 31, "batch_size": 4}),
        "images": ("generation", {**common, "images": str(images), "batch_size": 4}),
        "probe": ("probe", {k: recon[k] for k in ("data", "output", "workers", "tokenizer")} | {"neighbours": 3}),
    }


@pytest.fixture(scope="module")
def ranks(cases, torchrun, tmp_path_factory):
    """What each of two ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(cases))
    code, errors = torchrun(Path(__file__).with_name("two_ranks.py"), folder)
    assert code == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]


@pytest.mark.parametrize("name", ["reconstruction", "one image", "drift", "generation", "images", "probe"])
def test_two_ranks_give_the_numbers_of_one(name, cases, ranks):
    which, options = cases[name]
    alone = run(which, {**options, "batch_size": 9}, Accelerator(cpu=True))
    together = ranks[0][name]
    assert together["ranks"] == 2
    assert alone["ranks"] == 1
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert together.get("usage_histogram") == alone.get("usage_histogram")
    assert together["counts"] == alone["counts"]
    assert together["skipped"] == alone["skipped"]
    assert ranks[1][name] is None


def test_an_image_that_two_ranks_counted_is_an_error(ranks):
    assert ranks[0]["twice"] == "an image was counted twice"


def test_all_ranks_hear_of_a_failed_download_and_none_tries_it_again(ranks):
    assert ranks[0]["fail"] == ["no weights", 1]
    assert ranks[1]["fail"] == ["no weights", 0]
