import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features

from nsvq.data.images import BadImage, center_crop, decode, several_crops, to_tensor, training_crop


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, "id")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_grey_and_black_and_white_become_equal_channels():
    grey = noise(5, 7)[..., 0]
    assert (pixels(encoded(Image.fromarray(grey))) == grey[..., None]).all()
    assert (pixels(encoded(Image.fromarray(grey > 99))) == np.where(grey > 99, 255, 0)[..., None]).all()


def test_16_bit_grey_is_scaled_to_8_bits_and_not_clipped():
    grey = np.array([[0, 257, 1000, 32768, 65535]], np.uint16)
    expected = np.round(grey / 65535 * 255)
    for format in ("PNG", "TIFF"):
        assert (pixels(encoded(Image.fromarray(grey), format)) == expected[..., None]).all()


def test_alpha_is_composited_on_white():
    rgba = np.dstack([noise(4, 6), np.linspace(0, 255, 24).astype(np.uint8).reshape(4, 6)])
    alpha = rgba[..., 3:] / 255
    assert np.abs(pixels(encoded(Image.fromarray(rgba))) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    grey_alpha = Image.fromarray(np.full((2, 2), 100, np.uint8)).convert("LA")
    grey_alpha.putalpha(0)
    assert (pixels(encoded(grey_alpha)) == 255).all()


def test_palette_keeps_its_colours_and_its_transparent_entry_turns_white():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    assert pixels(encoded(image))[0].tolist() == [[10, 20, 30], [200, 100, 50], [7, 8, 9]]
    assert pixels(encoded(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255], [7, 8, 9]]


def test_a_transparent_colour_of_an_rgb_png_turns_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(image, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_has_the_colours_of_its_inks(format):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:] = (0, 255, 128, 51)
    expected = [(1 - c / 255) * (1 - 51 / 255) * 255 for c in (0, 255, 128)]
    assert np.abs(pixels(encoded(Image.fromarray(inks, "CMYK"), format)) - expected).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation, format):
    upright = noise(4, 6)
    # How a camera stores the picture so that the tag's instruction brings it upright (EXIF 2.3, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif.tobytes())
    assert (pixels(data) == upright).all()


def test_a_damaged_image_is_a_bad_image_with_its_id():
    good = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    floating = encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    for data in (b"", b"no image", good[: len(good) // 2], floating):
        with pytest.raises(BadImage) as caught:
            decode(data, "train[3]")
        assert caught.value.id == "train[3]"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_random_damage_gives_an_image_or_a_bad_image_and_nothing_else(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.fromarray(noise(16, 16)), format)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(150):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for i in rng.integers(0, len(damaged), 4):
            damaged[i] = rng.integers(256)
        try:
            assert decode(bytes(damaged), "id").mode == "RGB"
        except BadImage:
            bad += 1
    assert bad > 20


def test_a_thin_image_costs_no_memory_and_a_huge_one_is_bad():
    """A picture of 65,000 x 1 pixels resized as a whole would take gigabytes."""
    thin = np.arange(65_000, dtype=np.uint32)[:, None] % 256
    data = encoded(Image.fromarray(np.repeat(thin[..., None], 3, 2).astype(np.uint8)))
    image = decode(data, "id")
    assert image.size == (1, 16)
    assert np.asarray(image)[:, 0, 0].tolist() == [i % 256 for i in range(32_492, 32_508)]
    assert training_crop(image, 512, True, np.random.default_rng(0)).size == (512, 512)
    with pytest.raises(BadImage, match="12000 x 12000 pixels are more than 134217728"):
        decode(encoded(Image.new("1", (12_000, 12_000))), "id")


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + y / 17), np.cos(x / 1.7), np.sin(y / 2.3)]
    return Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), [(400, 520), (520, 400), (50, 61), (48, 48), (30, 40)])
