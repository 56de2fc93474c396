"""The layer in other people's loops: nothing of the trainer runs here."""

import contextlib
import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nsvq import ResidualVectorQuantizer, VectorQuantizer
from nsvq.errors import UsageError
from nsvq.tokenizer.quantizers import QUANTIZERS
from nsvq.tokenizer.quantizers.base import NearestQuantizer

DOCS = Path(__file__).parents[2] / "docs" / "layer.md"
METHODS = {  # what each needs besides its name
    name: {"levels": [8, 5, 3], "codebook_dim": 3} if name in ("fsq", "fsp") else {"codebook_dim": 5}
    for name in sorted({"nsvq", *QUANTIZERS} - {"vp", "lc"})
}
for name in METHODS.keys() - {"fsq", "fsp", "lfq", "bsq"}:
    METHODS[name]["codebook_size"] = 24


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def train(layer, batches):
    """The layer's answers to batches, a step each."""
    return [layer(x) for x in batches]


def short(**arguments):
    """A layer whose epochs are of some steps, so that a few of them show all that happens."""
    arguments = {"replace_every": 4, "nsvq": {"replace": {"after": 1}, "revive": 2}} | arguments
    return VectorQuantizer(6, 40, **arguments)


# All codes stay in use


@pytest.mark.slow
def test_the_loop_of_the_docs_keeps_all_codes_in_use():
    scope = {}
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert code.count("\n") <= 45
    exec(compile(code, DOCS, "exec"), scope)
    assert scope["used"] >= 0.99


