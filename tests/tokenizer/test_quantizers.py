"""What every method keeps, whatever it is."""

import copy

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from nsvq.tokenizer import ranks
from nsvq.tokenizer.codebook import nonstationary_loss
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.model import ModelConfig, QuantizedDecoder
from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.quantizers import QUANTIZERS, QuantizerConfig, make_quantizer
from nsvq.tokenizer.quantizers.base import NearestQuantizer, rotated

ALL = sorted(QUANTIZERS)
NEAREST = [name for name in ALL if issubclass(QUANTIZERS[name], NearestQuantizer)]
LEARNED = [name for name in ALL if QUANTIZERS[name].learns_codes]


def tokens(z):
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


@pytest.mark.parametrize("name", ALL)
def test_every_index_decodes_to_a_code_of_its_own_that_encodes_to_it(make, name):
    quantizer = make(name).eval()
    every = torch.arange(quantizer.codebook_size)
    codes = quantizer.codes(every).detach()
    assert torch.equal(codes, quantizer.codebook().detach())
    assert len(codes.unique(dim=0)) == len(codes)
    latents = codes
    if name == "fsq":  # the latents whose bounded values are the codes
        latents = torch.stack([_invert(quantizer.prepare, c) for c in codes])
    if name == "fsp":
        latents = torch.special.ndtri(((codes / 12**0.5) + 0.5).double()).float()
    if name == "ibq":  # the largest inner product with a code is its own only where lengths are equal
        quantizer.weight.data = torch.nn.functional.normalize(quantizer.weight.data, dim=1)
        latents = quantizer.codebook().detach()
    assert torch.equal(quantizer.lookup(latents), every)


def _invert(function, target):
    low, high = torch.full_like(target, -20), torch.full_like(target, 20)
    for _ in range(60):
        middle = (low + high) / 2
        below = function(middle[None])[0] < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@pytest.mark.parametrize("name", ALL)
def test_in_evaluation_the_output_is_the_code_of_the_index(make, name):
    quantizer = make(name).eval()
    z = torch.randn(2, quantizer.dim, 5, 3)
    out = quantizer(z)
    assert torch.equal(out.indices.flatten(), quantizer.lookup(tokens(z)))
    torch.testing.assert_close(tokens(out.z_q), quantizer.codes(out.indices.flatten()), rtol=1e-5, atol=1e-6)
    distance = (quantizer.prepare(tokens(z)) - quantizer.codes(out.indices.flatten())).square().mean()
    assert float(out.losses["commitment"].detach()) == pytest.approx(float(distance.detach()), rel=1e-4)
    assert torch.equal(quantizer(z).z_q, out.z_q)


@pytest.mark.parametrize("name", ALL)
def test_a_table_for_export_finds_the_same_codes_by_distance(make, name):
    quantizer = make(name).eval()
    table = quantizer.export_table()
    if table is None:
        assert name in ("fsq", "fsp")
        return
    z = 2 * torch.randn(500, quantizer.dim)
    wide = torch.nn.functional.pad(z, (0, table.shape[1] - quantizer.dim)).double()
    assert torch.equal(torch.cdist(wide, table.detach().double()).argmin(1), quantizer.lookup(z))
    torch.testing.assert_close(table[:, : quantizer.dim], quantizer.codebook())


@pytest.mark.parametrize("name", ALL)
def test_a_method_with_a_free_table_has_codes_that_follow_what_is_written(make, name):
    quantizer = make(name)
    table = quantizer.table()
    assert quantizer.free_table == (table is not None)
    if table is not None:
        with torch.no_grad():
            table[3] = 2 * table[7]
        quantizer.rows_written(torch.tensor([3]))
        direction = torch.nn.functional.cosine_similarity(*quantizer.codebook()[[3, 7]], dim=0)
        assert float(direction.detach()) == pytest.approx(1)


@pytest.mark.parametrize("name", ALL)
def test_k_means_of_latents_may_become_the_codes_where_the_method_says_so(make, name):
    """Where the code of a latent is the row that is nearest to it, before anything is done to either."""
    quantizer = make(name).eval()
    if quantizer.can_consolidate:
        z = 2 * torch.randn(500, quantizer.dim)
        table = quantizer.table().detach()
        assert torch.equal(quantizer.lookup(z), torch.cdist(z.double(), table.double()).argmin(1))
        assert torch.equal(quantizer.codebook().detach(), table)
    else:
        assert quantizer.table() is None or name in ("fc_l2", "ibq")


