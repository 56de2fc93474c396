import json
import subprocess
import sys
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from nsvq.common import config as configs
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import eval_batches, fixed_images, train_batches
from nsvq.data.config import DataConfig
from nsvq.data.sources import open_split
from nsvq.errors import UserError

SYNTHETIC = DataConfig(source="synthetic", image_size=16)


@pytest.fixture
def folder(tmp_path, png):
    """folder(n, damaged=...) -> a config of n pictures in one class folder and a test split of the same."""

    def make(n: int, damaged: tuple = (), **more) -> DataConfig:
        for split in ("train", "test"):
            (tmp_path / "data" / split / "a").mkdir(parents=True)
            for i in range(n):
                data = b"damaged" if i in damaged else png(i)
                (tmp_path / "data" / split / "a" / f"{i:03d}.png").write_bytes(data)
        return DataConfig(source=str(tmp_path / "data"), image_size=8, **more)

    return make


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("image", "label", "index")) and a["bad"] == b["bad"]


def joined(batches: list[dict]) -> dict:
    tensors = {key: torch.cat([b[key] for b in batches]) for key in ("image", "label", "index")}
    return {**tensors, "bad": [id for b in batches for id in b["bad"]]}


def take(config: DataConfig, count: int, **how) -> list[dict]:
    return list(islice(train_batches(config, seed=3, **how), count))


