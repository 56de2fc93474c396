"""What a source is understood as: folders, tars and tables as people have them, each with its right reading, or with
the line that is said and its exit code."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import scipy.io
from PIL import Image

from nsvq.data import __main__ as look
from nsvq.data import sources, tables
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.label_tables import imagenet_synsets
from nsvq.data.sources import open_split
from nsvq.data.understood import describe, shared_images
from nsvq.errors import UserError


def encoded(number: int, format: str = "PNG", size=(9, 8)) -> bytes:
    """A picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 255 - number, 7)).save(buffer, format)
    return buffer.getvalue()


def pack(files: dict) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            data = contents(content, name)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def contents(content, name: str) -> bytes:
    """Of a file: a number is a picture, a dict is a tar or a record."""
    if isinstance(content, int):
        return encoded(content, "JPEG" if name.lower().endswith(("jpg", "jpeg", "jfif")) else "PNG")
    if isinstance(content, dict):
        return pack(content) if name.endswith(".tar") else json.dumps(content).encode()
    return content.encode() if isinstance(content, str) else content


@pytest.fixture
def write(tmp_path):
    def make(files: dict) -> str:
        root = tmp_path / "source"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            elif isinstance(content, datasets.Dataset):
                content.to_parquet(path)
            else:
                path.write_bytes(contents(content, name))
        return str(root)

    return make


def understood(config: DataConfig) -> dict:
    """Splits, classes, and the class of each picture by its number, none where it has none."""
    sources._open.cache_clear()
    found: dict = {"labels": {}}
    for part in ("train", "test"):
        images = open_split(config, part)
        names = [*images.classes, None]
        for i in range(len(images)):
            image, label = images.load(i)
            # JPEG moves colours a little.
            found["labels"][round(image.getpixel((0, 0))[0] / 5)] = names[label]
        found |= {"classes": images.classes, "splits": images.found.splits}
    return found


def table(numbers: list[int], image: str = "image", **columns) -> datasets.Dataset:
    rows = [{"bytes": encoded(5 * i), "path": None} for i in numbers]
    return datasets.Dataset.from_dict({image: rows, **columns}).cast_column(image, datasets.Image(decode=False))


def flat(n: int, suffix: str = "png", first: int = 1) -> dict:
    return {f"{i}.{suffix}": 5 * i for i in range(first, first + n)}


def under(folder: str, files: dict) -> dict:
    return {f"{folder}/{name}": content for name, content in files.items()}


TWO = under("cat", flat(2)) | under("dog", flat(2, first=3))
TWO_LABELS = {1: "cat", 2: "cat", 3: "dog", 4: "dog"}
SPLITS = under("train", TWO) | under("val/cat", flat(1, first=5)) | under("val/dog", flat(1, first=6))
SPLITS_LABELS = TWO_LABELS | {5: "cat", 6: "dog"}
SHARD = {f"{i}.{k}": v for i in range(1, 5) for k, v in (("png", 5 * i), ("cls", str(i % 2)))}
SHARD_LABELS = {1: "1", 2: "0", 3: "1", 4: "0"}
VAL = under("val/images", flat(2, "JPEG", 5))

