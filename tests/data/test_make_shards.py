import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from nsvq.data import make_shards as tool
from nsvq.data.batches import eval_batches
from nsvq.data.config import DataConfig
from nsvq.data.images import center_crop, resize_short_side
from nsvq.data.sources import open_split
from nsvq.errors import UserError


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """25 pictures in two classes, of which number 3 is damaged, and 5 test pictures."""
    for split, numbers in (("train", range(25)), ("test", range(100, 105))):
        for i in numbers:
            path = tmp_path / "data" / split / ("ant", "bee")[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"damaged" if i == 3 else picture(i))
    return DataConfig(source=str(tmp_path / "data"), image_size=8, max_bad_fraction=0.1)


def contents(config, split):
    """label and pixels of each image."""
    data = open_split(config, split)
    found = []
    for i in range(len(data)):
        try:
            image, label = data.load(i)
        except tool.BadImage:
            continue
        resize = resize_short_side if split == "train" else center_crop
        found.append((label, np.asarray(resize(image, 8)).tobytes()))
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_every_image_resized_with_its_label_and_are_read_by_our_own_loader(source, tmp_path, workers):
    out = tmp_path / "shards"
    made = tool.make_shards(tool.ShardConfig(output=out, data=source, format="png", shard_images=10, workers=workers))
    assert made == {"train": 24, "test": 5, "bad": 1}
    assert "003.png" in (out / "bad-images.txt").read_text()
    shards = source.model_copy(update={"source": str(out), "class_names": str(out / "classes.txt")})
    for split in ("train", "test"):
        assert contents(shards, split) == contents(source, split)
        assert open_split(shards, split).classes == ["ant", "bee"]
    assert sum(len(batch["label"]) for batch in eval_batches(shards, "train", batch_size=4)) == 24
    # Written again from shards, they hold the same.
    again = tool.ShardConfig(output=tmp_path / "again", data=shards, format="png", workers=0)
    assert tool.make_shards(again) == {"train": 24, "test": 5, "bad": 0}
    assert contents(shards.model_copy(update={"source": str(tmp_path / "again")}), "train") == contents(source, "train")


def test_jpegs_keep_the_resolution_of_colours_and_with_random_crops_as_much_as_these_need(source, tmp_path):
    out = tmp_path / "shards"
    tool.make_shards(tool.ShardConfig(output=out, data=source, random_crops=True, workers=0))
    shards = source.model_copy(update={"source": str(out)})
    for split, size in (("train", (17, 10)), ("test", (8, 8))):  # of 20 x 12: ADM's random crops begin at 8 / 0.8
        images = open_split(shards, split)
        for i in range(len(images)):
            with Image.open(io.BytesIO(images.encoded(i))) as image:
                assert (image.size, get_sampling(image)) == (size, 0)
    with pytest.raises(UserError, match=r"holds other shards .*random_crops: True -> False"):
        tool.make_shards(tool.ShardConfig(output=out, data=source, workers=0))


def test_what_is_there_stays_after_an_interruption_and_other_shards_are_refused(source, tmp_path, monkeypatch):
    config = tool.ShardConfig(output=tmp_path / "shards", data=source, format="png", shard_images=10, workers=0)
    real, calls = tarfile.TarFile.addfile, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 30:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(UserError, match=r"No space left on device.*the same command goes on from here"):
            tool.make_shards(config)
    assert [path.name for path in sorted(config.output.glob("*.tar"))] == ["train-000000.tar"]
    assert not list(config.output.glob("*.part"))
    first = (config.output / "train-000000.tar").stat().st_mtime_ns
    assert tool.make_shards(config) == {"train": 24, "test": 5, "bad": 1}
    assert (config.output / "train-000000.tar").stat().st_mtime_ns == first
    with pytest.raises(UserError, match=r"holds other shards .*shard_images: 10 -> 5"):
        tool.make_shards(config.model_copy(update={"shard_images": 5}))


def test_too_many_bad_images_end_the_tool(source, tmp_path):
    strict = source.model_copy(update={"max_bad_fraction": 0.01})
    with pytest.raises(UserError, match=r"1 of 30 images do not decode \(train\["):
        tool.make_shards(tool.ShardConfig(output=tmp_path / "shards", data=strict, workers=0))
