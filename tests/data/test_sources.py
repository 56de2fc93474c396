import http.server
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest

from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.sources import open_split
from nsvq.errors import UsageError, UserError


def colours(images) -> list[int]:
    """The number that each picture's colour tells."""
    return [images.load(i)[0].getpixel((0, 0))[0] for i in range(len(images))]


def labels(images) -> list[int]:
    return [images.load(i)[1] for i in range(len(images))]


@pytest.fixture
def tree(tmp_path, png):
    """tree({"train/cat/a.png": 3}) -> the config of a folder with these pictures."""

    def make(files: dict[str, int], **more) -> DataConfig:
        for name, i in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i))
        return DataConfig(source=str(tmp_path / "data"), **more)

    return make


@pytest.fixture
def parquet(tmp_path, png):
    """parquet(name, numbers, columns, features) writes a parquet file of pictures with more columns."""

    def write(name: str, numbers: list[int], columns: dict, image=None, **features) -> Path:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(
            {"picture": [{"bytes": png(i), "path": None} for i in numbers], **columns},
            features=datasets.Features(picture=image or datasets.Image(decode=False), **features),
        )
        table.to_parquet(path)
        return path

    return write


NAMES = datasets.ClassLabel(names=["cat", "dog"])


# Class folders


def test_class_folders_with_splits_give_sorted_classes_alike_in_both(tree):
    config = tree(
        {"train/dog/1.png": 1, "train/cat/2.png": 2, "val/dog/deep/3.png": 3, "val/eel/4.png": 4, "val/eel/x.txt": 9}
    )
    train, test = open_split(config, "train"), open_split(config, "test")
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert (colours(train), labels(train)) == ([2, 1], [0, 1])
    assert (colours(test), labels(test)) == ([3, 4], [1, 2])


def test_class_folders_called_like_splits_are_classes(tree):
    config = tree({f"{name}/{i}.png": i for name in ("train", "bus", "test") for i in range(9)}, holdout=0.2)
    assert open_split(config, "train").classes == ["bus", "test", "train"]


def test_images_without_class_folders_have_no_labels(tree):
    config = tree({"train/1.png": 1, "train/2.png": 2, "test/3.png": 3})
    train = open_split(config, "train")
    assert (colours(train), labels(train), train.classes) == ([1, 2], [-1, -1], [])


def test_a_damaged_file_is_a_bad_image_with_its_path(tree):
    config = tree({"train/a/1.png": 1, "train/a/2.png": 2, "test/a/3.png": 3})
    path = Path(config.source) / "train/a/2.png"
    path.write_bytes(b"")
    with pytest.raises(BadImage) as caught:
        open_split(config, "train").load(1)
    assert "train[1]" in caught.value.id
    assert str(path) in caught.value.id


def test_without_a_test_split_a_fixed_share_is_held_out_and_said(tree, capsys):
    config = tree({f"a/{i:03d}.png": i for i in range(40)}, holdout=0.25)
    train, test = colours(open_split(config, "train")), colours(open_split(config, "test"))
    assert len(test) == 10
    assert sorted(train + test) == list(range(40))
    assert test != list(range(10))
    assert "25.00% of 'train' is held out" in capsys.readouterr().err


# Parquet


def test_parquet_splits_come_from_file_names_and_classes_from_the_features(parquet, tmp_path):
    for part in range(2):
        parquet(f"train-0000{part}.parquet", [part, part + 2], {"label": [part, 1]}, label=NAMES)
    parquet("test-00000.parquet", [7], {"label": [0]}, label=NAMES)
    for source in (
        tmp_path / "data",
        tmp_path / "data" / "*.parquet",
        tmp_path / "data/{train-00000,train-00001,test-00000}.parquet",
    ):
        config = DataConfig(source=str(source))
        train, test = open_split(config, "train"), open_split(config, "test")
        assert (colours(train), labels(train)) == ([0, 2, 1, 3], [0, 1, 1, 1])
        assert (colours(test), labels(test), test.classes) == ([7], [0], ["cat", "dog"])