# name: (files, splits, labels by number, what is said)
READ = {
    "class folders": (TWO, {"train": 4}, TWO_LABELS, ""),
    "splits": (
        SPLITS,
        {"train": 4, "validation": 2},
        SPLITS_LABELS,
        "trains on 4 images of 'train', measures on the 2",
    ),
    "wrapped": (under("a/b", SPLITS), {"train": 4, "validation": 2}, SPLITS_LABELS, ""),
    "capitals": (
        {k.replace("train", "Train").replace("val", "VAL"): v for k, v in SPLITS.items()},
        {"train": 4, "validation": 2},
        SPLITS_LABELS,
        "",
    ),
    "splits in names": (
        {k.replace("train", "birds_train").replace("val", "birds_val"): v for k, v in SPLITS.items()},
        {"train": 4, "validation": 2},
        SPLITS_LABELS,
        "",
    ),
    "classes named like splits": (
        under("bullet_train", flat(2)) | under("test tube", flat(2, first=3)),
        {"train": 4},
        {1: "bullet_train", 2: "bullet_train", 3: "test tube", 4: "test tube"},
        "",
    ),
    "an empty class folder": (TWO | {"empty/": None}, {"train": 4}, TWO_LABELS, "2 classes ('cat', 'dog')"),
    "a class that one split lacks": (
        SPLITS | under("val/eel", flat(1, first=7)),
        {"train": 4, "validation": 3},
        SPLITS_LABELS | {7: "eel"},
        "1 classes are in the test split alone ('eel'): compare data.test_split",
    ),
    "images beside class folders": (
        TWO | flat(1, first=9),
        {"train": 4},
        TWO_LABELS,
        "the 1 images beside them are left out",
    ),
    "a folder beside the splits": (
        SPLITS | under("extra/cat", flat(1, first=9)),
        {"train": 4, "validation": 2},
        SPLITS_LABELS,
        "train, val are splits: the 1 images beside them are left out",
    ),
    "one class": (under("cat", flat(4)), {"train": 4}, dict.fromkeys(range(1, 5), "cat"), "there is one class, 'cat'"),
    "no classes": (flat(4), {"train": 4}, dict.fromkeys(range(1, 5)), "no labels were found: set data.label_column"),
    "numbers sort as text": (
        {f"{name}/{i}.png": 5 * i for i, name in enumerate(("2", "10", "1", "2"), 1)},
        {"train": 4},
        {1: "2", 2: "10", 3: "1", 4: "2"},
        "3 classes ('1', '10', '2')",
    ),
    "Tiny ImageNet": (
        {f"train/{wnid}/images/{wnid}_{i}.JPEG": 5 * i for i, wnid in ((1, "n01443537"), (2, "n99999999"))}
        | {"train/n01443537/n01443537_boxes.txt": "n01443537_1.JPEG\t0\t0\t62\t62\n"}
        | VAL
        | under("test/images", flat(2, "JPEG", 8))
        | {"val/val_annotations.txt": "5.JPEG\tn99999999\t0\t0\t9\t9\n6.JPEG\tn01443537\t0\t0\t9\t9\n"}
        | {"words.txt": "n01443537\tgoldfish, Carassius auratus\nn99999999\tmonarch\n", "wnids.txt": "n01443537\n"},
        {"train": 2, "validation": 2, "test": 2},
        {1: "goldfish, Carassius auratus", 2: "monarch", 5: "monarch", 6: "goldfish, Carassius auratus"},
        "validation: classes are those in val/val_annotations.txt",
    ),
    "dataset.json": (
        {f"0000{i % 2}/img{i}.png": 5 * i for i in range(1, 5)}
        | {"dataset.json": {"labels": [[f"0000{i % 2}/img{i}.png", i // 2] for i in range(1, 5)]}},
        {"train": 4},
        {1: "0", 2: "1", 3: "1", 4: "2"},
        "classes are those in dataset.json",
    ),
    "dataset.json without labels": (
        {f"0000{i % 2}/img{i}.png": 5 * i for i in range(1, 5)} | {"dataset.json": {"labels": None}},
        {"train": 4},
        dict.fromkeys(range(1, 5)),
        "no classes, says dataset.json",
    ),
    "metadata.csv": (
        flat(4) | {"metadata.csv": "\ufefffile_name,text,label\n1.png,x,b\n2.png,x,a\n3.png,y,b\n4.png,y,a\n"},
        {"train": 4},
        {1: "b", 2: "a", 3: "b", 4: "a"},
        "classes are those in metadata.csv",
    ),
    "metadata.parquet": (
        flat(4)
        | {
            "metadata.parquet": datasets.Dataset.from_dict(
                {"file_name": [f"{i}.png" for i in range(1, 5)], "label": [*"baba"]}
            )
        },
        {"train": 4},
        {1: "b", 2: "a", 3: "b", 4: "a"},
        "classes are those in metadata.parquet",
    ),
    "Kaggle's csv": (
        under("train", flat(4))
        | {
            "trainLabels.csv": "id,label\n1,frog\n2,cat\n3,frog\n4,cat\n",
            "sampleSubmission.csv": "id,label\n5,cat\n6,cat\n",
        }
        | under("test", flat(2, first=5)),
        {"train": 4, "test": 2},
        {1: "frog", 2: "cat", 3: "frog", 4: "cat", 5: None, 6: None},
        "2 of 2 test images have no label",
    ),
    "captions are no classes": (
        flat(4) | {"metadata.jsonl": "".join(f'{{"file_name": "{i}.png", "text": "t{i}"}}\n' for i in range(1, 5))},
        {"train": 4},
        dict.fromkeys(range(1, 5)),
        "no labels were found",
    ),
    "the system's files": (
        TWO
        | {name: 200 for name in ("cat/._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "cat/.x/1.png")}
        | {"Thumbs.db": "x"},
        {"train": 4},
        TWO_LABELS,
        "left out: 5 hidden or the system's",
    ),
    "rare suffixes and none": (
        {
            "cat/1.jfif": 5,
            "cat/2": 10,
            "dog/3.bmp": encoded(15, "BMP"),
            "dog/4.jp2": encoded(20, "JPEG2000"),
            "dog/5.heic": "x",
            "dog/LICENSE": "x",
        },
        {"train": 4},
        TWO_LABELS,
        "left out: 2 no images",
    ),
    "what archives were unpacked into": (
        under("train", TWO) | {"ILSVRC2012_img_train.tar": {"a.tar": {}}},
        {"train": 4},
        TWO_LABELS,
        "left out: 1 no images",
    ),
    "test images that train": (
        SPLITS | {"val/cat/9.png": 5},
        {"train": 4, "validation": 3},
        SPLITS_LABELS,
        "1 of 3 test images are training images",
    ),
    "a class named like a split, with folders inside": (
        under("train/s1", flat(1)) | under("bus/s1", flat(1, first=2)) | under("train/s2", flat(1, first=3)),
        {"train": 2},
        {1: "s1", 3: "s2"},
        "train are splits: the 1 images beside them are left out",
    ),
    "parquet files with a picture beside them": (
        {"data/train-0.parquet": table([1, 2, 3, 4], label=[1, 0, 1, 0]), "assets/a.png": 200},
        {"train": 4},
        SHARD_LABELS,
        "holds parquet files: the 1 images beside them are left out",
    ),
    "features in parquet beside class folders": (
        TWO | {"features.parquet": datasets.Dataset.from_dict({"file_name": ["1.png"], "x": [0.5]})},
        {"train": 4},
        TWO_LABELS,
        "left out: 1 no images",
    ),
    # Tars
    "a shard": ({"a.tar": SHARD}, {"train": 4}, SHARD_LABELS, "left out: 4 labels and other fields"),
    "deep": ({"x/y/z/train/a.tar": SHARD}, {"train": 4}, SHARD_LABELS, ""),
    "jpg and png": (
        {"a.tar": {k.replace("1.png", "1.jpg"): v for k, v in SHARD.items()}},
        {"train": 4},
        SHARD_LABELS,
        "",
    ),
    "made on macOS": (
        {"a.tar": {f"./{d}{k}": v for k, v in SHARD.items() for d in ("._", "")} | {"./.DS_Store": "x"}},
        {"train": 4},
        SHARD_LABELS,
        "9 hidden or the system's",
    ),
    "dots in names": (
        {"a.tar": {f"v1.{i}.{k}": v for i in range(1, 11) for k, v in (("png", 5 * i), ("cls", str(i % 2)))}},
        {"train": 10},
        {i: str(i % 2) for i in range(1, 11)},
        "",
    ),
    "labels in a record": (
        {
            "a.tar": {
                f"{i}.{k}": v for i in range(1, 5) for k, v in (("png", 5 * i), ("json", {"w": 9, "label": i % 2}))
            }
        },
        {"train": 4},
        SHARD_LABELS,
        "",
    ),
    "folders in a tar": ({"a.tar": TWO}, {"train": 4}, TWO_LABELS, "classes are the folders inside of the tars"),
    "a tar for each class": (
        {"n02099601.tar": flat(2), "n02099712.tar": flat(2, first=3)},
        {"train": 4},
        {1: "golden retriever", 2: "golden retriever", 3: "Labrador retriever", 4: "Labrador retriever"},
        "classes are the names of the tars",
    ),
    # Tables
    **{
        f"column {name}": ({"d/e/f/train.parquet": table([1, 2, 3, 4], **{name: values})}, {"train": 4}, labels, "")
        for name, values, labels in (
            ("target", [1, 0, 1, 0], SHARD_LABELS),
            ("Label", [1, 0, 1, 0], SHARD_LABELS),
            ("class_id", [1.0, 0.0, 1.0, None], SHARD_LABELS | {4: None}),
            ("category", ["b", "a", "b", "a"], {1: "b", 2: "a", 3: "b", 4: "a"}),
            ("label", [True, False, True, False], {1: "true", 2: "false", 3: "true", 4: "false"}),
            (
                "wnid",
                ["n02099601"] * 2 + ["n02099712"] * 2,
                dict.fromkeys((1, 2), "golden retriever") | dict.fromkeys((3, 4), "Labrador retriever"),
            ),
        )
    },
    "numbers as text sort as numbers": (
        {"train.parquet": table([1, 2, 3, 4], label=["10", "2", None, "2"])},
        {"train": 4},
        {1: "10", 2: "2", 3: None, 4: "2"},
        "11 classes ('0', '1', '2', '3', '4', ...), labels 2 to 10",
    ),
    "labels from 1": (
        {"train.parquet": table([1, 2, 3, 4], label=[1, 2, 1, 2]), "test.parquet": table([5, 6], label=[1, 2])},
        {"train": 4, "test": 2},
        {1: "1", 2: "2", 3: "1", 4: "2", 5: "1", 6: "2"},
        "labels start at 1",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_source_is_read_as_it_was_meant_and_said_in_three_lines(name, write):
    files, splits, labels, said = READ[name]
    config = DataConfig(source=write(files), holdout=0.3, image_size=8)
    found = understood(config)
    assert found["splits"] == splits
    assert found["labels"] == labels
    lines = describe(config)
    assert [line.partition(":")[0] for line in lines[:3]] == ["data"] * 3
    assert said in "\n".join(lines)


REFUSED = {
    "a zip by a relative path": ("data/photos.zip", {}, 2, "unpack it and give the folder"),
    "a folder of archives": (None, {"photos.zip": b"PK"}, 1, "holds no images .*: unpack photos.zip"),
    "a command": ("pipe:cat a.tar", {}, 2, "give the URL itself"),
    "a single image": ("{root}/1.png", flat(1), 2, "give its folder"),
    "a tar of tars": (
        None,
        {"ILSVRC2012_img_train.tar": {"n01440764.tar": {"a.jpg": 1}}},
        1,
        "a tar of tars: unpack it",
    ),
    "splits in a tar": (None, {"a.tar": SPLITS}, 1, "the tars hold folders for splits: unpack them"),
    "splits in a tar with labels": (
        None,
        {"a.tar": under("train", SHARD) | under("val", SHARD)},
        1,
        "the tars hold folders for splits: unpack them",
    ),
    "two folders of one split": (None, under("val", TWO) | under("valid", TWO), 1, "are both the split validation"),
    "a held-out part without images": (None, flat(1), 1, "leaves none on one side"),
    "one split alone": (None, under("test", TWO), 2, "has no split 'train': set data.train_split to one of test"),
    "a class that may be a split": (
        None,
        {f"{name}/s{i}/x.png": 5 * i for name in ("train", "bus", "car") for i in range(4)},
        1,
        r"train has the name of a split, and most images lie beside it \(bus, car\): rename it if it is",
    ),
    "an empty shard": (None, {"train.tar": {}}, 1, "no samples"),
    "splits of other columns": (
        None,
        {"train.parquet": table([1], label=[0]), "test.parquet": table([5])},
        1,
        "cannot read",
    ),
    "two images a sample": (None, {"a.tar": {"1.left.png": 1, "1.right.png": 2}}, 2, "set data.image_column"),
    "numbers that are no ids": (None, {"a.parquet": table([1, 2], label=[0.5, 1])}, 2, "set data.label_column"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_ends_in_one_line_that_says_what_to_do(name, write):
    source, files, code, said = REFUSED[name]
    root = write(files or flat(1))
    with pytest.raises(UserError, match=said) as caught:
        describe(DataConfig(source=(source or root).replace("{root}", root), holdout=0.3))
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_the_command_says_it_with_sizes_and_bad_images_and_draws_a_grid(write, run_script, tmp_path, capsys):
    source = write(SPLITS | {"train/cat/bad.png": b"no image", "train/dog/large.png": encoded(99, size=(40, 30))})
    run_script(look.main, source, "--grid", tmp_path / "grid.png", "--all")
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "data: 2 classes ('cat', 'dog'), labels 0 to 1"
    assert said[-2].startswith("train: of 6 images 1 do not decode (train[")
    assert said[-2].endswith("short sides 8 to 30 pixels, long sides up to 40, most often 9 x 8 (67%)")
    assert said[-1].startswith("test: of 2 images 0 do not decode; ")
    colours = Image.open(tmp_path / "grid.png").convert("RGB").getcolors(10**6)
    assert {5, 15} <= {colour[0] for _, colour in colours}


# ImageNet

WNIDS = imagenet_synsets()
ORDER = [int(i) for i in np.random.default_rng(0).permutation(1000)]  # classes of the validation images
PICTURE = encoded(0)
TRAIN = {f"{wnid}/{wnid}_1.JPEG": PICTURE for wnid in WNIDS}
FLAT = {f"ILSVRC2012_val_{i:08}.JPEG": PICTURE for i in range(1000)}
SORTED = {f"{WNIDS[c]}/ILSVRC2012_val_{i:08}.JPEG": PICTURE for i, c in enumerate(ORDER)}
KAGGLE = {
    **under("ILSVRC/Data/CLS-LOC/train", TRAIN),
    **under("ILSVRC/Data/CLS-LOC/val", FLAT),
    **under("ILSVRC/Data/CLS-LOC/test", {f"ILSVRC2012_test_{i:08}.JPEG": PICTURE for i in range(4)}),
    "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000000.xml": "<annotation/>",
    "ILSVRC/ImageSets/CLS-LOC/val.txt": "".join(f"ILSVRC2012_val_{i:08} {i + 1}\n" for i in range(1000)),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"ILSVRC2012_val_{i:08},{WNIDS[c]} 1 1 9 9 {WNIDS[c]} 2 2 8 8 \n" for i, c in enumerate(ORDER)),
    "LOC_sample_submission.csv": "ImageId,PredictionString\nILSVRC2012_test_00000000,n01440764 0 0 9 9\n",
    "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\n",
}


def devkit() -> dict:
    """As ILSVRC2012_devkit_t12 has it: numbers in an order of its own, and what they are."""
    numbers = {WNIDS[c]: i for i, c in enumerate(np.random.default_rng(1).permutation(1000), 1)}
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([(i, wnid, "a, b") for wnid, i in numbers.items()], kinds)})
    truth = "".join(f"{numbers[WNIDS[c]]}\n" for c in ORDER)
    return {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta.getvalue(), "readme.txt": "x"}


DEVKIT = devkit()
COUNTED = {f"ILSVRC2012_val_{i:08}.JPEG": PICTURE for i in range(1, 1001)}
XML = {
    f"ILSVRC2012_val_{i:08}.xml": f"<annotation>\n<object>\n<name>{WNIDS[c]}</name>\n</object></annotation>"
    for i, c in enumerate(ORDER)
}


def timm(split: str, count: int) -> dict:
    order = range(1000) if split == "train" else ORDER
    samples = [(f"{WNIDS[c]}_{i}", c) for i, c in enumerate(order)]
    return {
        f"{key}.{field}": value
        for key, c in samples[:count]
        for field, value in (("jpg", PICTURE), ("cls", str(c)), ("json", {"label": c}))
    }


def hub(split: str, names: list[str]) -> datasets.Dataset:
    labels = list(range(1000)) if split == "train" else ORDER
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    rows = [{"bytes": PICTURE, "path": None}] * 1000
    return datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)


IMAGENET = {
    **{
        f"Kaggle's {folder or 'root'}": (KAGGLE, folder)
        for folder in ("", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC")
    },
    "torchvision's": (
        {**under("train", TRAIN), **under("val", SORTED), "meta.bin": b"x", "ILSVRC2012_devkit_t12.tar.gz": b"x"}
        | {"ILSVRC2012_img_val.tar": FLAT},
        "",
    ),
    "imagenet_train": (under("imagenet_train", TRAIN) | under("imagenet_val", SORTED), ""),
    "the devkit's ground truth": (
        {**under("train", TRAIN), **under("val", COUNTED), **under("ILSVRC2012_devkit_t12/data", DEVKIT)},
        "",
    ),
    "annotations in XML": (
        {
            **under("Data/CLS-LOC/train", TRAIN),
            **under("Data/CLS-LOC/val", FLAT),
            **under("Annotations/CLS-LOC/val", XML),
        },
        "",
    ),
    "timm's shards": (
        {"imagenet-train-0.tar": timm("train", 1000), "imagenet-validation-0.tar": timm("val", 1000)},
        "",
    ),
    "the Hub's": (None, ""),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_has_its_thousand_classes_in_every_layout(name, write):
    files, folder = IMAGENET[name]
    lines = (sources.Path(sources.__file__).parent / "imagenet_classes.txt").read_text().splitlines()
    names = [line.split(" ", 1)[1] for line in lines]
    if files is None:
        files = {f"data/{split}-00000-of-00001.parquet": hub(split, names) for split in ("train", "validation")}
    config = DataConfig(source=f"{write(files)}/{folder}".rstrip("/"))
    train, test = open_split(config, "train"), open_split(config, "test")
    assert train.classes == test.classes == names
    assert train.classes[207] == "golden retriever"
    assert train.labels().tolist() == list(range(1000))
    expected = ORDER if not name.startswith(("torchvision's", "imagenet_train")) else sorted(ORDER)
    assert test.labels().tolist() == expected
    assert train.found.splits["train"] == train.found.splits["validation"] == 1000


def test_a_class_tar_each_gives_imagenets_classes(write):
    config = DataConfig(
        source=write({f"{wnid}.tar": {f"{wnid}_{k}.JPEG": PICTURE for k in range(2)} for wnid in WNIDS})
    )
    train = open_split(config, "train")
    assert (len(train.classes), train.classes[207]) == (1000, "golden retriever")
    assert [train.id(i)[:9] for i in range(len(train))] == [WNIDS[label] for label in train.labels()]


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_table_of_two_splits_labels_each_by_its_own_rows(write, name, reverse):
    """Though both have files of the same names."""
    truth = {
        f"{split}/{i}.png": ("ant", "bee")[(i + (split == "test")) % 2] for split in ("train", "test") for i in range(6)
    }
    rows = sorted(truth.items(), reverse=reverse)
    images = {path: number for number, path in enumerate(truth)}
    table = "".join(f"{path},{label}\n" for path, label in rows)
    files = {path: 5 * number for path, number in images.items()} | {name: "file_name,label\n" + table}
    found = understood(DataConfig(source=write(files), image_size=8))
    assert found["labels"] == {number: truth[path] for path, number in images.items()}


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_a_table_in_one_split_says_nothing_of_another(write, name):
    images = {f"{split}/{i}.png": 10 * (split == "test") + i for split in ("train", "test") for i in range(6)}
    table = "file_name,label\n" + "".join(f"{i}.png,{('ant', 'bee')[i % 2]}\n" for i in range(6))
    files = {path: 5 * number for path, number in images.items()} | {f"train/{name}": table}
    found = understood(DataConfig(source=write(files), image_size=8))
    expected = {number: None if number >= 10 else ("ant", "bee")[number % 2] for number in images.values()}
    assert found["labels"] == expected


def test_folders_with_numbers_as_names_are_meant_by_the_numbers_of_a_table(write):
    """Not the classes of these numbers: sorted as text, folder 10 is class 2."""
    files = {f"train/{c}/{i}.png": 5 * (2 * c + i) for c in range(12) for i in range(2)}
    files |= {f"val/{c}.png": 5 * (30 + c) for c in range(12)}
    files["val.csv"] = "image,label\n" + "".join(f"{c}.png,{c}\n" for c in range(12))
    found = understood(DataConfig(source=write(files), image_size=8))
    expected = {2 * c + i: str(c) for c in range(12) for i in range(2)} | {30 + c: str(c) for c in range(12)}
    assert found["labels"] == expected


def test_all_compares_every_test_image(write, monkeypatch):
    monkeypatch.setattr("nsvq.data.understood._LOOKED_UP", 1)
    images = {f"train/{i}.png": i for i in range(10)} | {f"test/{i}.png": i + 5 for i in range(10)}
    config = DataConfig(source=write(images), image_size=8)
    assert shared_images(open_split(config, "train"), open_split(config, "test"), everything=True) == (5, 10)


def test_sizes_are_those_of_the_files_and_no_image_is_read_for_them(write, tmp_path, monkeypatch):
    for name in ("a.png", "gone.png"):
        (tmp_path / name).write_bytes(encoded(1))
    values = [{"bytes": encoded(2, size=(30, 20)), "path": "b.png"}, None, {"bytes": b"", "path": None}]
    values += [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    values += [{"bytes": encoded(i), "path": None} for i in range(20)]
    features = datasets.Features(image=datasets.Image(decode=False))
    path = write({"train.parquet": datasets.Dataset.from_dict({"image": values}, features=features)})
    (tmp_path / "gone.png").unlink()
    images = open_split(DataConfig(source=path, image_size=8, holdout=0.05), "train")
    rows = np.random.default_rng(0).permutation(len(images))
    expected = []
    for i in rows:
        try:
            expected.append(len(images.encoded(i)))
        except BadImage:
            expected.append(-1)
    assert {-1, len(encoded(1)), len(encoded(2, size=(30, 20)))} <= set(expected)
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda self, key: self._getitem(key) if key == slice(None) else 1 / 0
    )
    assert images.sizes(rows).tolist() == expected


def test_a_source_is_listed_once_for_both_splits(write, monkeypatch):
    listed, real = [], tables.files_below
    monkeypatch.setattr(tables, "files_below", lambda root: listed.append(root) or real(root))
    config = DataConfig(source=write(SPLITS | under("extra/cat", flat(1, first=9))), image_size=8)
    for _ in range(2):
        found = [open_split(config, split).found for split in ("train", "test")]
        describe(config)
    assert len(listed) == 1
    assert found[0].said == found[1].said == ["train, val are splits: the 1 images beside them are left out"]


def saved(names, texts):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(texts))]}
    return datasets.Dataset.from_dict(rows | {"label": [names.index(text) for text in texts]}, features=features)


@pytest.mark.parametrize("names", [["ant", "cat"], ["cat", "bee", "ant"]])
def test_splits_that_number_their_classes_differently_are_compared_by_names(tmp_path, names):
    texts = {"train": ["ant", "bee", "cat", "ant"], "test": ["cat", "ant", "ant"]}
    parts = {"train": saved(["ant", "bee", "cat"], texts["train"]), "test": saved(names, texts["test"])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for split in parts:
        images = open_split(DataConfig(source=str(tmp_path / "saved"), image_size=8), split)
        assert images.classes == ["ant", "bee", "cat"]
        assert [images.classes[label] for label in images.labels()] == texts[split]
        parts[split].to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="name the classes of 'label' differently"):
        open_split(DataConfig(source=str(tmp_path / "*.parquet"), image_size=8), "train")


def test_class_names_of_folders_in_another_order_are_refused(write, tmp_path):
    source = write({f"{name}/{i}.png": i for i, name in enumerate(("ant", "bee", "cat"))})
    (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
    with pytest.raises(UserError, match="in another order"):
        open_split(DataConfig(source=source, image_size=8, class_names=str(tmp_path / "names.txt")), "train")
