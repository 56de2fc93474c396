"""Random folders, tars and tables, damaged ones among them: each is read, or refused in one line, and no file is lost.

python tests/data/test_sources_fuzz.py 2000      # more of them, by hand
"""

import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from nsvq.data import labels, shards, sources, tables
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.sources import open_split
from nsvq.data.understood import describe
from nsvq.errors import UserError

FOLDERS = [
    "train",
    "val",
    "VAL",
    "test",
    "images",
    "cat",
    "dog",
    "10",
    "2",
    "n01440764",
    "n02099601",
    "00000",
    "a b",
    "é",
]
FOLDERS += ["data", "birds_train", "birds_val", ".ipynb_checkpoints", "__MACOSX", "test tube", "Annotations", "-"]
NAMES = [
    "a",
    "b",
    "c.d",
    "._a",
    "x.y.z",
    "Thumbs",
    "IMG 1",
    "metadata",
    "labels",
    "val_annotations",
    "dataset",
    "é",
    "0",
]
SUFFIXES = [".png"] * 6 + [
    ".jpg",
    ".JPEG",
    ".jfif",
    "",
    ".txt",
    ".csv",
    ".json",
    ".jsonl",
    ".xml",
    ".zip",
    ".db",
    ".cls",
    ".heic",
]
COLUMNS = ["label", "Label", "target", "class_id", "category", "text", "json", "wnid"]


def picture(rng) -> bytes:
    buffer = io.BytesIO()
    size = (int(rng.integers(1, 30)), int(rng.integers(1, 30))) if rng.random() < 0.97 else (3000, 1)
    Image.new(str(rng.choice(["RGB", "L", "P"])), size, int(rng.integers(200))).save(buffer, "PNG")
    return buffer.getvalue()


def content(rng, name: str, others: list[str]) -> bytes:
    if rng.random() < 0.1:
        return bytes(rng.integers(0, 256, int(rng.integers(0, 60)), dtype=np.uint8))
    rows = [(other, str(rng.choice(["1", "2", "cat", "n01440764", ""]))) for other in others]
    if name.endswith((".txt", ".cls")):
        return str(rng.choice(["1", "cat", "x y\n" * 3, "\n".join("\t".join(row) for row in rows)])).encode()
    if name.endswith(".csv"):
        return "\n".join(",".join(row) for row in [("file_name", "label"), *rows][int(rng.integers(2)) :]).encode(
            "utf-8-sig"
        )
    if name.endswith(".json"):
        values = [None, [list(row) for row in rows], {"labels": None}, {"labels": rows}, dict(rows), {"label": 3}, 7]
        return json.dumps(values[int(rng.integers(len(values)))]).encode()
    if name.endswith(".jsonl"):
        return "\n".join(json.dumps({"file_name": a, "label": b}) for a, b in rows).encode()
    return picture(rng)


def tree(rng) -> dict[str, bytes]:
    folders = ["/".join(rng.choice(FOLDERS, int(rng.integers(0, 4)))) for _ in range(int(rng.integers(1, 6)))]
    paths = {
        f"{rng.choice(folders)}/{rng.choice(NAMES)}{rng.integers(9) or ''}{rng.choice(SUFFIXES)}".lstrip("/")
        for _ in range(int(rng.integers(0, 25)))
    }
    names = sorted(paths)
    return {path: content(rng, path, [name.rpartition("/")[2] for name in names]) for path in names}


def write_tree(rng, root: Path) -> int:
    files = tree(rng)
    for path, data in files.items():
        target = root / path
        if any(part.is_file() for part in target.parents) or target.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return sum(path.is_file() for path in root.rglob("*"))


def write_tars(rng, root: Path) -> int:
    count = 0
    for name in rng.choice(
        ["train-0", "val-0", "n01440764", "n02099601", "cat", "x"], int(rng.integers(1, 4)), replace=False
    ):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path, data in tree(rng).items():
                member = tarfile.TarInfo(str(rng.choice(["", "", "./"])) + path)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                count += 1
        data = buffer.getvalue()
        (root / f"{name}.tar").write_bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.05 else data)
    return count