def test_centre_crop_is_adms_box_halving_then_bicubic_then_the_centre(height, width):
    image, size = smooth(height, width), 48
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    while min(expected.shape[2:]) >= 2 * size:
        for pair in ((1, 2), (2, 1)):  # along the rows, then along the columns, 8 bits after each
            expected = (F.avg_pool2d(expected, pair) + 0.5).floor()
    scale = size / min(expected.shape[2:])
    shape = [round(side * scale) for side in expected.shape[2:]]
    expected = F.interpolate(expected, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - size) // 2 for side in shape)
    expected = expected[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()
    found = np.asarray(center_crop(image, size)).astype(float)
    assert found.shape == (size, size, 3)
    difference = np.abs(found - expected.clip(0, 255))
    assert difference.max() <= 1.5  # rounding after each of bicubic's two passes
    assert difference.mean() <= 0.5


@pytest.mark.slow
def test_several_crops_are_the_centre_crop_and_random_squares_of_the_image_at_random_sizes():
    image, size, count, shorts = Image.fromarray(noise(60, 46)), 16, 60, []
    crops = several_crops(image, size, count, "train[7]")
    assert len(crops) == count
    assert (np.asarray(crops[0]) == np.asarray(center_crop(image, size))).all()
    halved = image.resize((23, 30), Image.Resampling.BOX)  # as 46 is twice 16 to 20, and 23 is not
    for crop in map(np.asarray, crops[1:]):
        places = []
        for short in range(size, 21):
            scaled = np.asarray(halved.resize((short, round(30 * short / 23)), Image.Resampling.BICUBIC))
            windows = np.lib.stride_tricks.sliding_window_view(scaled, (size, size, 3))[:, :, 0]
            places += [(short, *at) for at in np.argwhere((windows == crop).all((2, 3, 4)))]
        assert len(places) == 1
        shorts.append(places[0][0])
    assert set(shorts) == set(range(size, 21))
    again = several_crops(image, size, 3, "train[7]")
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(again, crops, strict=False))
    other = several_crops(image, size, 3, "train[8]")
    assert (np.asarray(other[0]) == np.asarray(crops[0])).all()
    assert (np.asarray(other[1]) != np.asarray(crops[1])).any()


def test_training_crop_takes_every_window_of_the_resized_image_and_mirrors_half():
    image, size = Image.fromarray(noise(20, 23)), 20
    windows = [np.asarray(image)[:, left : left + size] for left in range(4)]
    seen = np.zeros((2, 4), int)
    for seed in range(400):
        crop = np.asarray(training_crop(image, size, True, np.random.default_rng(seed)))
        plain = [i for i, w in enumerate(windows) if (w == crop).all()]
        mirrored = [i for i, w in enumerate(windows) if (w[:, ::-1] == crop).all()]
        assert len(plain) + len(mirrored) == 1
        seen[0 if plain else 1, (plain or mirrored)[0]] += 1
    assert seen.min() >= 25  # 50 expected
    for seed in range(50):
        crop = np.asarray(training_crop(image, size, False, np.random.default_rng(seed)))
        assert any((w == crop).all() for w in windows)


def test_training_crop_resizes_the_short_side_with_antialiasing():
    y, x = np.mgrid[:256, :256]
    checks = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).convert("RGB")
    crop = np.asarray(training_crop(checks, 32, True, np.random.default_rng(0)))
    assert crop.shape == (32, 32, 3)
    assert np.abs(crop.astype(int) - 128).max() <= 3  # without antialiasing: black and white


def test_tensor_is_channels_first_in_minus_one_to_one():
    tensor = to_tensor([Image.fromarray(noise(3, 3)), Image.fromarray(np.full((3, 3, 3), 255, np.uint8))])
    assert tensor.dtype == torch.float32
    assert tensor.shape == (2, 3, 3, 3)
    assert (tensor[1] == 1).all()
    np.testing.assert_allclose(tensor[0].permute(1, 2, 0).numpy(), noise(3, 3) / 127.5 - 1, atol=1e-6)
