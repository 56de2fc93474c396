import os
import shutil
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
import torch

from nsvq.data import shards as reading
from nsvq.data import sources
from nsvq.data.batches import eval_batches, train_batches
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.sources import open_split
from nsvq.data.tables import expand_braces, note
from nsvq.errors import UsageError, UserError

CLASSES = 4


@pytest.fixture
def shards(tmp_path, png, write_shard):
    """shards(counts, damaged=...) -> a config of train shards with so many samples, and one test shard of seven."""

    def make(counts: list[int], damaged: tuple = (), **more) -> DataConfig:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        sources._open.cache_clear()
        number = 0
        for s, count in enumerate(counts):
            samples = []
            for _ in range(count):
                data = b"damaged" if number in damaged else png(number)
                samples.append((f"s{s}/{number:05d}", {"png": data, "cls": str(number % CLASSES).encode()}))
                number += 1
            write_shard(tmp_path / "data" / f"train-{s:03d}.tar", samples)
        test = [(f"t{i}", {"png": b"damaged" if i == 2 else png(200 + i), "cls": b"1"}) for i in range(7)]
        write_shard(tmp_path / "data" / "test-000.tar", test)
        defaults = {"source": str(tmp_path / "data"), "image_size": 8}
        return DataConfig(**(defaults | more))

    return make


def numbers(batches) -> list[int]:
    """The number that each picture's colour tells."""
    return [int(x) for b in batches for x in ((b["image"][:, 0, 0, 0] + 1) * 127.5).round()]


def colours(images) -> list[int]:
    return [images.load(i)[0].getpixel((0, 0))[0] for i in range(len(images))]


def take(config, count, **how):
    return list(islice(train_batches(config, seed=5, **how), count))


def opened_again(config, split="train"):
    """As another process would."""
    sources._open.cache_clear()
    return open_split(config, split)


def test_shards_have_splits_by_file_name_a_length_labels_and_classes_of_all_splits(shards):
    config = shards([5, 6])
    train, test = open_split(config, "train"), open_split(config, "test")
    assert train.classes == test.classes == ["0", "1", "2", "3"]
    assert train.fingerprint != test.fingerprint
    assert (len(train), len(test)) == (11, 7)
    assert train.labels().tolist() == [i % CLASSES for i in range(11)]
    assert colours(train) == list(range(11))
    assert (train.id(0), train.id(10)) == ("train-000.tar:s0/00000", "train-001.tar:s1/00010")
    named = DataConfig(source=config.source.replace("data", "data/train-{001..001}.tar"), test_split="train")
    assert colours(open_split(named, "train")) == list(range(5, 11))


def test_shards_give_the_batches_of_a_table_of_the_same_images(shards, tmp_path, png):
    config = shards([13, 14], damaged=(3, 11))
    rows = [{"bytes": b"damaged" if i in (3, 11) else png(i), "path": None} for i in range(27)]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    table = datasets.Dataset.from_dict({"image": rows, "label": [i % CLASSES for i in range(27)]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    same = config.model_copy(update={"source": str(tmp_path / "train.parquet"), "test_split": "train"})
    assert open_split(same, "train").fingerprint == open_split(config, "train").fingerprint
    for a, b in zip(take(config, 20, batch_size=4), take(same, 20, batch_size=4), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("image", "label", "index"))
        assert len(a["bad"]) == len(b["bad"])


def test_labels_and_indices_belong_to_their_images(shards):
    for batch in take(shards([9, 9]), 5, batch_size=4):
        assert [n % CLASSES for n in numbers([batch])] == batch["label"].tolist()
        assert numbers([batch]) == batch["index"].tolist()


@pytest.mark.parametrize("counts", [[3] * 9, [27]], ids=["many shards", "one shard"])
def test_the_order_depends_on_no_number_of_ranks_workers_or_shards(shards, counts):
    config = shards(counts)
    alone = numbers(take(config, 54, batch_size=1))
    assert sorted(alone[:27]) == sorted(alone[27:]) == list(range(27))
    assert alone[:27] != alone[27:]
    ranks = [numbers(take(config, 27, batch_size=1, rank=r, world_size=2, workers=2 * r)) for r in range(2)]
    assert [n for pair in zip(*ranks, strict=True) for n in pair] == alone
    assert numbers(take(shards([14, 13]), 54, batch_size=1)) == alone


def test_shards_go_on_at_the_same_sample_and_read_nothing_before_it(shards, monkeypatch):
    config = shards([5, 4, 6, 5], damaged=(3, 11))
    whole = take(config, 16, batch_size=3)
    for done in (1, 4, 9):
        tail = take(config, 4, start=done * 3, batch_size=3, workers=2)
        for a, b in zip(whole[done:], tail, strict=False):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])
            assert a["bad"] == b["bad"]
    reads, read = [], reading.Shards.read
    monkeypatch.setattr(reading.Shards, "read", lambda self, row: reads.append(row) or read(self, row))
    config = shards([10, 10])
    open_split(config, "train")  # which reads some for its fingerprint
    reads.clear()
    take(config, 1, batch_size=2, start=200)
    assert len(reads) == 2


