import pytest
import torch

from nsvq.tokenizer.quantizers import ns_vq


@pytest.mark.parametrize("pull", [0.01, 0.2])
def test_pull_and_gradient_equal_a_dense_float64_reference_at_each_epochs_temperature(make, monkeypatch, pull):
    monkeypatch.setattr(ns_vq, "rows_in_tile", lambda codes: 11)  # several uneven tiles
    quantizer = make("ns-vq", pull=pull, cooling=0.5)
    z = torch.randn(3, 6, 5, 5) + 2
    for epoch in range(3):
        out = quantizer(z, temperature=4.0)
        quantizer.zero_grad()
        (3 * out.losses["nonstationary"]).backward()

        flat = z.permute(0, 2, 3, 1).reshape(-1, 6).double()
        codes = quantizer.weight.detach().double().requires_grad_()
        distances = (flat[:, None] - codes[None]).square().sum(-1)
        p = torch.softmax(-distances / (4.0 * 0.5**epoch), 1).detach()
        winner = torch.nn.functional.one_hot(out.indices.flatten(), 40)
        weights = (pull * 40 * p * (1 - winner) + winner).clamp(0, 1)  # the precursor's w, the winner at 1
        dense = (weights * distances).sum() / flat.numel()
        ((3 * dense) - 3 * (winner * distances).sum() / flat.numel()).backward()
        loss = out.losses["nonstationary"] + out.losses["codebook"]
        assert float(loss.detach()) == pytest.approx(float(dense.detach()), rel=1e-5)
        torch.testing.assert_close(quantizer.weight.grad.double(), codes.grad, rtol=1e-4, atol=1e-6)
        quantizer.end_epoch()


def test_the_temperature_has_a_floor(make):
    quantizer = make("ns-vq", cooling=0.5)
    quantizer.epochs.fill_(10_000)
    out = quantizer(torch.randn(1, 6, 4, 4), temperature=1.0)
    assert float(out.losses["nonstationary"]) == 0  # the softmax is a one-hot of the winner
    assert float(out.stats["winner_mass"]) == 1
