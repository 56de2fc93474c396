import torch


def reference(q):
    """The block token by token, float64, with the K x K attention matrix."""
    state = {name: value.double() for name, value in q.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def phi(u):
        return torch.where(u > 0, u + 1, u.exp())

    x = linear(state["base"], "project_in") + state["positions"]
    y = norm(x, "norm_attention")
    scores = phi(linear(y, "query")) @ phi(linear(y, "key")).T  # (K, K)
    x = x + linear(scores @ linear(y, "value") / (scores.sum(1, keepdim=True) + 1e-6), "output")
    y = linear(norm(x, "norm_feedforward"), "feedforward.0")
    x = x + linear(y * torch.special.ndtr(y), "feedforward.2")
    return linear(norm(x, "norm_out"), "project_out")


def test_codes_equal_the_dense_float64_block(make):
    quantizer = make("transvq")
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(quantizer.codebook().double(), reference(quantizer), rtol=1e-4, atol=1e-5)


def test_the_base_is_frozen_and_every_code_depends_on_all(make):
    quantizer = make("transvq")
    assert "base" not in dict(quantizer.named_parameters())
    before = quantizer.codebook()
    with torch.no_grad():
        quantizer.positions[7] += torch.randn(16)
    assert ((quantizer.codebook() - before).abs().amax(1) > 1e-5).all()