@pytest.mark.parametrize("name", ALL)
def test_after_save_and_load_training_goes_on_as_if_undisturbed(make, name):
    one = make(name)
    one.revive_after = 2
    if name == "vp":
        one.fitted.fill_(False)
    parameters = list(one.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05) if parameters else None

    def train(quantizer, optimizer, steps):
        generator, outputs = torch.Generator().manual_seed(steps[0]), []
        for _ in steps:
            z = torch.randn(2, quantizer.dim, 6, 6, generator=generator)
            out = quantizer(z, 1.0 if quantizer.learns_codes else None)
            weights = dict.fromkeys(quantizer.terms, 1.0) | quantizer.loss_weights()
            if optimizer:
                optimizer.zero_grad()
                sum(w * out.losses[n] for n, w in weights.items()).backward()
                optimizer.step()
            quantizer.end_step(True)
            quantizer.end_epoch()
            outputs.append(out.z_q.detach())
        return outputs

    train(one, optimizer, range(5))
    state = {key: value.clone() for key, value in one.state_dict().items()}
    torch.manual_seed(99)  # what a new process starts from is overwritten
    two = make(name)
    two.revive_after = 2
    two.load_state_dict(state)
    other = torch.optim.SGD(two.parameters(), 0.05) if parameters else None
    for a, b in zip(train(one, optimizer, range(5, 10)), train(two, other, range(5, 10)), strict=True):
        assert torch.equal(a, b)
    after = two.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_a_batch_that_is_not_finite_leaves_no_trace_where_the_step_is_skipped(make, name):
    quantizer = make(name).train()
    if name == "vp":
        quantizer.fitted.fill_(False)  # as in training
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        out = quantizer(torch.full((2, quantizer.dim, 4, 4), bad))
        assert out.indices is None or out.indices.min() >= 0
        assert out.indices is None or out.indices.max() < quantizer.codebook_size
        quantizer.end_step(False)
    z = torch.randn(2, quantizer.dim, 4, 4)
    quantizer(z)
    quantizer.end_step(False)
    for key, value in quantizer.state_dict().items():
        if key != "draws.state":  # how often was drawn, whatever became of it
            assert torch.equal(value, before[key]), key
    quantizer(z)
    quantizer.end_step(True)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("name", ALL)
def test_quantization_is_float32_under_autocast(make, name):
    quantizer = make(name).eval()
    z = torch.randn(1, quantizer.dim, 8, 8)
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.indices, expected.indices)
    assert torch.equal(out.z_q, expected.z_q)


