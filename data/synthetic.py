"""The built-in data set: ten silhouettes with varied pose, colour, texture, light, shadow and clutter.

Sample i of a split is a function of (split, i) alone, so the set is unlimited, needs no download, and is the same on
every machine up to rounding. Class and nuisance are independent: nothing but the silhouette tells the class.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

VERSION = 1  # of what render() draws; part of the fingerprint
# Nominal sizes, which define an epoch; render() takes any index.
LENGTHS = {"train": 50_000, "test": 2_000}

Uniform = Callable[[float, float], float]  # (low, high) -> a random number between them
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SPLITS = {"train": 0, "test": 1}


def label(i: int) -> int:
    """The class of sample i: the classes take turns."""
    return i % len(CLASSES)


def render(split: str, i: int, size: int) -> Image.Image:
    """Sample `i` of `split` ("train" or "test") as an RGB image of size x size pixels, edges antialiased."""
    # Drawn in one go: a call of the generator for each number would take longer than the picture.
    values = iter(np.random.default_rng([_SPLITS[split], i]).random(64).tolist())

    def u(low: float, high: float) -> float:
        return low + (high - low) * next(values)

    x, y = _grid(size)  # (1, S) and (S, 1), in [-1, 1], y up
    object_color, background_color = _colors(u)

    background = _texture(u, x, y, 0.06) + _clutter(u, x, y)  # (S, S), added light
    scale = u(0.7, 0.88)
    center_x, center_y = u(-0.12, 0.12), u(-0.12, 0.12)
    angle, mirror = np.deg2rad(u(-15, 15)), 1 if u(0, 1) < 0.5 else -1
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)

    def distance(dx: float | np.floating, dy: float | np.floating) -> np.ndarray:
        """Signed distance to the outline, in units of the image, with the object moved by (dx, dy)."""
        px, py = x - np.float32(center_x + dx), y - np.float32(center_y + dy)
        return _SHAPES[CLASSES[label(i)]](mirror * (cos * px + sin * py), cos * py - sin * px) * np.float32(scale)

    light = u(0, 2 * np.pi)
    light_x, light_y = np.float32(np.cos(light)), np.float32(np.sin(light))
    coverage = np.clip(0.5 - distance(0, 0) * (size / 2), 0, 1)  # one pixel is 2 / size wide
    reach, softness = u(0.08, 0.16), np.float32(u(0.12, 0.2))
    shadow = np.clip(0.5 - distance(-reach * light_x, -reach * light_y) / (2 * softness), 0, 1)
    shadow = shadow * shadow * (3 - 2 * shadow)  # smoothstep
    slope = light_x * x + light_y * y  # (S, S), grows towards the light
    background_shade = (1 + np.float32(u(0.06, 0.2)) * slope) * (1 - np.float32(u(0.15, 0.35)) * shadow)
    object_shade = 1 + np.float32(u(0.1, 0.22)) * (slope - np.float32(light_x * center_x + light_y * center_y))
    surface = _texture(u, cos * x + sin * y, cos * y - sin * x, 0.08)

    image = (background_color + background[..., None]) * background_shade[..., None]  # (S, S, 3)
    front = (object_color + surface[..., None]) * object_shade[..., None]
    image += (front - image) * coverage[..., None]
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centers = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return centers[None, :], -centers[:, None]


def _colors(u: Uniform) -> tuple[np.ndarray, ...]:
    """Object and background colour [3]: one dark and one light, hues independent."""
    dark, light = u(0.16, 0.38), u(0.62, 0.84)
    pair = (dark, light) if u(0, 1) < 0.5 else (light, dark)
    return tuple(_color(luma, u(0, 2 * np.pi), u(0.1, 0.34)) for luma in pair)


def _color(luma: float, hue: float, chroma: float) -> np.ndarray:
    tint = np.cos(hue - np.array([0, 2, 4]) * (np.pi / 3)).astype(np.float32)
    color = luma + chroma * (tint - _LUMA @ tint)
    return np.clip(color, 0.04, 0.96).astype(np.float32)


def _texture(u: Uniform, x: np.ndarray, y: np.ndarray, amplitude: float) -> np.ndarray:
    """A faint pattern about zero, broadcast from x and y: plain, stripes, checks, dots or clouds."""
    kind, angle, frequency = int(u(0, 5)), u(0, np.pi), u(3.5, 7.0)
    phase, phase2, amplitude = u(0, 2 * np.pi), u(0, 2 * np.pi), u(0.5, 1) * amplitude
    cos, sin = np.float32(np.cos(angle) * frequency), np.float32(np.sin(angle) * frequency)
    a = cos * x + (sin * y + np.float32(phase))
    if kind == 0:
        return np.zeros_like(a)
    if kind == 1:
        return np.float32(amplitude) * np.sin(a)
    b = cos * y - (sin * x + np.float32(phase2))
    if kind == 2:
        return np.float32(amplitude) * np.sin(a) * np.sin(b)
    if kind == 3:
        return np.float32(amplitude) * (np.sin(a) + np.sin(b)) / 2
    return np.float32(amplitude) * np.sin(0.7 * a + 1.5 * np.sin(0.6 * b))


def _clutter(u: Uniform, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Four faint soft blobs, round to line-like, on the background."""
    total: Any = np.float32(0)
    for _ in range(4):
        strength = u(0.04, 0.1) * (1 if u(0, 1) < 0.5 else -1)
        width, height = u(0.08, 0.5), u(0.08, 0.25)
        across = np.exp(-(((x - np.float32(u(-1, 1))) / np.float32(width)) ** 2))
        along = np.exp(-(((y - np.float32(u(-1, 1))) / np.float32(height)) ** 2))
        total = total + np.float32(strength) * across * along
    return total


