"""Print what a data set is understood as, before anything is trained on it.

python -m nsvq.data SOURCE [--data.key value] [--grid FILE.png] [--all]

Layout, splits, counts, classes, labels, sizes, images that do not decode (among 1,000 of each split, or with --all
among all) and test images that are training images too. --grid draws some images of as many classes, with their names.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.config import Config
from nsvq.data.config import DataConfig
from nsvq.data.images import BadImage, center_crop
from nsvq.data.sources import Split, open_split
from nsvq.data.understood import describe
from nsvq.errors import UserError

_DECODED = 1_000  # of each split
_SHOWN = 5  # bad images
_SIDE, _COLUMNS, _TEXT = 96, 8, 14  # of the grid


class LookConfig(Config):
    """What a data set is understood as."""

    data: DataConfig = Field(default_factory=DataConfig)
    grid: Path | None = Field(None, description="Picture of some images of each class, with its name.")
    all: bool = Field(False, description="Decode and compare every image, instead of a sample.")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data", *arguments]
    config = configs.parse(LookConfig, arguments)
    print(*describe(config.data, config.all), sep="\n", flush=True)
    for name in ("train", "test"):
        print(decoded(name, open_split(config.data, name), config.all), flush=True)
    if config.grid:
        draw_grid(config.grid, open_split(config.data, "train"))


def decoded(name: str, images: Split, everything: bool) -> str:
    """A line on sizes and bad images."""
    chosen = np.arange(len(images))
    chosen = chosen if everything else np.sort(np.random.default_rng(0).permutation(chosen)[:_DECODED])
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    for i in chosen.tolist():
        try:
            sizes[images.load(i)[0].size] += 1
        except BadImage as error:
            bad.append(str(error))
    text = f"{name}: of {len(chosen):,} images {len(bad)} do not decode"
    if bad:
        text += f" ({'; '.join(bad[:_SHOWN])}{'; ...' if len(bad) > _SHOWN else ''})"
    if sizes:
        short, long = (sorted(side(size) for size in sizes.elements()) for side in (min, max))
        common, count = sizes.most_common(1)[0]
        text += f"; short sides {short[0]} to {short[-1]} pixels, long sides up to {long[-1]}"
        text += f", most often {common[0]} x {common[1]} ({count / len(chosen):.0%})"
    return text


def draw_grid(path: Path, images: Split) -> None:
    """One image of each of 32 classes, spread over all, or of 32 places without classes. Raises `UserError` where the
    file cannot be written."""
    labels = images.labels()
    count = 4 * _COLUMNS
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    groups = [groups[i] for i in np.linspace(0, len(groups) - 1, min(count, len(groups))).astype(int)]
    chosen = [int(group[k % len(group)]) for k in range(-(-count // len(groups))) for group in groups][:count]
    page = Image.new("RGB", (_COLUMNS * _SIDE, count // _COLUMNS * (_SIDE + _TEXT)), "white")
    for n, i in enumerate(chosen):
        try:
            image, label = images.load(i)
        except BadImage:
            continue
        place = (n % _COLUMNS * _SIDE, n // _COLUMNS * (_SIDE + _TEXT))
        page.paste(center_crop(image, _SIDE), place)
        text = f"{label} {images.classes[label]}"[:15] if label >= 0 else "no label"
        ImageDraw.Draw(page).text((place[0] + 1, place[1] + _SIDE), text, fill="black")
    try:
        page.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the grid {path}: {error}") from None


if __name__ == "__main__":
    launch.run(main)
