import pytest
import torch
import torch.nn.functional as F
from transformers import BitImageProcessor, ViTConfig, ViTModel

from nsvq.errors import UserError
from nsvq.tokenizer.alignment import Alignment, AlignmentConfig, vf_loss


def align(network_file, **options):
    return Alignment(AlignmentConfig(network=network_file, layer="stem", width=16, **options), 4)


def test_the_cosine_form_is_the_mean_cosine_of_projected_latents_and_features_on_their_grid(network_file):
    alignment = align(network_file)
    z, images = torch.randn(2, 4, 7, 7, requires_grad=True), torch.rand(2, 3, 224, 224) * 2 - 1
    f = alignment.teacher.network(images)  # (2, D, 14, 14)
    pooled = F.interpolate(f, (7, 7), mode="bilinear", antialias=True)
    projected, expected = alignment.head(z), []
    for image in range(2):
        for y in range(7):
            for x in range(7):
                p, q = projected[image, :, y, x], pooled[image, :, y, x]
                expected.append(float(p @ q / (p.norm() * q.norm())))
    loss = alignment(z, images)
    assert loss.item() == pytest.approx(-sum(expected) / len(expected), abs=1e-5)
    loss.backward()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in alignment.head.parameters())
    assert not any(parameter.requires_grad for parameter in alignment.teacher.parameters())


def test_the_vf_form_equals_its_two_terms_pair_by_pair():
    z, projected, f = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2), torch.randn(2, 5, 2, 2)
    first, second = [], []
    for image in range(2):
        tokens = [x[image].flatten(1).T for x in (z, projected, f)]  # (4, d or D)
        cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
        first += [max(0, 1 - 0.5 - cos(tokens[1][i], tokens[2][i])) for i in range(4)]
        pairs = [(i, j) for i in range(4) for j in range(4)]
        second += [
            max(0, abs(cos(tokens[0][i], tokens[0][j]) - cos(tokens[2][i], tokens[2][j])) - 0.25) for i, j in pairs
        ]
    assert vf_loss(z, projected, f).item() == pytest.approx(sum(first) / 8 + sum(second) / 32, rel=1e-4)
    assert vf_loss(f, f, f).item() == pytest.approx(0, abs=1e-6)


def test_weights_are_those_of_the_papers_unless_given():
    assert AlignmentConfig().resolved_weight == 0.5
    assert AlignmentConfig(form="vf").resolved_weight == 0.1
    assert AlignmentConfig(form="vf", weight=2).resolved_weight == 2


def test_a_network_without_patch_features_is_refused(network_file, tmp_path):
    with pytest.raises(ValueError, match="layer is needed for a Python file"):
        AlignmentConfig(network=network_file)
    with pytest.raises(ValueError, match="layer is needed for a Python file"):
        AlignmentConfig(layer="stem")
    with pytest.raises(UserError, match=r"not a map of features .*: give another --loss\.alignment"):
        Alignment(AlignmentConfig(network=network_file, layer="classify"), 4)
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=64)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    BitImageProcessor().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"224\*224.* doesn't match model \(64\*64\).*the image_size that it takes"):
        Alignment(AlignmentConfig(network=str(tmp_path / "vit")), 4)
    Alignment(AlignmentConfig(network=str(tmp_path / "vit"), image_size=64), 4)
    with pytest.raises(UserError, match=r"no vision model at .*set loss\.alignment: null"):
        Alignment(AlignmentConfig(network=str(tmp_path / "gone")), 4)
