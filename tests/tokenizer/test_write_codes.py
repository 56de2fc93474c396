import json

import numpy as np
import pytest
import torch

from nsvq.data.config import DataConfig
from nsvq.data.images import several_crops, to_tensor
from nsvq.data.sources import open_split
from nsvq.errors import UsageError
from nsvq.tokenizer import encode
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.write_codes import main


@pytest.fixture
def options(tokenizer_folder, image_folder):
    data = ["--data", image_folder, "--data.holdout", 0.2]
    return [*data, "--tokenizer", tokenizer_folder, "--cache_crops", 2, "--workers", 0]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_the_arrays_hold_the_codes_of_every_view_and_say_what_they_are(
    run_script, options, tokenizer_folder, image_folder, tmp_path, monkeypatch, size, dtype
):
    high, real = size - 32, Tokenizer.encode  # the highest indices that the type has to hold
    monkeypatch.setattr(Tokenizer, "encode", lambda self, images: real(self, images) + high)
    monkeypatch.setattr(Tokenizer, "codebook_size", size)
    monkeypatch.setattr(encode, "SHARD_IMAGES", 16)
    monkeypatch.setattr(encode, "BATCH_IMAGES", 8)
    output = tmp_path / "codes"
    run_script(main, *options, "--output", output)
    assert sorted(path.name for path in output.iterdir()) == ["about.json", "codes.npy", "labels.npy"]
    codes, labels = np.load(output / "codes.npy", mmap_mode="r"), np.load(output / "labels.npy")
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    images = open_split(DataConfig(source=str(image_folder), image_size=16, holdout=0.2), "train")
    assert (codes.shape, codes.dtype) == ((37, 4, 4, 4), dtype)
    assert (labels.dtype, labels.tolist()) == (np.int64, images.labels().tolist())
    for i in range(0, 37, 6):
        pixels = to_tensor(several_crops(images.load(i)[0], 16, 2, images.id(i)))
        views = torch.stack([pixels, pixels.flip(-1)], 1).flatten(0, 1)  # each crop, then its mirror image
        assert codes[i].tolist() == tokenizer.encode(views).tolist()
    about = json.loads((output / "about.json").read_text())
    assert about["tokenizer"] == tokenizer.fingerprint()
    assert (about["codebook_size"], about["classes"], about["views"]) == (size, ["ant", "bee"], 4)
    assert (about["image_size"], about["crops"], about["flips"], about["images"]) == (16, 2, 2, 37)
    with pytest.raises(UsageError, match="holds codes already: delete it, or give a new name"):
        run_script(main, *options, "--output", output)


def test_codes_come_from_a_cache_that_a_trainer_filled_without_encoding_and_leave_it(
    run_script, options, tmp_path, monkeypatch
):
    run_script(main, *options, "--output", tmp_path / "a", "--cache", tmp_path / "cache", "--split", "test")
    monkeypatch.setattr(Tokenizer, "encode", None)
    run_script(main, *options, "--output", tmp_path / "b", "--cache", tmp_path / "cache", "--split", "test")
    for name in ("codes.npy", "labels.npy", "about.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(np.load(tmp_path / "b" / "labels.npy")) == 9