def test_validation_is_measured_on_before_a_test_split_without_labels(parquet):
    for split, i, label in (("train", 1, 0), ("validation", 2, 1), ("test", 3, -1)):
        path = parquet(f"data/{split}-0.parquet", [i], {"label": [label]}, label=NAMES)
    config = DataConfig(source=str(path.parent.parent))
    assert colours(open_split(config, "test")) == [2]
    unlabelled = open_split(config.model_copy(update={"test_split": "test"}), "test")
    assert (colours(unlabelled), labels(unlabelled)) == ([3], [-1])


def test_plain_bytes_and_named_columns_are_read(parquet):
    path = parquet("train.parquet", [1, 2, 3], {"kind": [2, 0, 1]}, kind=datasets.Value("int32"))
    table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    raw = [row["bytes"] for row in table.cast_column("picture", datasets.Image(decode=False))["picture"]]
    datasets.Dataset.from_dict({"blob": raw, "kind": [2, 0, 1]}).cast_column(
        "blob", datasets.Value("binary")
    ).to_parquet(path)
    images = open_split(DataConfig(source=str(path), label_column="kind", holdout=0.3), "train")
    assert images.classes == ["0", "1", "2"]
    assert sorted(zip(colours(images), labels(images), strict=True)) in (
        [(1, 2), (2, 0)],
        [(1, 2), (3, 1)],
        [(2, 0), (3, 1)],
    )


def test_text_labels_become_sorted_classes_over_all_splits(parquet):
    parquet("train.parquet", [1, 2], {"label": ["pear", "fig"]}, label=datasets.Value("string"))
    path = parquet("test.parquet", [3, 4], {"label": ["apple", None]}, label=datasets.Value("string"))
    config = DataConfig(source=str(path.parent))
    assert labels(open_split(config, "train")) == [2, 1]
    assert labels(open_split(config, "test")) == [0, -1]
    assert open_split(config, "train").classes == ["apple", "fig", "pear"]


def test_class_names_can_come_from_a_file(parquet, tmp_path):
    path = parquet("train.parquet", [1, 2, 3], {"label": [0, 2, 1]}, label=datasets.Value("int64"))
    names = tmp_path / "names.txt"
    names.write_text("a\nb c\nd\n")
    config = DataConfig(source=str(path), class_names=str(names), holdout=0.3)
    assert open_split(config, "train").classes == ["a", "b c", "d"]
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"label 2 of train\[1\] is outside the classes 0\.\.1"):
        open_split(config.model_copy(update={"holdout": 0.31}), "train")
    names.write_text("\ufeffa\nb\nc\nd\n")
    longer = open_split(config.model_copy(update={"holdout": 0.32}), "train")
    assert (longer.classes[0], longer.found.said) == ("a", ["data.class_names has 4 names, and the data 3 classes"])
    for text, message in (('["a", "b", "c"]', "is JSON: write one name a line"), ("a\nb\na\n", "has 'a' twice")):
        names.write_text(text)
        with pytest.raises(UserError, match=message):
            open_split(config.model_copy(update={"holdout": 0.33}), "train")


def test_text_labels_are_looked_up_in_the_class_names(parquet, tmp_path):
    path = parquet("train.parquet", [1, 2, 3], {"label": ["fig", "pear", "fig"]}, label=datasets.Value("string"))
    names = tmp_path / "names.txt"
    names.write_text("pear\nfig\n")
    config = DataConfig(source=str(path), class_names=str(names), holdout=0.4)
    train, test = open_split(config, "train"), open_split(config, "test")
    assert train.classes == ["pear", "fig"]
    assert sorted(zip(colours(train) + colours(test), labels(train) + labels(test), strict=True)) == [
        (1, 1),
        (2, 0),
        (3, 1),
    ]
    names.write_text("pear\nplum\n")
    with pytest.raises(UserError, match=r"label 'fig' is none of those in data\.class_names"):
        open_split(config.model_copy(update={"holdout": 0.41}), "train")


