import pytest
import torch


def test_it_trains_one_linear_map_over_a_frozen_base_of_variance_one_over_d(make):
    quantizer = make("simvq", codebook_size=5000, dim=16)
    assert {name for name, _ in quantizer.named_parameters()} == {"linear.weight", "linear.bias"}
    assert float(quantizer.base.var() * 16) == pytest.approx(1, rel=0.02)
    expected = quantizer.base @ quantizer.linear.weight.T + quantizer.linear.bias
    torch.testing.assert_close(quantizer.codebook(), expected)