@pytest.mark.parametrize("name", NEAREST)
def test_losses_are_means_over_elements_and_pull_one_side_each(make, name):
    quantizer = make(name)
    z = torch.randn(2, 6, 5, 3, requires_grad=True)
    out = quantizer(z)
    flat = quantizer.prepare(tokens(z.detach())).double()
    codes = quantizer.codebook().detach().double()
    assert torch.equal(out.indices.flatten(), torch.cdist(flat, codes).argmin(1))
    expected = (flat - codes[out.indices.flatten()]).square().mean()
    for term in ("codebook", "commitment"):
        assert float(out.losses[term].detach()) == pytest.approx(float(expected), rel=1e-5)
    if name != "ema":
        out.losses["codebook"].backward(retain_graph=True)
        assert z.grad is None
        assert all(parameter.grad is not None for parameter in quantizer.parameters())
        quantizer.zero_grad()
    out.losses["commitment"].backward(retain_graph=True)
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", [name for name in NEAREST if name != "fc_l2"])
def test_gradient_passes_straight_through_to_the_encoder_and_not_to_the_codes(make, name):
    quantizer = make(name)
    z = torch.randn(1, 6, 4, 4, requires_grad=True)
    upstream = torch.randn(1, 6, 4, 4)
    (quantizer(z).z_q * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_the_rotated_gradient_is_that_of_the_turn_from_latent_to_code_and_nothing_else():
    z, code, other, upstream = torch.randn(4, 6, 7, dtype=torch.float64)
    z.requires_grad_()
    jacobians = torch.autograd.functional.jacobian(lambda x: rotated(x, code), z)
    rotated(z, code).mul(upstream).sum().backward()
    for i in range(6):
        s = code[i].norm() / z[i].norm()
        turn = jacobians[i, :, i] / s
        torch.testing.assert_close(s * turn @ z[i], code[i])
        torch.testing.assert_close(turn @ turn.T, torch.eye(7, dtype=torch.float64))
        assert torch.linalg.det(turn) > 0  # it does not mirror
        plane = torch.linalg.qr(torch.stack([z[i], code[i]], 1)).Q
        beside = other[i] - plane @ (plane.T @ other[i])
        torch.testing.assert_close(turn @ beside, beside)
        torch.testing.assert_close(z.grad[i], s * turn.T @ upstream[i])
    with torch.no_grad():
        torch.testing.assert_close(rotated(z, code), code)


@pytest.mark.parametrize("name", NEAREST)
def test_with_the_rotation_values_losses_and_the_gradients_of_codes_stay(make, name):
    plain = make(name)
    turned = copy.deepcopy(plain)
    turned.config = turned.config.model_copy(update={"gradient": "rotation"})
    z, upstream = torch.randn(2, 1, 6, 4, 4)
    results = []
    for quantizer in (plain, turned):
        latents = z.clone().requires_grad_()
        out = quantizer(latents)
        (out.z_q * upstream).sum().backward()
        results.append((out, latents.grad, [p.grad for p in quantizer.parameters()]))
    (a, grad, of_codes), (b, turned_grad, turned_of_codes) = results
    torch.testing.assert_close(a.z_q, b.z_q)
    assert torch.equal(a.indices, b.indices)
    assert all(torch.equal(a.losses[key], b.losses[key]) for key in a.losses)
    assert of_codes == turned_of_codes == [None] * len(of_codes)
    assert not torch.allclose(grad, turned_grad)
    assert turned_grad.isfinite().all()


@pytest.mark.parametrize(("latent", "code"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_without_a_direction_the_gradient_passes_straight_through(latent, code):
    z, value, upstream = torch.full((2, 3), latent, requires_grad=True), torch.full((2, 3), code), torch.randn(2, 3)
    out = rotated(z, value)
    (out * upstream).sum().backward()
    assert torch.equal(out.detach(), value)
    assert torch.equal(z.grad, upstream)


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "ns-vq"])
def test_the_ns_loss_composes_with_every_method_whose_codes_learn(make, name):
    quantizer = make(name)
    z = torch.randn(2, 6, 5, 3)
    assert "nonstationary" not in quantizer(z).losses
    out = quantizer(z, temperature=0.7)
    flat = quantizer.prepare(tokens(z))
    alone = nonstationary_loss(flat, quantizer.codebook(), out.indices.flatten(), 0.7)
    assert float(out.losses["nonstationary"].detach()) == pytest.approx(float(alone.loss.detach()), rel=1e-6)
    assert float(out.stats["winner_mass"]) == pytest.approx(float(alone.winner_mass), rel=1e-6)
    pull = {"temperature": 0.3, "relative_to": "own"}
    NSVQConfig(pull=pull).set_up(quantizer)
    alone = nonstationary_loss(flat, quantizer.codebook(), out.indices.flatten(), 0.3, own=True)
    assert float(quantizer(z, 0.3).stats["winner_mass"]) == pytest.approx(float(alone.winner_mass), rel=1e-5)
    NSVQConfig(pull=pull | {"relative_to": "mean"}).set_up(quantizer)
    assert not quantizer.own_temperature
    if name != "ema":  # whose codes move in closed form (test_ema.py)
        out.losses["nonstationary"].backward()
        assert any(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_latents_of_another_width_are_refused(make, name):
    quantizer = make(name)
    with pytest.raises(ValueError, match=f"latents of {quantizer.dim} channels"):
        quantizer(torch.zeros(1, quantizer.dim + 1, 2, 2))


@pytest.mark.parametrize("name", ALL)
def test_evaluation_talks_to_no_other_rank(make, monkeypatch, name):
    quantizer = make(name).eval()
    if name == "vp":
        quantizer.fitted.fill_(False)
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("a collective call"))
    quantizer(torch.randn(1, quantizer.dim, 4, 4))


# Two ranks as one

CROSS_RANK = {  # what has a state or a loss over all ranks
    "ema": {"codebook_size": 20},
    "lfq": {"temperature": 0.5},
    "bsq": {"temperature": 0.2},
    "ibq": {"codebook_size": 20, "temperature": 0.5},
    "vp": {"codebook_size": 20, "push": 0.5, "refresh": 2},
    "fsp": {"levels": [8, 5, 3]},
}


def run_all(rank, ranks):
    """Three steps of each method on this rank's half of the tokens: losses, gradients, outputs and states."""
    result = {}
    for name, options in CROSS_RANK.items():
        torch.manual_seed(3)
        quantizer = make_quantizer(TypeAdapter(QuantizerConfig).validate_python({"name": name} | options), 3)
        quantizer.revive_after = 2
        if count := quantizer.initial_latents():
            quantizer.initialize(torch.randn(count, 3))
        for step in range(3):
            every = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
            z = every.chunk(ranks)[rank].clone().requires_grad_()
            quantizer.zero_grad()
            out = quantizer(z)
            loss = sum(w * out.losses[n] for n, w in quantizer.loss_weights().items()) + out.z_q.square().mean()
            loss.backward()
            gradients = [z.grad / ranks, *(p.grad for p in quantizer.parameters())]
            quantizer.end_step(True)
        result[name] = {
            "z_q": out.z_q.detach(),
            "gradients": gradients,
            "state": {key: value.clone() for key, value in quantizer.state_dict().items()},
        }
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(7))
    start = points[:8]
    result["kmeans"] = kmeans(lambda: [points.chunk(ranks)[rank]], 8, seed=0, start=start, iterations=5)
    return result