# Errors


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image_column": "img"}, UsageError, r"no column data.image_column = 'img': it has picture, label"),
        ({"label_column": "kind"}, UsageError, r"no column data.label_column = 'kind': it has picture, label"),
        ({"train_split": "trian"}, UsageError, r"no split 'trian': set data.train_split to one of test, train"),
        ({"test_split": "dev"}, UsageError, r"no split 'dev': set data.test_split to one of test, train"),
        ({"label_column": "picture"}, UsageError, r"data.label_column = 'picture' holds .*not class ids"),
        ({"class_names": "/no/such/file"}, UserError, r"cannot read data.class_names"),
        ({"source": "/no/such/folder"}, UserError, r"data.source = /no/such/folder: there is no such folder"),
        ({"source": "/no/such/*.parquet"}, UserError, r"there is no file /no/such/\*.parquet"),
        ({"source": "/no/such-{00..03}.tar"}, UserError, r"there is no file /no/such-00.tar"),
    ],
)
def test_a_wrong_key_says_what_there_is(parquet, change, kind, message):
    parquet("train.parquet", [1], {"label": [0]}, label=NAMES)
    path = parquet("test.parquet", [2], {"label": [0]}, label=NAMES)
    config = DataConfig(**{"source": str(path.parent), **change})
    with pytest.raises(kind, match=message) as caught:
        open_split(config, "test" if "test_split" in change else "train")
    assert "\n" not in str(caught.value)


def test_data_without_images_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_split(DataConfig(source=str(tmp_path / "data")), "train")
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(tmp_path / "data" / "a.parquet")
    with pytest.raises(UsageError, match=r"no image column: set data\.image_column to one of text, n"):
        open_split(DataConfig(source=str(tmp_path / "data")), "train")
    (tmp_path / "data" / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        open_split(DataConfig(source=str(tmp_path / "data" / "a.parquet")), "train")


def test_two_image_columns_ask_for_a_choice(tmp_path, png):
    image = {"bytes": png(1), "path": None}
    features = datasets.Features(left=datasets.Image(decode=False), right=datasets.Image(decode=False))
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"left": [image] * 3, "right": [image] * 3}, features=features).to_parquet(path)
    with pytest.raises(UsageError, match=r"several image columns \(left, right\)"):
        open_split(DataConfig(source=str(path)), "train")
    assert len(open_split(DataConfig(source=str(path), image_column="right", holdout=0.4), "train")) == 2


def test_numbers_that_are_no_class_ids_are_refused(parquet):
    for value, message in ((-2, "outside the classes"), (10**6, "no class ids")):
        path = parquet("train.parquet", [1, 2], {"label": [0, value]}, label=datasets.Value("int64"))
        with pytest.raises(UserError, match=message):
            open_split(DataConfig(source=str(path), holdout=0.4 + value / 1e9), "train")


# The Hub


class _Hub(http.server.BaseHTTPRequestHandler):
    """A Hub on which every data set is gated."""

    def do_HEAD(self):
        gated = self.path != "/"
        self.send_response(401 if gated else 200)
        if gated:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.slow
def test_a_gated_or_unreachable_data_set_says_what_to_do_within_seconds(reachable, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    port = server.server_address[1]
    if reachable:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    # The libraries read the address of the Hub when they are imported.
    code = (
        "import time; from nsvq import errors; from nsvq.data.sources import *; "
        "from nsvq.data.config import *; start = time.monotonic()\n"
        "try: open_split(DataConfig(), 'train')\n"
        "except errors.UserError as error: print(error.exit_code, time.monotonic() - start, error, sep='|')"
    )
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    if reachable:
        server.shutdown()
    exit_code, seconds, message = output.stdout.strip().split("|")
    assert exit_code == "1"
    assert float(seconds) < 10
    assert ("out of reach" in message) == (not reachable)
    for advice in ("ILSVRC/imagenet-1k", "accept its terms", "hf auth login", "--data.source PATH"):
        assert advice in message


def test_synthetic_needs_nothing_and_states_its_nominal_lengths():
    config = DataConfig(source="synthetic", image_size=16)
    train, test = open_split(config, "train"), open_split(config, "test")
    assert (len(train), len(test)) == (50_000, 2_000)
    assert len(train.classes) == 10
    assert train.fingerprint != test.fingerprint
    assert not np.array_equal(np.asarray(train.load(0)[0]), np.asarray(test.load(0)[0]))
    with pytest.raises(UsageError, match="one of train, test"):
        open_split(config.model_copy(update={"train_split": "validation"}), "train")
