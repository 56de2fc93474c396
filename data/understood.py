"""What a source is understood as, in a few lines, to be read before a day of training goes into it."""

import hashlib

import numpy as np
from accelerate import Accelerator

from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage
from nsvq.data.sources import Images, Split, open_split

_KINDS = {
    "hub": "a data set of the Hub",
    "saved": "a saved data set",
    "folders": "folders of images",
    "parquet": "parquet files",
    "tar": "webdataset shards",
    "synthetic": "the built-in data set",
}
_LOOKED_UP = 64  # test images that are searched for among the training images
_SEARCHED = 20_000  # training images whose size is looked at


def announce(config: DataConfig, accelerator: Accelerator) -> Split:
    """The training images, after `describe` was printed by the main process. A collective call."""
    with accelerator.main_process_first():
        images, _ = open_split(config, "train"), open_split(config, "test")
    if accelerator.is_main_process:
        print(*describe(config), sep="\n", flush=True)
    return images


def describe(config: DataConfig, everything: bool = False) -> list[str]:
    """Three lines: the source and its splits, what trains and what is measured, the classes; then one for each thing
    that may be another than it was meant to be, with the key that changes it. `everything` searches all training images
    for test images, instead of some. Raises what `open_split` raises."""
    train, test = open_split(config, "train"), open_split(config, "test")
    found = train.found
    left = ", ".join(f"{count:,} {why}" for why, count in sorted(found.skipped.items()) if count)
    splits = ", ".join(f"{name} {count:,}" for name, count in found.splits.items())
    shared = train.split == test.split
    what = f"a random {len(test):,} of {test.split!r}" if shared else f"the {len(test):,} of {test.split!r}"
    lines = [
        f"{config.source}: {_KINDS[found.kind]}, {splits}{f'; left out: {left}' if left else ''}",
        f"trains on {len(train):,} images of {train.split!r}, measures on {what}",
        _classes(train, test),
    ]
    return [f"data: {line}" for line in lines] + [f"note: {line}" for line in doubts(train, test, everything)]


def _classes(train: Split, test: Split) -> str:
    if not train.classes:
        return "no labels"
    labels = np.concatenate([train.labels(), test.labels()])
    with_label = labels[labels >= 0]
    names = ", ".join(repr(name) for name in train.classes[:5]) + (", ..." if len(train.classes) > 5 else "")
    span = f"labels {with_label.min()} to {with_label.max()}" if len(with_label) else "no image has a label"
    return f"{len(train.classes):,} classes ({names}), {span}"


def doubts(train: Split, test: Split, everything: bool = False) -> list[str]:
    """What may be another than it was meant to be, a line each."""
    lines = list(train.found.said)
    sets = {"training": train.labels(), "test": test.labels()}
    if not train.classes:
        lines.append("no labels were found: set data.label_column, or a DiT can only be unconditional")
    elif len(train.classes) == 1:
        lines.append(f"there is one class, {train.classes[0]!r}: give the folder of the class folders as data.source")
    else:
        for name, labels in sets.items():
            if missing := int((labels < 0).sum()):
                lines.append(f"{missing:,} of {len(labels):,} {name} images have no label: see data.label_column")
        seen = {name: np.unique(labels[labels >= 0]) for name, labels in sets.items()}
        for name, other in (("training", "test"), ("test", "training")):
            # Few images of many classes leave some out.
            only = np.setdiff1d(seen[name], seen[other])
            if len(only) and len(seen[other]) and (name == "test" or len(sets["test"]) >= 10 * len(train.classes)):
                some = ", ".join(repr(train.classes[i]) for i in only[:3])
                lines.append(f"{len(only)} classes are in the {name} split alone ({some}): compare data.test_split")
        if len(seen["training"]) and seen["training"].min() == 1 and train.classes[0] == "0":
            lines.append("labels start at 1: class 0 has no images; number them from 0, or give names as labels")
    if isinstance(train, Images) and isinstance(test, Images) and (twice := shared_images(train, test, everything)):
        lines.append(f"{twice[0]} of {twice[1]} test images are training images too: set data.test_split")
    return lines


def shared_images(train: Images, test: Images, everything: bool = False) -> tuple[int, int] | None:
    """(how many of a sample of test images are training images by content, size of the sample); None for none. Looked
    for among 20,000 training images at random; with `everything` all of both."""
    rng = np.random.default_rng(0)
    sample = rng.permutation(len(test))[: None if everything else _LOOKED_UP]
    others = np.arange(len(train)) if everything else rng.permutation(len(train))[:_SEARCHED]
    sizes = test.sizes(sample)
    candidates = others[np.isin(train.sizes(others), sizes[sizes > 0])]
    known = {_hash(train, i) for i in candidates} - {None}
    twice = sum(_hash(test, i) in known for i in sample)
    return (twice, len(sample)) if twice else None


def _hash(images: Images, i: int) -> bytes | None:
    try:
        return hashlib.sha256(images.encoded(int(i))).digest()
    except BadImage:
        return None