def test_two_ranks_behave_as_one(as_two_ranks):
    one, (first, second) = run_all(0, 1), as_two_ranks(lambda rank: run_all(rank, 2))
    close = {"rtol": 1e-4, "atol": 1e-6}
    for name in CROSS_RANK:
        torch.testing.assert_close(torch.cat([first[name]["z_q"], second[name]["z_q"]]), one[name]["z_q"], **close)
        both = [first[name]["gradients"], second[name]["gradients"]]
        torch.testing.assert_close(torch.cat([both[0][0], both[1][0]]), one[name]["gradients"][0], **close)
        for a, b, expected in zip(both[0][1:], both[1][1:], one[name]["gradients"][1:], strict=True):
            torch.testing.assert_close((a + b) / 2, expected, **close)
        for key, value in one[name]["state"].items():
            assert torch.equal(first[name]["state"][key], second[name]["state"][key]), (name, key)
            torch.testing.assert_close(first[name]["state"][key], value, **close)
    torch.testing.assert_close(first["kmeans"], one["kmeans"])


@pytest.mark.parametrize("name", ["vq", "fc_l2", "simvq"])
def test_a_tokens_squared_error_is_measured_where_it_is_compared_with_codes(make, name):
    quantizer = make(name)
    z = 5 * torch.randn(2, 6, 3, 4)
    output = quantizer(z)
    flat = quantizer.prepare(z.permute(0, 2, 3, 1).reshape(-1, 6)).double()
    nearest = torch.cdist(flat, quantizer.codebook().double()).square().amin(1)
    errors = quantizer.squared_errors(z, output.z_q)
    torch.testing.assert_close(errors.double(), nearest.view(2, 3, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vq", "ema"])
@pytest.mark.slow
def test_a_quantizer_is_part_of_one_graph_with_its_decoder(make, name):
    """As `accelerate launch --dynamo_backend` compiles them."""
    quantizer = make(name)
    config = ModelConfig(
        channels=4, channel_multipliers=[1], layers_per_block=1, latent_channels=quantizer.dim, norm_groups=2
    )
    decoder, z = QuantizedDecoder(config, quantizer), torch.randn(2, quantizer.dim, 4, 4)
    torch._dynamo.reset()
    temperature = 1.0 if quantizer.learns_codes else None
    explained = torch._dynamo.explain(decoder)(z, temperature)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