def test_batches_keep_their_contract():
    batch = take(SYNTHETIC, 1, batch_size=5)[0]
    assert batch["image"].shape == (5, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < -0.2 < 0.2 < batch["image"].max() <= 1
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert batch["bad"] == []
    assert torch.equal(batch["label"], batch["index"] % 10)  # synthetic classes take turns


def test_short_form_names_the_source():
    class Section(configs.Config):
        data: DataConfig = DataConfig()

    assert configs.parse(Section, ["--data", "synthetic"]).data.source == "synthetic"
    parsed = configs.parse(Section, ["--data", "synthetic", "--data.image_size", "64"]).data
    assert (parsed.source, parsed.image_size) == ("synthetic", 64)


def test_two_ranks_see_the_sequence_of_one():
    one = joined(take(SYNTHETIC, 8, batch_size=4))
    ranks = [take(SYNTHETIC, 4, batch_size=4, rank=r, world_size=2) for r in range(2)]
    assert same(one, joined([batch for pair in zip(*ranks, strict=True) for batch in pair]))


def test_workers_do_not_change_the_sequence():
    for alone, helped in zip(
        take(SYNTHETIC, 5, batch_size=4), take(SYNTHETIC, 5, batch_size=4, workers=2), strict=True
    ):
        assert same(alone, helped)


def test_batch_size_does_not_change_the_sequence_and_the_seed_does():
    assert same(joined(take(SYNTHETIC, 6, batch_size=2)), joined(take(SYNTHETIC, 2, batch_size=6)))
    other = next(train_batches(SYNTHETIC, batch_size=12, seed=4))
    assert not torch.equal(other["index"], joined(take(SYNTHETIC, 1, batch_size=12))["index"])


def test_a_start_goes_on_where_the_run_was_stopped(folder):
    config = folder(7, damaged=(2, 5))
    whole = joined(take(config, 10, batch_size=4))
    for start in (4, 12, 13):  # 7 images: the second is in the next epoch, the third within a batch
        tail = joined(take(config, 3, batch_size=4, start=start))
        for key in ("image", "label", "index"):
            assert torch.equal(tail[key], whole[key][start : start + 12])


def test_every_epoch_shows_each_image_once_in_another_order(folder):
    index = joined(take(folder(7), 21, batch_size=1))["index"].view(3, 7)
    assert (index.sort(1).values == torch.arange(7)).all()
    assert len({tuple(row.tolist()) for row in index}) == 3


def test_augmentation_differs_between_epochs(folder):
    config = folder(1, flip=False)  # 9 x 8 pixels of one colour: make the columns differ
    image = torch.arange(9 * 8 * 3, dtype=torch.uint8).view(8, 9, 3).numpy()
    Image.fromarray(image).save(f"{config.source}/train/a/000.png")
    images = joined(take(config, 40, batch_size=1))["image"]
    assert len({x.numpy().tobytes() for x in images}) == 2  # two places for 8 columns out of 9


def test_a_bad_image_is_listed_and_another_takes_its_place(folder):
    config = folder(10, damaged=(4,))
    batches = take(config, 10, batch_size=5)
    everything = joined(batches)
    assert len(everything["index"]) == 50
    assert 4 not in everything["index"]
    assert len(everything["bad"]) >= 5  # once an epoch, and now and then again as a replacement
    assert all("train[4]" in id and "004.png" in id for id in everything["bad"])
    colours = ((everything["image"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(colours, everything["index"])  # label, index and picture belong together
    assert all(same(a, b) for a, b in zip(batches, take(config, 10, batch_size=5, workers=2), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_never_decodes_ends_the_run_in_one_line(folder, workers):
    with pytest.raises(UserError, match=r"^\d+ images in a row do not decode: train\[") as caught:
        take(folder(3, damaged=(0, 1, 2)), 1, batch_size=2, workers=workers)
    assert "\n" not in str(caught.value)


def test_fixed_images_are_some_that_decode_of_all_classes(folder):
    config = folder(5, damaged=(0, 1, 2))
    assert fixed_images(config, "test", 2).shape == (2, 3, 8, 8)
    assert torch.equal(fixed_images(config, "test", 9), fixed_images(config, "test", 2))  # of all that there are
    synthetic = DataConfig(source="synthetic", image_size=32)
    first = next(eval_batches(synthetic, "test", batch_size=16))["image"]
    assert not torch.equal(fixed_images(synthetic, "test", 16), first)
    assert torch.equal(fixed_images(synthetic, "test", 16)[:5], fixed_images(synthetic, "test", 5))


def test_a_split_in_which_nothing_decodes_is_told(folder):
    with pytest.raises(UserError, match="none of the images to test on decodes"):
        fixed_images(folder(3, damaged=(0, 1, 2)), "test", 2)


def test_the_run_ends_when_the_share_of_bad_images_passes_the_limit(folder):
    config = folder(20, damaged=(3, 9), max_bad_fraction=0.05)
    bad = BadImages(config.max_bad_fraction, minimum=15)
    batches = list(eval_batches(config, "test", batch_size=5))
    bad.update(batches[0])
    assert bad.check() == 1  # 1 of 5, but too early to tell
    for batch in batches[1:3]:
        bad.update(batch)
    with pytest.raises(UserError, match=r"2 of 15 images do not decode \(test\[3\].*test\[9\].*max_bad_fraction"):
        bad.check()
    few = BadImages(0.1, minimum=100)
    for batch in batches:
        few.update(batch)
    assert few.check(final=True) == 2  # 2 of 20 does not pass 0.1
    few.limit = 0.09
    assert few.check() == 2
    with pytest.raises(UserError):
        few.check(final=True)


def test_counts_of_bad_images_survive_a_restart_and_each_is_told_once():
    one = BadImages(0.5)
    one.update({"label": [0, 1, 2], "bad": ["a"]})
    assert one.news() == ["a"]
    one.update({"label": [3], "bad": ["b", "b"]})
    two = BadImages(0.5)
    two.load_state_dict(one.state_dict())
    two.update({"label": [4], "bad": ["c"]})
    one.update({"label": [4], "bad": ["c"]})
    assert one.check() == two.check() == 4
    assert one._counts() == two._counts() == (4, 9)
    assert one.news() == two.news() == ["b", "c"]
    assert two.news() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_evaluated_exactly_once_over_ranks(folder, workers):
    config = folder(11, damaged=(6,))
    ranks = [list(eval_batches(config, "test", batch_size=2, rank=r, world_size=3, workers=workers)) for r in range(3)]
    everything = joined([batch for batches in ranks for batch in batches])
    assert sorted(everything["index"].tolist()) == [i for i in range(11) if i != 6]
    assert everything["bad"] == [id for id in everything["bad"] if "test[6]" in id]
    assert len(everything["bad"]) == 1


def test_evaluation_takes_the_centre_and_never_mirrors(folder):
    config = folder(1)
    image = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    Image.fromarray(image).save(f"{config.source}/test/a/000.png")
    batch = next(eval_batches(config, "test", batch_size=1))
    expected = torch.from_numpy(image[:, 3:11]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(batch["image"][0], expected)


def test_a_limit_takes_the_same_mixed_subset_on_any_number_of_ranks():
    one = joined(list(eval_batches(SYNTHETIC, "test", batch_size=16, limit=100)))
    assert len(set(one["index"].tolist())) == 100
    assert torch.bincount(one["label"], minlength=10).min() > 0
    assert one["index"].max() > 1500
    two = [
        joined(list(eval_batches(SYNTHETIC, "test", batch_size=16, limit=100, rank=r, world_size=2))) for r in (0, 1)
    ]
    assert sorted(torch.cat([t["index"] for t in two]).tolist()) == sorted(one["index"].tolist())


def test_a_batch_of_only_bad_images_is_empty(folder):
    batch = next(eval_batches(folder(2, damaged=(0, 1)), "test", batch_size=2))
    assert batch["image"].shape == (0, 3, 8, 8)
    assert len(batch["label"]) == len(batch["index"]) == 0
    assert len(batch["bad"]) == 2


def test_reading_data_leaves_the_random_state_of_training_alone():
    state = torch.random.get_rng_state()
    take(SYNTHETIC, 2, batch_size=2)
    list(eval_batches(SYNTHETIC, "test", batch_size=4, limit=8))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process_and_tells_data_apart(tmp_path, png):
    def write(name, first):
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["x", "y"]))
        rows = {"image": [{"bytes": png(first + i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
        for split in ("train", "test"):
            path = tmp_path / name / f"{split}-0.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return DataConfig(source=str(tmp_path / name))

    one, same_again, other = write("one", 0), write("again", 0), write("other", 1)
    found = open_split(one, "train").fingerprint
    code = (
        "import sys, json; from nsvq.data.batches import *; from nsvq.data.config import *; "
        "print(open_split(DataConfig(**json.loads(sys.argv[1])), 'train').fingerprint)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, json.dumps({"source": same_again.source})],
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split()[-1] == found
    assert len({found, open_split(one, "test").fingerprint, open_split(other, "train").fingerprint}) == 3
