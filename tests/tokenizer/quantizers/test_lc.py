import pytest
import torch
from safetensors.torch import save_file

from nsvq.errors import UserError
from nsvq.tokenizer.quantizers import QUANTIZERS, make_quantizer


def test_codes_are_a_trained_projection_of_frozen_features(make):
    quantizer = make("lc")
    assert {name for name, _ in quantizer.named_parameters()} == {"projector.weight", "projector.bias"}
    expected = quantizer.features.double() @ quantizer.projector.weight.double().T + quantizer.projector.bias.double()
    torch.testing.assert_close(quantizer.codebook().double(), expected, rtol=1e-5, atol=1e-6)
    wide = make("lc", dim=400)
    assert float(wide.projector.weight.detach().std() * 20) == pytest.approx(1, rel=0.05)


def test_codes_start_at_the_same_scale_for_features_of_any_scale_and_offset(tmp_path):
    features = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0))
    for scale, offset in ((1.0, 0.0), (30.0, 100.0), (0.01, -1.0)):
        save_file({"features": scale * features + offset}, tmp_path / "features.safetensors")
        torch.manual_seed(0)
        codes = make_quantizer(
            QUANTIZERS["lc"].Config(name="lc", features=tmp_path / "features.safetensors"), 64
        ).codebook()
        assert codes.std(0).mean().item() == pytest.approx(1 / 8, rel=0.1)
        assert codes.mean(0).abs().max() < 0.2


@pytest.mark.parametrize(
    "content",
    [None, {"other": torch.zeros(3, 2)}, {"features": torch.full((3, 2), torch.nan)}, {"features": torch.ones(3, 2)}],
)
def test_a_file_without_features_is_one_clear_line(tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content is not None:
        save_file(content, path)
    with pytest.raises(UserError, match="features") as caught:
        make_quantizer(QUANTIZERS["lc"].Config(name="lc", features=path), 4)
    assert "\n" not in str(caught.value)