def write_tables(rng, root: Path) -> int:
    count = 0
    columns = rng.choice(COLUMNS, int(rng.integers(0, 3)), replace=False)
    kinds = [[0, 1, None], [0.0, 1.5], [1.0, None, 2.0], ["a", "b", None], [True, False], [-1, 4], [[1], [2]], [10**7]]
    values = {name: kinds[int(rng.integers(len(kinds)))] for name in columns}
    for split in rng.choice(["train", "validation", "test", "x"], int(rng.integers(1, 3)), replace=False):
        n = int(rng.integers(0, 12))
        table = {name: [kind[int(i)] for i in rng.integers(len(kind), size=n)] for name, kind in values.items()}
        images = [{"bytes": picture(rng) if rng.random() < 0.9 else None, "path": None} for _ in range(n)]
        path = root / "/".join(rng.choice(["a", "b"], int(rng.integers(0, 4)))) / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"image": images, **table}).to_parquet(path)
        if rng.random() < 0.05:
            path.write_bytes(path.read_bytes()[:-9])
        count += n
    return count


def once(seed: int, root: Path) -> str:
    """What became of one random source. An assertion fails where something is lost."""
    rng = np.random.default_rng(seed)
    root.mkdir()
    write = (write_tree, write_tars, write_tables)[int(rng.choice([0, 0, 0, 1, 1, 2]))]
    count = write(rng, root)
    config = DataConfig(source=str(root), image_size=8, holdout=0.3)
    sources._open.cache_clear()
    try:
        describe(config)
        parts = [open_split(config, part) for part in ("train", "test")]
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("more than a line") from error
        return f"refused: {str(error).replace(str(root), '')[:60]}"
    bad = 0
    for images in parts:
        for i in range(len(images)):
            try:
                assert images.load(i)[1] in range(-1, len(images.classes))
            except BadImage:
                bad += 1
    found = parts[0].found
    used, left = sum(found.splits.values()), sum(found.skipped.values())
    assert min(found.skipped.values(), default=0) >= 0
    if found.kind == "tar":
        used -= sum(bool("no image" in bad) for bad in without_image(parts[0], root))
        left -= found.skipped["beside the tar files"]
    if found.kind != "parquet" or write is write_tables:
        assert used + left == count, (found.kind, found.splits, found.skipped, count)
    return f"read: {found.kind}"


def without_image(images, root: Path) -> list[str]:
    """Of all samples, in every split of the tars, why each has no image that can be read."""
    files, reasons = tables.by_split(images.found.files), []
    for part in files.values():
        found = shards.Shards(part, labels.shard_fields(DataConfig(source=str(root)), files))
        for row in range(len(found)):
            try:
                found.read(row)
            except BadImage as error:
                reasons.append(error.reason)
    return reasons


@pytest.mark.parametrize("start", [0, 100, 200])
def test_random_sources_are_read_or_refused_and_nothing_is_lost(start, tmp_path):
    outcomes = [once(seed, tmp_path / str(seed)) for seed in range(start, start + 25)]
    assert sum(outcome.startswith("read") for outcome in outcomes) > 5


if __name__ == "__main__":
    datasets.disable_progress_bars()
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards.CACHE = Path(folder) / "index"
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for seed in range(int(sys.argv[1])):
            begin = time.monotonic()
            try:
                outcome = once(seed, Path(folder) / str(seed))
            except Exception as error:
                outcome = f"FAILED {type(error).__name__}"
                print(seed, repr(error)[:400], flush=True)
            assert time.monotonic() - begin < 60, f"{seed} hangs"
            seen[outcome] = seen.get(outcome, 0) + 1
    print(*sorted(seen.items(), key=lambda item: -item[1]), sep="\n")
