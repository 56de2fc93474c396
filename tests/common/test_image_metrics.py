import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nsvq.common.image_metrics import from_uint8, psnr, ssim, to_uint8


def random_images(seed, size=(5, 3, 40, 33)):
    """Smooth random uint8 images: white noise alone would hide errors of the window."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((*size[:2], 5, 5), generator=generator)
    fine = torch.rand(size, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size[2:], mode="bicubic")
    return (255 * (0.8 * smooth + 0.2 * fine)).clamp(0, 255).to(torch.uint8)


def test_psnr_and_ssim_equal_scikit_image_per_image():
    a, b = random_images(0), random_images(1)
    b[2] = a[2] // 2 + b[2] // 2  # from alike to unlike
    b[3] = (a[3].int() + 3).clamp(max=255).to(torch.uint8)
    ours_psnr, ours_ssim = psnr(b, a), ssim(b, a)
    for i in range(len(a)):
        x, y = a[i].permute(1, 2, 0).numpy(), b[i].permute(1, 2, 0).numpy()
        assert ours_psnr[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), rel=1e-9)
        assert ours_ssim[i].item() == pytest.approx(
            structural_similarity(x, y, data_range=255, channel_axis=2), rel=1e-9
        )


def test_flat_and_equal_images_have_ssim_one_and_infinite_psnr():
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    for image in (flat, random_images(3)):
        assert torch.allclose(ssim(image, image), torch.ones(len(image), dtype=torch.float64), atol=1e-12)
        assert psnr(image, image).isposinf().all()


def test_images_are_rounded_to_the_nearest_level_and_clipped():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = from_uint8(levels)
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats + 0.49 / 127.5), levels)  # truncation would agree here
    assert torch.equal(to_uint8(floats - 0.49 / 127.5), levels)  # and not here
    assert to_uint8(torch.tensor([-1.7, 1.7])).tolist() == [0, 255]


def test_ssim_refuses_images_smaller_than_its_window():
    small = torch.zeros(1, 3, 6, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 7"):
        ssim(small, small)
    with pytest.raises(ValueError, match="win_size"):  # as scikit-image does
        structural_similarity(np.zeros((6, 20)), np.zeros((6, 20)), data_range=255)