@pytest.mark.slow
def test_an_rq_vae_on_vectors_keeps_all_codes_of_all_levels_in_use():
    centers, mix = torch.randn(100, 32), torch.randn(8, 32)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32))
    layer = ResidualVectorQuantizer(16, 128, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(100):
        items = centers[torch.randint(100, (512,))] + 0.5 * torch.randn(512, 8) @ mix
        quantized, indices, loss = layer(encoder(items))
        (loss + (decoder(quantized) - items).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    items = centers[torch.randint(100, (8192,))] + 0.5 * torch.randn(8192, 8) @ mix
    indices = layer.eval()(encoder(items)).indices
    assert min(len(of_level.unique()) for of_level in indices.T) / 128 >= 0.99


# What a forward gives


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_codes_that_decode_to_what_evaluation_gave(method):
    layer, x = VectorQuantizer(7, method=method, **METHODS[method]), torch.randn(3, 4, 5, 7, requires_grad=True)
    quantized, indices, loss = layer(x)
    assert (quantized.shape, indices.shape, loss.shape) == (x.shape, x.shape[:-1], ())
    (loss + quantized.square().mean()).backward()
    assert x.grad.abs().sum() > 0
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert {"project_in.weight", "project_out.weight"} <= trained
    layer.eval()
    before = state(layer)
    quantized, indices, _ = layer(x)
    torch.testing.assert_close(layer.decode(indices), quantized, rtol=1e-4, atol=1e-5)
    assert indices.max() < layer.codebook_size == len(layer.codebook)
    assert_equal(before, state(layer))


def test_a_step_finds_the_nearest_code_and_its_loss_is_that_of_the_formula():
    layer = short(nsvq={"pull": None})
    for _ in range(3):
        codes, x = layer.codebook.double().clone(), torch.randn(2, 30, 6)
        quantized, indices, loss = layer(x)
        if _ > 0:  # the first step starts the codes
            nearest = torch.cdist(x.double(), codes).argmin(-1)
            assert torch.equal(indices, nearest)
            torch.testing.assert_close(quantized, codes[nearest].float())
            assert float(loss) == pytest.approx(0.25 * float((x - codes[nearest]).square().mean()), rel=1e-5)


def test_channels_may_come_first():
    one, x = short(), torch.randn(2, 4, 5, 6)
    other = copy.deepcopy(one)
    other.channel_first = True
    for _ in range(3):
        a, b = one(x), other(x.movedim(-1, 1))
    assert torch.equal(a.quantized.movedim(-1, 1), b.quantized)
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(one.decode(a.indices).movedim(-1, 1), other.decode(b.indices))


def test_what_stands_at_masked_positions_reaches_no_weight_and_decodes_to_nothing():
    layer, x = VectorQuantizer(6, 16, codebook_dim=3), torch.randn(4, 20, 6)
    mask = torch.rand(4, 20) < 0.7
    x[~mask] = torch.nan
    quantized, indices, loss = layer(x, mask)
    (loss + quantized.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert not layer.decode(indices)[~mask].any()
    several = ResidualVectorQuantizer(6, 16, num_quantizers=2, codebook_dim=3)
    _, indices, _ = several(x, mask)
    assert not several.decode(indices)[~mask].any()


def test_masked_positions_change_nothing():
    one, other = short(), short()
    other.load_state_dict(one.state_dict())
    for step in range(12):
        x, mask = torch.randn(4, 20, 6), torch.rand(4, 20) < 0.7
        mask[0] = step % 2 == 0  # a sequence of nothing but padding
        x[~mask] = torch.tensor([1e4, float("nan")])[step % 2]
        x = x.requires_grad_()
        padded, alone = one(x, mask), other(x[mask][None])
        assert torch.equal(padded.indices[mask], alone.indices[0])
        assert (padded.indices[~mask] == -1).all()
        assert torch.equal(padded.quantized[mask], alone.quantized[0])
        assert not padded.quantized[~mask].any()
        assert torch.equal(padded.loss, alone.loss)
        (gradient,) = torch.autograd.grad(padded.loss + padded.quantized.sum(), x)
        assert gradient[mask].all()
        assert not gradient[~mask].any()
        assert_equal(state(one), state(other))
    before = state(one)
    one(x, torch.zeros(4, 20, dtype=torch.bool))  # of a whole batch
    assert torch.equal(before["quantizer.quantizer.weight"], one.codebook)
    assert not VectorQuantizer(2, method="fsq", levels=[8, 5])(x[..., :2], torch.zeros(4, 20) > 0).loss


@pytest.mark.parametrize("shape", [(3, 5), (6,), (2, 6, 5)])
def test_inputs_and_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected an input \[\.\.\., 6\], got"):
        short()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected a bool mask \[2, 3\], got torch.float32"):
        short()(torch.zeros(2, 3, 6), torch.ones(2, 3))


# The residual layer


def test_residual_codes_add_up_level_by_level():
    layer, x = ResidualVectorQuantizer(6, 32, 4), torch.randn(2, 50, 6)
    for _ in range(20):
        quantized, indices, loss = layer(x)
    assert indices.shape == (2, 50, 4)
    layer.eval()
    quantized, indices, loss = layer(x)
    rest, losses, errors = x.double(), [], []
    for i, level in enumerate(layer.levels):
        codes = level.codebook.double()
        assert torch.equal(indices[..., i], torch.cdist(rest, codes).argmin(-1))
        rest = rest - codes[indices[..., i]]
        errors.append(float(rest.square().mean()))
        losses.append(0.25 * errors[-1])
    torch.testing.assert_close(quantized, (x - rest).float())
    torch.testing.assert_close(layer.decode(indices), quantized)
    assert float(loss) == pytest.approx(sum(losses), rel=1e-5)
    assert errors == sorted(errors, reverse=True)
    cut = indices.clone()
    cut[..., 2:] = -1
    torch.testing.assert_close(layer.decode(cut), (x - rest).float() - _codes(layer, indices, (2, 3)))
    leaf = x.clone().requires_grad_()
    layer(leaf).quantized.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def _codes(layer, indices, levels):
    return sum(layer.levels[i].get_codes(indices[..., i]) for i in levels)


def test_quantizer_dropout_leaves_out_the_last_levels_in_training_alone():
    layer, x = ResidualVectorQuantizer(6, 32, 4, quantizer_dropout=True), torch.randn(50, 6)
    used = set()
    for _ in range(30):
        indices = layer(x).indices
        of_levels = (indices >= 0).float().mean(0).tolist()
        assert of_levels == sorted(of_levels, reverse=True)
        assert set(of_levels) <= {0.0, 1.0}
        used.add(sum(of_levels))
    assert used == {1, 2, 3, 4}
    assert (layer.eval()(x).indices >= 0).all()


# Upkeep without a trainer


def test_codes_start_from_the_first_batch_as_often_as_each_is_needed():
    layer, x = short(), torch.randn(50, 6)
    layer(torch.full((50, 6), float("nan")))  # nothing starts from that
    quantized, indices, _ = layer(x)
    assert len(indices.unique()) == 40
    equal = (quantized[:, None] - x).abs().amax(-1) < 1e-6
    assert equal.any(1).all()
    assert int(equal.diagonal().sum()) == 40
    few = VectorQuantizer(6, 40)
    few(x[:15])
    assert len(few.codebook.unique(dim=0)) == 40
    assert float(torch.cdist(few.codebook, x[:15]).amin(1).max()) < 0.02


def test_unused_codes_are_replaced_at_the_end_of_an_epoch_and_revived_before():
    layer = short(method="vq", nsvq={"replace": {"after": 0, "noise": 0.0}})  # no revival: `vq` cannot
    near, moved = torch.randn(40, 6), []
    for step in range(9):  # 40 tokens each: an epoch is 160
        if step == 1:
            with torch.no_grad():
                layer.quantizer.quantizer.weight[:7] += 100
        before = layer.codebook.detach().clone()
        layer(near)
        moved.append(int((layer.codebook != before).any(1).sum()))
    assert moved == [40, 0, 0, 0, 0, 0, 0, 0, 7]  # the first starts them; the first epoch saw the seven win
    revived = short()
    revived(near)
    revived.quantizer.quantizer.weight[:7] += 100
    for _ in range(4):  # more than two tokens a code
        revived(near)
    assert float(revived.codebook.abs().max()) < 20


def test_averages_forget_by_tokens_whatever_the_batch():
    decays = []
    for tokens in (10, 100, 100_000):
        layer = short()
        layer(torch.randn(tokens, 6))
        decays.append(layer.quantizer.quantizer.decay)
    assert decays == pytest.approx([0.99, 0.9, 0.8])
    plain = VectorQuantizer(6, 40, "ema", decay=None)
    plain(torch.randn(100, 6))
    assert plain.quantizer.quantizer.decay == pytest.approx(0.9)
    chosen = short(decay=0.7)
    chosen(torch.randn(10, 6))
    assert chosen.quantizer.quantizer.decay == 0.7


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_float32_in_a_model_of_half_precision_and_under_autocast(dtype):
    plain = short()
    batches = [torch.randn(2, 30, 6).to(dtype) for _ in range(6)]
    half = copy.deepcopy(plain).to(dtype)
    with torch.autocast("cpu", dtype):
        inside = [half(x) for x in batches]
    for x, answer in zip(batches, inside, strict=True):
        expected = plain(x.float())
        assert answer.quantized.dtype == dtype
        assert torch.equal(answer.indices, expected.indices)
        assert torch.equal(answer.quantized, expected.quantized.to(dtype))
        assert torch.equal(answer.loss, expected.loss)
    assert_equal(state(plain), state(half))


def test_a_batch_that_overflowed_reaches_no_code():
    layer, x = short(), torch.randn(60, 6)
    train(layer, [x] * 2)
    before = state(layer)
    broken = x.clone()
    broken[3, 2] = float("inf")
    assert not layer(broken).loss.isfinite()
    assert_equal(before, state(layer))
    assert layer(x).loss.isfinite()


# What a training does to a forward


def test_a_step_may_come_in_parts():
    nsvq = {"replace": {"after": 0}, "revive": None}  # latents for revival come from the last part
    whole, parts = short(nsvq=nsvq), short(nsvq=nsvq, accumulation=3)
    parts.load_state_dict(whole.state_dict())
    for step in range(9):
        x = torch.randn(6, 20, 6)
        if step == 0:  # codes start from the first forward
            x = x[:2].repeat(3, 1, 1)
            whole(x[:2]), [parts(x[:2]) for _ in range(3)]
            parts.load_state_dict(whole.state_dict())
            continue
        together = whole(x)
        answers = [parts(part) for part in x.chunk(3)]
        assert torch.equal(torch.cat([answer.indices for answer in answers]), together.indices)
        assert float(sum(answer.loss for answer in answers)) / 3 == pytest.approx(float(together.loss), rel=1e-5)
        torch.testing.assert_close(parts.codebook, whole.codebook)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["nsvq", "vq", "fsp", "residual"])
def test_a_forward_that_checkpointing_repeats_counts_once_and_sees_the_same_codes(method, reentrant):
    if method == "residual":
        one = ResidualVectorQuantizer(6, 40, 3, quantizer_dropout=True, replace_every=4)
    else:
        one = short(method=method, nsvq={}) if method != "fsp" else VectorQuantizer(3, method="fsp", levels=[8, 5, 3])
    other = copy.deepcopy(one)
    for _ in range(8):
        x = torch.randn(80, one.dim)
        gradients = []
        for layer in (one, other):
            leaf = x.clone().requires_grad_()
            answer = layer(leaf) if layer is one else checkpoint(layer, leaf, use_reentrant=reentrant)
            (answer[2] + answer[0].pow(3).mean()).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
        assert_equal(state(one), state(other))


def test_training_resumes_to_the_bit():
    batches = [torch.randn(50, 6) for _ in range(14)]
    residual = {"num_quantizers": 3, "quantizer_dropout": True, "replace_every": 4}
    parts = lambda: ResidualVectorQuantizer(6, 40, **residual, accumulation=2)  # noqa: E731
    for make in (short, lambda: ResidualVectorQuantizer(6, 40, **residual), parts):
        whole = make()
        train(whole, batches[:6])
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        file.seek(0)
        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for one, other in zip(train(whole, batches[6:]), train(resumed, batches[6:]), strict=True):
            assert torch.equal(one.quantized, other.quantized)
            assert torch.equal(one.loss, other.loss)
        assert_equal(state(whole), state(resumed))


@pytest.mark.slow
def test_compiled_it_is_one_graph_in_evaluation_and_breaks_once_in_training():
    torch._dynamo.reset()
    for layer in (short(codebook_dim=4), ResidualVectorQuantizer(6, 40, 2, replace_every=4)):
        plain = copy.deepcopy(layer)
        x = torch.randn(2, 30, 6)
        compiled = torch.compile(layer, backend="aot_eager")
        for _ in range(4):
            one, other = compiled(x), plain(x)
            assert torch.equal(one.indices, other.indices)
            torch.testing.assert_close(one.quantized, other.quantized)
        assert_equal(state(plain), state(layer))
        assert torch._dynamo.explain(layer)(x).graph_break_count <= 1
        layer.eval()
        whole = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(whole.indices, layer(x).indices)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_goes_to_another_process(method):
    layer = VectorQuantizer(6, method=method, **METHODS[method])
    x = torch.randn(50, 6)
    layer(x)
    other = pickle.loads(pickle.dumps(layer)).eval()
    assert torch.equal(other(x).indices, layer.eval()(x).indices)


@pytest.mark.parametrize("method", ["nsvq", "vq", "ibq"])
def test_a_layer_starts_from_codes_that_it_is_given(method):
    nsvq = {"revive": None, "pull": None} if method == "nsvq" else None
    layer, codes = VectorQuantizer(6, 40, method, nsvq=nsvq), torch.randn(40, 6)
    layer.set_codes(codes)
    layer(codes[:30])
    torch.testing.assert_close(layer.codebook, codes)  # averages of latents that are the codes
    train(layer, torch.randn(6, 200, 6))
    layer.set_codes(codes.tolist())
    assert not layer.quantizer.usage.any()
    assert layer.quantizer.clock[1:].tolist() == [1, 0, 0]
    assert layer.quantizer.distance == 0
    with pytest.raises(ValueError, match=r"expected codes \[40, 6\], got \[3, 6\]"):
        layer.set_codes(codes[:3])
    with pytest.raises(UsageError, match="simvq makes its codes itself"):
        VectorQuantizer(6, 40, "simvq").set_codes(codes)


def test_the_first_distance_is_of_latents_that_are_no_codes_themselves():
    layer, x = VectorQuantizer(6, 512), torch.randn(520, 6)
    layer(x)  # from which the codes start: 8 of the latents are none
    assert layer.quantizer.temperature.value() is None
    x = torch.randn(2000, 6)
    nearest = torch.cdist(x, layer.codebook).amin(1).square().mean()
    layer(x)
    assert float(layer.quantizer.distance) == pytest.approx(float(nearest), rel=1e-3)


def test_weights_of_the_losses_are_the_methods_own():
    x = torch.randn(50, 6)
    for method, commitment, codebook in (("ibq", 1.0, 0.25), ("vq", 0.25, 1.0)):
        torch.manual_seed(0)
        usual = VectorQuantizer(6, 32, method)
        said = VectorQuantizer(6, 32, method, commitment_weight=commitment, codebook_weight=codebook)
        said.load_state_dict(usual.state_dict())
        assert torch.equal(usual(x).loss, said(x).loss)
    layer = VectorQuantizer(6, 32, "ns-vq")
    layer(x)
    layer(x).loss.backward()
    assert (layer.quantizer.quantizer.weight.grad.abs().sum(1) > 0).float().mean() > 0.9  # losers are pulled, too


# Two ranks as one


def run_all(rank, ranks):
    """Some steps on this rank's half of each batch, with masks that leave the ranks different numbers of tokens."""
    result = {}
    dropout = {"num_quantizers": 3, "quantizer_dropout": True}
    for name, arguments in {
        "one": {"replace_every": 3},
        "residual": {"replace_every": 3, "num_quantizers": 2},
        "simvq": {"method": "simvq"},
        "levels left out": dropout | {"replace_every": 3, "accumulation": 2},
        "levels of simvq left out": dropout | {"method": "simvq"},
    }.items():
        torch.manual_seed(3)
        kind = ResidualVectorQuantizer if "num_quantizers" in arguments else VectorQuantizer
        encoder, layer = nn.Linear(6, 6), kind(6, 20, **arguments)
        model = nn.ModuleList([encoder, layer])
        both = _Encoded(model)
        unused = arguments.get("method") == "simvq" and "quantizer_dropout" in arguments
        both = DistributedDataParallel(both, find_unused_parameters=unused) if ranks > 1 else both
        optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
        for step in range(10):
            draws = torch.Generator().manual_seed(step)
            x, mask = torch.randn(4, 15, 6, generator=draws), torch.rand(4, 15, generator=draws) < 0.6
            mask[2:] &= step != 4  # once, rank 1 has none
            waits = step % 2 == 0 and arguments.get("accumulation") == 2
            with both.no_sync() if waits and ranks > 1 else contextlib.nullcontext():
                answer = both(x.chunk(ranks)[rank], mask.chunk(ranks)[rank])
                answer.loss.backward()
            if not waits:
                optimizer.step()
                optimizer.zero_grad()
        result[name] = state(model) | {"indices": answer.indices}
    return result


class _Encoded(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x, mask):
        encoder, layer = self.parts
        return layer(encoder(x), mask)


@pytest.mark.slow
def test_two_ranks_behave_as_one_and_hold_the_same_codes(as_two_ranks):
    first, second = as_two_ranks(lambda rank: run_all(rank, 2))
    for name, alone in run_all(0, 1).items():
        indices = torch.cat([each[name].pop("indices") for each in (first, second)])
        assert torch.equal(indices, alone.pop("indices"))
        assert_equal(first[name], second[name])
        for key, value in alone.items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nope"}, "method = 'nope' should be one of nsvq, bsq"),
        ({"method": "vp"}, "only the trainer can do"),
        ({}, "codebook_size = None"),
        ({"codebook_size": 40, "decai": 0.9}, "unknown key decai; did you mean decay"),
        ({"method": "fsq", "levels": [8, 5]}, "codebook_dim = 6 must be the number of quantizer.levels, 2"),
        ({"method": "fsq", "levels": [8, 5], "codebook_dim": 2, "codebook_size": 50}, "fsq has 40 codes"),
        ({"method": "simvq", "codebook_size": 40, "nsvq": {"replace": {}}}, "simvq has no free codes to replace"),
        ({"codebook_size": 40, "nsvq": {"freeze": {}}}, "stop training what is before this layer"),
        ({"codebook_size": 40, "accumulation": 0}, "accumulation a whole number, at least 1"),
        ({"codebook_size": 40, "accumulation": 1.5}, "accumulation a whole number, at least 1"),
        ({"codebook_size": 40, "codebook_dim": 0}, "codebook_dim = 0 must be at least 1"),
        ({"codebook_size": 40, "commitment_weight": -1}, "must be 0 or more"),
        ({"codebook_size": 40, "method": "ns-vq", "nsvq": {"pull": None}}, "ns-vq is its pull"),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_what_to_do(arguments, message):
    with pytest.raises(UsageError, match=message) as found:
        VectorQuantizer(6, **arguments)
    assert "\n" not in str(found.value)


def test_methods_that_quantize_no_residuals_are_refused():
    for method in METHODS:
        options = {key: value for key, value in METHODS[method].items() if key != "codebook_dim"}
        kind = QUANTIZERS["ema" if method == "nsvq" else method]
        if issubclass(kind, NearestQuantizer) and method != "fc_l2":
            ResidualVectorQuantizer(6, num_quantizers=2, method=method, **options)
        else:
            with pytest.raises(UsageError, match=f"{method} quantizes no residuals"):
                ResidualVectorQuantizer(6, num_quantizers=2, method=method, **options)