def _box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x, y):
    # One tip of five, mirrored at its axis: the edge runs from the tip (radius 1.05) to the notch (radius 0.45).
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, y)
    angle = np.abs(angle - sector * np.round(angle / np.float32(sector)))
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.45 * np.cos(sector / 2), 0.45 * np.sin(sector / 2)
    length = np.hypot(1.05 - notch_x, notch_y)
    normal_x, normal_y = np.float32(notch_y / length), np.float32((1.05 - notch_x) / length)
    return radius * (normal_x * np.cos(angle) + normal_y * np.sin(angle)) - 1.05 * normal_x


def _heart(x, y):
    # A square on its tip, with a half disc on each of its upper sides.
    x, y = np.abs(x), y + 0.08
    diamond = 0.707 * np.maximum(np.abs(x - y), np.abs(x + y)) - 0.56
    return np.minimum(diamond, np.hypot(x - 0.396, y - 0.396) - 0.56)


def _arrow(x, y):
    head = np.maximum(0.707 * (np.abs(x) + y) - 0.707, 0.1 - y)
    return np.minimum(head, _box(x, y + 0.4, 0.26, 0.6))


# Silhouettes as (about) signed distances, negative inside; x and y in units of the object's radius.
_SHAPES: dict[str, Callable] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.22,
    "square": lambda x, y: _box(x, y, 0.78, 0.78),
    "triangle": lambda x, y: np.maximum(0.866 * np.abs(x) + 0.5 * y - 0.5, -y - 0.62),
    "cross": lambda x, y: np.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95)),
    "star": _star,
    "crescent": lambda x, y: np.maximum(np.hypot(x - 0.1, y) - 0.95, 0.75 - np.hypot(x - 0.55, y)),
    "arrow": _arrow,
    "heart": _heart,
    "bars": lambda x, y: _box(x - 0.66 * np.clip(np.round(x / np.float32(0.66)), -1, 1), y, 0.19, 0.88),
}
CLASSES = list(_SHAPES)
