import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from tokenizer.quantizers import QUANTIZERS, make_quantizer


def test_codes_are_a_trained_projection_of_frozen_features(make):
    quantizer = make("lc")
    assert {name for name, _ in quantizer.named_parameters()} == {"projector.weight", "projector.bias"}
    expected = quantizer.features.double() @ quantizer.projector.weight.double().T + quantizer.projector.bias.double()
    torch.testing.assert_close(quantizer.codebook().double(), expected, rtol=1e-5, atol=1e-6)
    wide = make("lc", dim=400)
    assert float(wide.projector.weight.detach().std() * 20) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("content", [None, {"other": torch.zeros(3, 2)}, {"features": torch.full((3, 2), torch.nan)}])
def test_a_file_without_features_is_one_clear_line(tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content is not None:
        save_file(content, path)
    with pytest.raises(UserError, match="features") as caught:
        make_quantizer(QUANTIZERS["lc"].Config(name="lc", features=path), 4)
    assert "\n" not in str(caught.value)
