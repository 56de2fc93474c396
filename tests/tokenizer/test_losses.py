import pytest
import torch
import torch.nn.functional as F
from torchvision import models

from nsvq.errors import UserError
from nsvq.tokenizer.discriminator import PatchDiscriminator
from nsvq.tokenizer.losses import discriminator_hinge, generator_adversarial, load_lpips
from nsvq.tokenizer.nsvq_config import PullConfig
from nsvq.tokenizer.temperature import Temperature


def test_generator_loss_starts_at_log_two_and_falls_as_the_discriminator_is_fooled():
    assert float(generator_adversarial(torch.zeros(2, 1, 3, 3))) == pytest.approx(0.693147, abs=1e-5)
    logits = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    expected = torch.log1p(torch.exp(-logits.mean((1, 2, 3)))).mean()
    torch.testing.assert_close(generator_adversarial(logits), expected)


def test_hinge_loss_equals_its_formula():
    real, fake = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    expected = sum(max(0, 1 - r) for r in real.flatten().tolist()) / 48
    expected += sum(max(0, 1 + f) for f in fake.flatten().tolist()) / 48
    assert float(discriminator_hinge(real, fake)) == pytest.approx(expected / 2, rel=1e-5)


def test_an_images_logits_do_not_depend_on_its_batch():
    discriminator, images = PatchDiscriminator(8, 2), torch.randn(5, 3, 32, 32)
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_logit_sees_a_patch_of_seventy_pixels():
    discriminator = PatchDiscriminator(4, 3)
    # GroupNorm looks at the whole image; the convolutions alone define the patch.
    convolutions = torch.nn.Sequential(*(m for m in discriminator.blocks if isinstance(m, torch.nn.Conv2d)))
    images = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = convolutions(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize(("net", "builder"), [("squeeze", models.squeezenet1_1), ("vgg", models.vgg16)])
@pytest.mark.slow
def test_lpips_takes_a_file_of_torchvisions_weights(net, builder, tmp_path):
    backbone = builder(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    metric = load_lpips(net, tmp_path / "weights.pth")
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert metric(a, a).abs().max() == 0
    assert (metric(a, b) > 0).all()
    assert metric(a, b).shape == (2,)
    # The first tap of the metric equals torchvision's own layers on the normalised image.
    shifted = metric.metric.scaling_layer(a)
    depth = {"squeeze": 2, "vgg": 4}[net]
    torch.testing.assert_close(metric.metric.net(shifted)[0], backbone.eval().features[:depth](shifted))
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the backbone's weights"):
        load_lpips("squeeze", tmp_path / "weights.pth")


def test_lpips_in_bfloat16_is_the_same_distance_to_a_percent(tmp_path):
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "weights.pth")
    exact, fast = (load_lpips("squeeze", tmp_path / "weights.pth", precision) for precision in ("fp32", "bf16"))
    a, b = torch.rand(4, 3, 32, 32) * 2 - 1, torch.rand(4, 3, 32, 32) * 2 - 1
    assert fast(a, b).dtype == torch.float32
    torch.testing.assert_close(fast(a, b), exact(a, b), rtol=1e-2, atol=0)
    assert not torch.equal(fast(a, b), exact(a, b))


def test_lpips_keeps_float32_under_autocast(tmp_path):
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "weights.pth")
    metric = load_lpips("squeeze", tmp_path / "weights.pth")
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = metric(a, b)
    assert torch.equal(inside, metric(a, b))
    assert F.mse_loss(a, b) > 0


def test_a_relative_temperature_follows_the_mean_distance_to_the_nearest_code():
    for of in (None, "own"):
        assert Temperature(PullConfig(temperature=0.3, relative_to=of), 8).value() == 0.3
    relative = Temperature(PullConfig(temperature=0.3, relative_to="mean"), 8)
    assert relative.value() is None  # no distance is known yet
    relative.update(2.0)
    assert relative.value() == pytest.approx(0.3 * 8 * 2.0)
    relative.update(3.0)
    again = Temperature(relative.config, 8)
    again.load_state_dict(relative.state_dict())
    assert again.value() == pytest.approx(0.3 * 8 * (0.99 * 2.0 + 0.01 * 3.0))