def test_a_bad_image_of_a_shard_is_listed_and_replaced(shards):
    batches = take(shards([10], damaged=(4,)), 15, batch_size=2)
    assert all(len(b["label"]) == 2 for b in batches)
    bad = [id for b in batches for id in b["bad"]]
    assert set(bad) == {"train-000.tar:s0/00004"}
    assert 4 not in numbers(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_a_shard_is_evaluated_exactly_once_over_ranks(shards, workers):
    config = shards([3])
    ranks = [list(eval_batches(config, "test", batch_size=2, rank=r, world_size=2, workers=workers)) for r in range(2)]
    assert sorted(numbers(ranks[0] + ranks[1])) == [200, 201, 203, 204, 205, 206]
    assert [id for b in ranks[0] + ranks[1] for id in b["bad"]] == ["test-000.tar:t2"]
    limited = [list(eval_batches(config, "test", batch_size=2, rank=r, world_size=2, limit=5)) for r in range(2)]
    assert sum(len(b["label"]) + len(b["bad"]) for b in limited[0] + limited[1]) == 5


def test_without_test_shards_a_fixed_share_of_samples_is_held_out(shards):
    config = shards([100, 100])
    config = config.model_copy(update={"source": config.source + "/train-*.tar", "holdout": 0.2})
    train, test = colours(open_split(config, "train")), colours(open_split(config, "test"))
    assert len(test) == 40
    assert sorted(train + test) == list(range(200))
    assert min(test) < 100 < max(test)


# Labels


def label_shard(tmp_path, png, write_shard, labels: list[bytes | None], **more) -> DataConfig:
    samples = [(f"k{i}", {"png": png(i)} | ({} if label is None else {"cls": label})) for i, label in enumerate(labels)]
    write_shard(tmp_path / "train.tar", samples)
    return DataConfig(source=str(tmp_path / "train.tar"), test_split="train", **more)


def test_text_labels_take_their_place_in_the_class_names(tmp_path, png, write_shard):
    labelled = [("a", {"png": png(1), "cls.txt": b"fig"}), ("b", {"png": png(2), "cls.txt": b"pear\n"})]
    write_shard(tmp_path / "train.tar", [*labelled, ("c", {"png": png(3), "cls.txt": b"fig"})])
    names = tmp_path / "names.txt"
    names.write_text("pear\nfig\n")
    source = {"source": str(tmp_path / "train.tar"), "test_split": "train"}
    assert open_split(DataConfig(**source), "train").labels().tolist() == [0, 1, 0]
    named = DataConfig(**source, class_names=str(names))
    assert open_split(named, "train").labels().tolist() == [1, 0, 1]
    names.write_text("pear\nplum\n")
    with pytest.raises(UserError, match=r"label 'fig' of train\.tar:a is none of those in data\.class_names"):
        opened_again(named)


def test_a_sample_without_a_label_has_none(tmp_path, png, write_shard):
    images = open_split(label_shard(tmp_path, png, write_shard, [b"2", None, b"-1", b" 0\n", b""]), "train")
    assert images.labels().tolist() == [2, -1, -1, 0, -1]
    assert images.classes == ["0", "1", "2"]
    images = opened_again(label_shard(tmp_path, png, write_shard, [None, None]))
    assert (images.labels().tolist(), images.classes) == ([-1, -1], [])


def test_a_label_outside_the_classes_is_an_error_that_names_it(tmp_path, png, write_shard):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    for labels, more, message in (
        ([b"0", b"2"], {"class_names": str(names)}, r"label 2 of train\.tar:k1 is outside the classes 0\.\.1"),
        ([b"-2", b"0"], {}, r"label -2 of train\.tar:k0 is outside the classes 0\.\.0"),
        ([b"0", b"1000000"], {}, r"labels go up to 1000000: these are no class ids"),
        ([b"0", b"x" * 2000], {}, r"k1\.cls is no class label, for it has 2000 bytes"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            opened_again(label_shard(tmp_path, png, write_shard, labels, **more))
        assert "\n" not in str(caught.value)


# Shards that can't be read


def test_shards_that_cannot_be_read_say_so(tmp_path, png, write_shard):
    path = tmp_path / "train-0.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"cannot read the shard .*train-0\.tar"):
        open_split(DataConfig(source=str(path)), "train")
    write_shard(path, [])
    with pytest.raises(UserError, match="no samples"):
        open_split(DataConfig(source=str(path)), "train")
    write_shard(path, [("a", {"txt": b"words", "json": b"{}"})])
    with pytest.raises(UsageError, match=r"data\.image_column to the image's field, one of txt, json"):
        open_split(DataConfig(source=str(path)), "train")
    write_shard(path, [("a", {"png": png(1), "cls": b"0"})])
    with pytest.raises(UsageError, match=r"has no field data\.label_column = 'kind': it has png, cls"):
        open_split(DataConfig(source=str(path), label_column="kind"), "train")


@pytest.mark.parametrize("damage", ["cut in a header", "cut in an image", "cut between files", "header overwritten"])
def test_a_damaged_shard_ends_the_run_and_is_named(shards, damage):
    config = shards([20])
    path = Path(config.source) / "train-000.tar"
    open_split(config, "train")  # the index of the whole shard does not hide it
    with tarfile.open(path) as tar:
        member = tar.getmembers()[20]
    data = bytearray(path.read_bytes())
    if damage == "header overwritten":
        data[member.offset : member.offset + 200] = b"?" * 200
    else:
        end = {"cut in a header": 100, "cut in an image": 512 + 10, "cut between files": 0}[damage]
        data = data[: member.offset + end]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard .*train-000\.tar"):
        opened_again(config)


def test_a_shard_that_vanishes_or_is_cut_off_during_a_run_gives_bad_images(shards):
    config = shards([20])
    images, path = open_split(config, "train"), Path(config.source) / "train-000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadImage, match=r"train-000\.tar has become shorter"):
        images.load(19)
    path.unlink()
    with pytest.raises(BadImage, match=r"train-000\.tar cannot be read"):
        images.load(19)


def test_a_sample_without_an_image_is_a_bad_image(tmp_path, png, write_shard):
    write_shard(tmp_path / "train.tar", [("a", {"png": png(1)}), ("b", {"cls": b"1"})])
    images = open_split(DataConfig(source=str(tmp_path / "train.tar"), test_split="train"), "train")
    assert images.load(0)[1] == -1
    with pytest.raises(BadImage, match=r"train\.tar:b"):
        images.load(1)


# The index


def test_a_shard_is_indexed_once_and_again_when_it_changes(shards, png, write_shard, monkeypatch):
    config = shards([3, 4])
    scans, scan = [], reading._scan
    monkeypatch.setattr(reading, "_scan", lambda shard, *fields: scans.append(Path(shard).name) or scan(shard, *fields))
    first = open_split(config, "train")
    assert sorted(scans) == ["test-000.tar", "train-000.tar", "train-001.tar"]
    again = opened_again(config)
    assert len(scans) == 3
    assert (again.fingerprint, again.classes, again.id(5)) == (first.fingerprint, first.classes, first.id(5))
    assert colours(again) == list(range(7))

    path = Path(config.source) / "train-001.tar"
    size = path.stat().st_size
    write_shard(path, [(f"s1/{i:05d}", {"png": png(i), "cls": b"3"}) for i in range(90, 94)])
    assert path.stat().st_size == size
    os.utime(path, (1, 1))
    changed = opened_again(config)
    assert (changed.id(3), changed.labels()[3]) == ("train-001.tar:s1/00090", 3)
    assert scans[3:] == ["train-001.tar"]
    opened_again(config)
    assert len(scans) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_index_is_made_anew(shards, damage):
    config = shards([30])
    found = open_split(config, "train")
    for path in reading.CACHE.iterdir():
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle] ^= 0xFF
        path.write_bytes({"empty": b"", "cut": data[:middle], "flipped": data}[damage])
    again = opened_again(config)
    assert again.fingerprint == found.fingerprint
    assert colours(again) == list(range(30))
    assert [again.id(i) for i in range(30)] == [found.id(i) for i in range(30)]


def test_an_index_that_cannot_be_kept_is_said_and_made_each_time(shards, monkeypatch, tmp_path, capsys):
    note.cache_clear()
    (tmp_path / "file").touch()
    monkeypatch.setattr(reading, "CACHE", tmp_path / "file" / "index")
    assert colours(open_split(shards([3]), "train")) == [0, 1, 2]
    assert capsys.readouterr().err.count("the index of the shards is not kept") == 1


def test_processes_may_index_the_same_shards_at_once(shards, tmp_path):
    config = shards([40] * 5)
    code = (
        "import sys; from nsvq.data.sources import *; from nsvq.data.config import *\n"
        "images = open_split(DataConfig(source=sys.argv[1]), 'train')\n"
        "print(len(images), images.fingerprint)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "shared")}
    command = [sys.executable, "-c", code, config.source]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    outputs = {process.communicate()[0].split()[-1] for process in running}
    assert outputs == {open_split(config, "train").fingerprint}
    kept = sorted(path.name for path in (tmp_path / "shared" / "nsvq" / "shards").iterdir())
    assert len(kept) == 6  # no parts are left
    assert all(len(name) == 32 + len(".npz") for name in kept)


def test_remote_shards_are_read_as_local_ones(shards):
    config = shards([5, 4])
    memory = fsspec.filesystem("memory")
    for s in range(2):
        memory.pipe(f"/nsvq/train-{s}.tar", Path(f"{config.source}/train-00{s}.tar").read_bytes())
    remote = config.model_copy(update={"source": "memory://nsvq/train-{0..1}.tar", "test_split": "train"})
    images = open_split(remote, "test")
    assert images.classes == ["0", "1", "2", "3"]
    assert images.fingerprint == open_split(config, "train").fingerprint
    assert sorted(numbers(eval_batches(remote, "test", batch_size=4))) == list(range(9))
    memory.rm("/nsvq/train-1.tar")
    with pytest.raises(UserError, match=r"cannot read the shard memory://nsvq/train-1\.tar"):
        opened_again(remote)


def test_braces_expand_to_ranges_and_choices():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("plain") == ["plain"]
