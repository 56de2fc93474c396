from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import models
from torchvision.transforms import v2
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from nsvq.errors import UsageError, UserError
from nsvq.tokenizer.logit_loss import LogitLoss, LogitsConfig
from nsvq.tokenizer.teachers import Registered, Teacher, load_classifier, load_vision_model, resized


def test_a_registered_network_sees_of_float_images_what_it_sees_of_bytes_and_lets_the_gradient_through(network_file):
    network = Registered(network_file, output="logits")
    levels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    images = (levels / 127.5 - 1).requires_grad_()
    torch.testing.assert_close(network(images), network.network(levels)[0], rtol=1e-4, atol=1e-4)
    network(images).square().sum().backward()
    step = torch.zeros_like(images)
    step[0, 1, 100:104, 60:64] = 1e-2  # the gradient is that of finite differences
    with torch.no_grad():
        moved = network(images + step).square().sum() - network(images - step).square().sum()
    assert moved == pytest.approx(2 * float((images.grad * step).sum()), rel=1e-2)
    small = torch.rand(1, 3, 48, 48)
    assert torch.equal(network(small), network(resized(small, 224)))


def test_a_part_of_a_registered_network_gives_patch_features(network_file):
    network = Registered(network_file, layer="stem")
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    expected = F.conv2d((images + 1) / 2 * 4 - 2, network.network.stem.weight, network.network.stem.bias, 16)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"no part last; it has stem, classify"):
        Registered(network_file, layer="last")


def test_a_network_that_does_more_than_scale_pixels_is_refused(network_file, tmp_path):
    text = Path(network_file).read_text()
    (tmp_path / "odd.py").write_text(text.replace("x.float() / 255", "(x.float() / 255) ** 2").replace('"net', '"odd'))
    with pytest.raises(UserError, match="does more to 224 x 224 images than to scale pixels"):
        Registered(str(tmp_path / "odd.py"), output="logits")
    (tmp_path / "mute.py").write_text(text.replace('"isc"', '"none"').replace('"net', '"mute'))
    with pytest.raises(UsageError, match=r"mute\.py registers a network that names no class outputs"):
        load_classifier(str(tmp_path / "mute.py"), None)


def test_a_vision_model_gives_patch_tokens_of_images_normalised_as_its_folder_says(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not say how images are normalised .*: take another"):
        load_vision_model(str(tmp_path), "take another")
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    network = load_vision_model(str(tmp_path), "", size=42)
    images = torch.rand(2, 3, 30, 30) * 2 - 1
    pixels = v2.functional.resize((images + 1) / 2, [42, 42], antialias=True)
    pixels = v2.functional.normalize(pixels, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[:, 1:]  # (B, 9, 16)
        features = network(images)
    torch.testing.assert_close(features, tokens.transpose(1, 2).reshape(2, 16, 3, 3), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_folder_with_damaged_or_lacking_weights_is_refused(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config)
    BitImageProcessor().save_pretrained(tmp_path)
    kept = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(UserError, match=r"lacks weights \(encoder\.layer\.1.*: take another"):
        load_vision_model(str(tmp_path), "take another")
    (tmp_path / "model.safetensors").write_bytes(b"damaged" * 20)
    with pytest.raises(UserError, match=r"no vision model at .*: take another"):
        load_vision_model(str(tmp_path), "take another")


def test_a_classifier_through_which_no_gradient_goes_is_refused(network_file, tmp_path):
    text = Path(network_file).read_text().replace('"net', '"quiet')
    (tmp_path / "quiet.py").write_text(text.replace("    def forward", "    @torch.no_grad()\n    def forward"))
    with pytest.raises(UserError, match=r"quiet\.py: the network computes without gradients"):
        load_classifier(str(tmp_path / "quiet.py"), None)


def test_an_empty_file_is_no_weights(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError, match=r"empty\.pth does not hold torchvision's weights of convnext_small: EOFError"):
        load_classifier("convnext_small", tmp_path / "empty.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "convnext_small"])
def test_a_classifier_takes_a_file_of_torchvisions_weights(name, tmp_path):
    network = getattr(models, name)(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = torch.rand(1, 3, 80, 80) * 2 - 1
    pixels = v2.functional.resize((images + 1) / 2, [224, 224], antialias=True)
    pixels = v2.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    loaded = Teacher(load_classifier(name, tmp_path / "weights.pth"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(pixels), rtol=1e-3, atol=1e-4)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"other.pth does not hold torchvision's weights of {name}"):
        load_classifier(name, tmp_path / "other.pth")


def test_without_network_the_error_says_how_to_get_the_weights(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(UserError, match=r"no route to host.*--loss\.logits\.weights FILE"):
        load_classifier("resnet50", None)


def test_the_logit_loss_is_the_squared_error_of_logits_with_a_gradient_to_the_output_alone(network_file):
    loss = LogitLoss(LogitsConfig(network=network_file))
    output, images = (torch.rand(3, 3, 32, 32, requires_grad=True) for _ in range(2))
    a, b = (loss.classifier.network(resized(x, 224)) for x in (output, images))
    value = loss(output, images)
    assert value.item() == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    value.backward()
    assert images.grad is None
    assert output.grad.abs().sum() > 0
    assert loss(images, images) == 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules() if module is not loss and module is not loss.classifier)


def test_a_teacher_keeps_its_precision_whatever_the_autocast(network_file):
    images = torch.rand(1, 3, 64, 64)
    exact, fast = (Teacher(Registered(network_file, output="logits"), precision) for precision in ("fp32", "bf16"))
    fast.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        inside = exact(images)
    assert torch.equal(inside, exact(images))
    assert fast(images).dtype == torch.float32
    assert not torch.equal(fast(images), exact(images))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "resnet5"}, "must be resnet50, convnext_small or a Python file"),
        ({"network": "net.py", "weights": "file.pth"}, "brings its own weights"),
    ],
)
def test_a_classifier_that_there_is_not_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LogitsConfig(**values)
