import tarfile
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from nsvq.data.batches import eval_batches, train_batches
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.shards import expand_braces, shuffled
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError

CLASSES = 4


@pytest.fixture
def shards(tmp_path, png, write_shard):
    """shards(counts, damaged=...) -> a config of train shards with so many samples, and one test shard of seven."""

    def make(counts: list[int], damaged: tuple = (), **more) -> DataConfig:
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
        defaults = {"source": str(tmp_path / "data"), "image_size": 8, "shuffle_buffer": 4}
        return DataConfig(**(defaults | more))

    return make


def numbers(batches) -> list[int]:
    """The number that each picture's colour tells."""
    return [int(x) for b in batches for x in ((b["image"][:, 0, 0, 0] + 1) * 127.5).round()]


def take(config, count, **how):
    return list(islice(train_batches(config, seed=5, **how), count))


def test_a_stream_has_splits_by_file_name_and_classes_from_its_labels(shards):
    config = shards([5, 6])
    train, test = open_split(config, "train"), open_split(config, "test")
    assert train.classes == test.classes == ["0", "1", "2", "3"]
    assert train.fingerprint != test.fingerprint
    assert sum(1 for shard in train.shards for _ in train.samples(shard)) == 11
    named = DataConfig(source=config.source.replace("data", "data/train-{000..001}.tar"))
    assert len(open_split(named, "train").shards) == 2


def test_labels_belong_to_their_images(shards):
    for batch in take(shards([9, 9]), 5, batch_size=4):
        assert [n % CLASSES for n in numbers([batch])] == batch["label"].tolist()
        assert (batch["index"] == -1).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counts", [[3] * 9, [27]], ids=["many shards", "one shard"])
def test_ranks_and_workers_share_the_samples_of_an_epoch(shards, counts, workers):
    config = shards(counts, shuffle_buffer=1)
    # Four readers have 6 or more of the 27 each.
    seen = [numbers(take(config, 12, batch_size=1, rank=r, world_size=2, workers=workers)) for r in range(2)]
    assert len(set(seen[0]) | set(seen[1])) == 24
    later = [numbers(take(config, 80, batch_size=1, rank=r, world_size=2, workers=workers)) for r in range(2)]
    assert set(later[0]) | set(later[1]) == set(range(27))


def test_a_stream_is_shuffled_in_another_order_each_epoch(shards):
    config = shards([1] * 8, shuffle_buffer=1)
    seen = numbers(take(config, 24, batch_size=1))
    epochs = [tuple(seen[i : i + 8]) for i in (0, 8, 16)]
    assert all(set(epoch) == set(range(8)) for epoch in epochs)
    assert len(set(epochs)) == 3
    within = numbers(take(shards([20], shuffle_buffer=8), 20, batch_size=1))
    assert within != sorted(within)


def test_the_buffer_never_holds_a_sample_twice_at_first(shards):
    stream = open_split(shards([6, 4]), "train")
    _, buffer = next(shuffled(stream, 0, 0, 1, buffer_size=1000))
    assert len(buffer) == 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counts", [[5, 4, 6, 5], [20]], ids=["many shards", "one shard"])
def test_a_stream_goes_on_at_the_same_sample_after_a_stop(shards, counts, workers):
    config = shards(counts, damaged=(3, 11))
    for rank in range(2):
        how = {"batch_size": 3, "rank": rank, "world_size": 2, "workers": workers}
        whole = take(config, 16, **how)
        for done in (1, 4, 9):
            tail = take(config, 4, start=done * 3 * 2, **how)
            for a, b in zip(whole[done:], tail, strict=False):
                assert torch.equal(a["image"], b["image"])
                assert torch.equal(a["label"], b["label"])
                assert a["bad"] == b["bad"]


def test_what_was_consumed_is_passed_over_without_decoding(shards, monkeypatch):
    config = shards([10, 10])
    loads = []
    stream = type(open_split(config, "train"))
    load = stream.load
    monkeypatch.setattr(stream, "load", lambda self, sample: loads.append(sample) or load(self, sample))
    take(config, 1, batch_size=2, start=200)
    assert len(loads) == 2


