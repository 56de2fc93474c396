"""What a tree of files is understood as: which files are images, of which split and which class.

The rules are tables of names and a few steps over lists of paths, which a folder and the members of a tar share. No
file is lost in silence: `Tree.skipped` counts what is left out, and why.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from nsvq.errors import UserError

_RARE_SUFFIXES = (".jpe", ".jfif", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_RARE_SUFFIXES)
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SYSTEM = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin", "__pycache__")
# Folders of these names are no classes.
_CONTAINERS = ("images", "image", "imgs", "img", "jpegimages", "jpeg", "jpg", "png", "pictures", "photos", "data")


@dataclass
class Tree:
    """`splits`: split -> (path, class) of its images; a class is a name, an id (from a table), or None. `skipped`: why
    -> how many files are left out. `others`: files that are no images. `said`: how it was understood, where that is not
    plain."""

    splits: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)


def is_hidden(path: str) -> bool:
    """Whether a file is the system's: hidden, of macOS' archives, a thumbnail store, or in a folder of such a kind."""
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in path.split("/") if part not in (".", ".."))


def is_image(path: str) -> bool:
    """By its suffix alone."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def split_of(text: str) -> str | None:
    """The split that a word of `text` names: train-000.tar, val/n01440764."""
    return next((_SPLITS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _SPLITS), None)


def files_below(root: Path) -> Iterator[str]:
    """Every file below `root`, relative to it; links are followed, a folder is entered once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders.sort()
        inside = os.path.relpath(folder, root)
        yield from (name if inside == "." else f"{inside}/{name}" for name in sorted(files))


def read_tree(root: Path, files: list[str]) -> Tree:
    """The images among `files`, relative to `root`, by split and class folder. Raises `UserError` where two folders are
    one split, or the only split may be a class."""
    tree = Tree()
    images, others = [], []
    for path in files:
        if is_hidden(path):
            tree.skipped["hidden or the system's"] += 1
        elif is_image(path) or ("." not in path.rpartition("/")[2] and _decodes(root / path)):
            images.append(path)
        else:
            others.append(path)
    _arrange(images, tree)
    tree.others = others
    tree.skipped["no images"] += len(others)
    return tree


def classes_of_paths(paths: list[str]) -> dict[str, tuple[str, Any]]:
    """Split and class of each path of a tar, by the rules for folders."""
    tree = Tree()
    _arrange(paths, tree)
    return {path: (split, name) for split, rows in tree.splits.items() for path, name in rows}


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow's readers raise many kinds
        return False


def _arrange(images: list[str], tree: Tree) -> None:
    """root/[wrapper/...]class/**/image, root/[...]split/[images/]class/**/image, or images without class folders."""
    base, found = _base(images)
    splits: dict[str, str] = {}
    for name in sorted(found):
        if name and (split := _split_folder(name, list(found))):
            if split in splits:
                raise UserError(f"the folders {splits[split]} and {name} are both the split {split}: rename one")
            splits[split] = name
    nested = any("/" in path for name in splits.values() for path in found[name])
    if not splits or not (nested or len(splits) == len(found.keys() - {""})):  # "test" and "dev" may be classes
        paths = [f"{name}/{path}" if name else path for name, inside in found.items() for path in inside]
        tree.splits["train"] = _classes(base, paths, tree)
        return
    others = sorted(found.keys() - set(splits.values()))
    if beside := sum(len(found[name]) for name in others):
        if len(splits) == 1 and beside > len(found[only := next(iter(splits.values()))]):
            what = f"{base}{only} has the name of a split, and most images lie beside it ({', '.join(others[:3])})"
            raise UserError(f"{what}: rename it if it is a class, or move them out of the folder if it is the split")
        tree.skipped["beside the splits"] += beside
        tree.said.append(f"{', '.join(splits.values())} are splits: the {beside} images beside them are left out")
    tree.splits = {split: _classes(f"{base}{name}/", found[name], tree) for split, name in splits.items()}


def _base(images: list[str]) -> tuple[str, dict[str, list[str]]]:
    """The folder in which splits or classes lie, and the images in each of its folders ("": beside them): folders that
    hold nothing but one more folder of folders are passed."""
    base, rest = "", images
    while True:
        found: dict[str, list[str]] = {}
        for path in rest:
            first, slash, more = path.partition("/")
            found.setdefault(first if slash else "", []).append(more if slash else path)
        name = next(iter(found), "")
        deeper = all("/" in path for path in found.get(name, ())) or name.lower() in _CONTAINERS
        if len(found) != 1 or not name or _split_folder(name, [name]) or not deeper:
            return base, found
        base, rest = f"{base}{name}/", found[name]


def _split_folder(name: str, names: list[str]) -> str | None:
    """The split that folder `name` among `names` is: by its whole name, or by the part in which it differs from another
    one (imagenet_train, imagenet_val)."""
    if name.lower() in _SPLITS:
        return _SPLITS[name.lower()]
    stems = [(_stem(other), split_of(other)) for other in names]
    stem, split = _stem(name), split_of(name)
    return split if split and any(s == stem and other not in (None, split) for s, other in stems) else None


def _stem(name: str) -> str:
    return re.sub(r"[a-z]+", lambda word: "" if word[0] in _SPLITS else word[0], re.sub(r"\d+", "", name.lower()))


def _classes(base: str, images: list[str], tree: Tree) -> list[tuple[str, str | None]]:
    """(path, class) by the first folder below `base`; without such folders no class."""
    while (names := {path.partition("/")[0].lower() if "/" in path else "" for path in images}) and len(names) == 1:
        if names.isdisjoint(_CONTAINERS):
            break
        name, images = images[0].partition("/")[0], [path.partition("/")[2] for path in images]
        base = f"{base}{name}/"
    rows = [(base + path, path.partition("/")[0] if "/" in path else None) for path in sorted(images)]
    if loose := sum(name is None for _, name in rows) if any(name for _, name in rows) else 0:
        tree.skipped["beside class folders"] += loose
        tree.said.append(f"{base or 'the folder'} has class folders: the {loose} images beside them are left out")
        rows = [row for row in rows if row[1] is not None]
    return rows