def test_a_bad_image_of_a_stream_is_listed_and_replaced(shards):
    batches = take(shards([10], damaged=(4,)), 15, batch_size=2)
    assert all(len(b["label"]) == 2 for b in batches)
    bad = [id for b in batches for id in b["bad"]]
    assert set(bad) == {"train-000.tar:s0/00004"}
    assert 4 not in numbers(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_a_stream_is_evaluated_exactly_once_over_ranks(shards, workers):
    config = shards([3])
    ranks = [list(eval_batches(config, "test", batch_size=2, rank=r, world_size=2, workers=workers)) for r in range(2)]
    assert sorted(numbers(ranks[0] + ranks[1])) == [200, 201, 203, 204, 205, 206]
    assert [id for b in ranks[0] + ranks[1] for id in b["bad"]] == ["test-000.tar:t2"]
    limited = [list(eval_batches(config, "test", batch_size=2, rank=r, world_size=2, limit=5)) for r in range(2)]
    assert sorted(numbers(limited[0] + limited[1])) == [200, 201, 203, 204]


def test_without_test_shards_a_fixed_share_of_samples_is_held_out(shards):
    config = shards([100, 100])
    config = config.model_copy(update={"source": config.source + "/train-*.tar", "holdout": 0.2})
    parts = {}
    for split in ("train", "test"):
        stream = open_split(config, split)
        parts[split] = [sample.key for shard in stream.shards for sample in stream.samples(shard)]
    assert 20 <= len(parts["test"]) <= 60
    assert len(set(parts["train"]) | set(parts["test"])) == len(parts["train"]) + len(parts["test"]) == 200


def test_text_labels_take_their_place_in_the_class_names(tmp_path, png, write_shard):
    labelled = [("a", {"png": png(1), "cls.txt": b"fig"}), ("b", {"png": png(2), "cls.txt": b"pear\n"})]
    write_shard(tmp_path / "train.tar", [*labelled, ("c", {"png": png(3), "cls.txt": b"fig"})])
    names = tmp_path / "names.txt"
    names.write_text("pear\nfig\n")
    for more, expected in (({}, [0, 1, 0]), ({"class_names": str(names)}, [1, 0, 1])):
        stream = open_split(
            DataConfig(source=str(tmp_path / "train.tar"), train_split="train", test_split="train", **more), "train"
        )
        assert [stream.load(sample)[1] for sample in stream.samples(stream.shards[0])] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_outside_the_classes_ends_the_run_in_one_line(shards, tmp_path, workers):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"^label [23] of train-000\.tar:\S+ is outside the classes 0\.\.1$"):
        take(shards([8], class_names=str(names)), 8, batch_size=2, workers=workers)


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
        take(config, 40, batch_size=2)


def test_a_sample_without_an_image_is_a_bad_image(tmp_path, png, write_shard):
    write_shard(tmp_path / "train.tar", [("a", {"png": png(1)}), ("b", {"cls": b"1"})])
    stream = open_split(DataConfig(source=str(tmp_path / "train.tar"), test_split="train"), "train")
    samples = list(stream.samples(stream.shards[0]))
    assert stream.load(samples[0])[1] == -1
    with pytest.raises(BadImage, match=r"train\.tar:b"):
        stream.load(samples[1])


def test_remote_shards_are_read_from_front_to_back(shards):
    config = shards([5, 4])
    memory = fsspec.filesystem("memory")
    for s in range(2):
        memory.pipe(f"/nsvq/train-{s}.tar", Path(f"{config.source}/train-00{s}.tar").read_bytes())
    remote = config.model_copy(update={"source": "memory://nsvq/train-{0..1}.tar", "test_split": "train"})
    assert sorted(numbers(eval_batches(remote, "test", batch_size=4))) == list(range(9))
    with pytest.raises(UserError, match=r"data\.class_names"):
        open_split(remote, "test").classes  # noqa: B018


def test_braces_expand_to_ranges_and_choices():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("plain") == ["plain"]
