import copy
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from nsvq.autoregressive.model import ModelConfig, NextToken, make_llama
from nsvq.autoregressive.sampling import guidance_scales, sample

CODES, CLASSES, TOKENS = 16, 5, 12


@pytest.fixture(scope="module")
def llama():
    """A network of random weights, so that each token hangs on all before it."""
    torch.manual_seed(0)
    model = make_llama(ModelConfig(size="tiny", depth=2, width=32, heads=2), CODES, CLASSES, TOKENS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def given():
    """(ids, uniforms) of six images."""
    return CODES + torch.tensor([0, 1, 4, 2, 2, 5]), torch.rand(6, TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_tokens_are_those_of_generate(llama, given, scale):
    ids, uniforms = given
    null = torch.full((6, 1), CODES + CLASSES)
    theirs = llama.generate(
        ids[:, None],
        attention_mask=torch.ones(6, 1, dtype=torch.int64),
        do_sample=False,
        guidance_scale=scale,
        negative_prompt_ids=null,
    )[:, 1:]
    ours = sample(llama, CODES, ids, uniforms, guidance_scale=scale, temperature=0)
    assert torch.equal(ours, theirs)
    assert theirs.max() < CODES
    assert len(theirs.unique(dim=0)) > 1


def test_generate_draws_codes_alone_and_as_many_as_an_image_has(llama):
    found = llama.generate(torch.tensor([[CODES]] * 64), attention_mask=torch.ones(64, 1, dtype=torch.int64))[:, 1:]
    assert found.shape == (64, TOKENS)
    assert set(found.flatten().tolist()) == set(range(CODES))


@pytest.mark.parametrize(
    "how", [{}, {"guidance_scale": 3.0, "guidance_schedule": "cosine", "guidance_power": 2.5, "top_k": 5}]
)
def test_cached_and_uncached_sampling_give_the_same_tokens(llama, given, how):
    ids, uniforms = given
    rise = {"schedule": how.get("guidance_schedule", "constant"), "power": how.get("guidance_power", 1.0)}
    scales = guidance_scales(how.get("guidance_scale", 1.0), tokens=TOKENS, **rise)
    tokens = torch.empty(6, 0, dtype=torch.int64)
    with torch.no_grad():
        for i in range(TOKENS):
            main, base = (
                llama(torch.cat([row[:, None], tokens], 1), use_cache=False).logits[:, -1, :CODES]
                for row in (ids, torch.full_like(ids, CODES + CLASSES))
            )
            logits = base + scales[i] * (main - base)
            if "top_k" in how:
                logits[logits < logits.topk(5).values[:, -1:]] = -torch.inf
            sums = logits.double().softmax(1).cumsum(1)
            tokens = torch.cat([tokens, (sums <= uniforms[:, i : i + 1]).sum(1, keepdim=True)], 1)
    assert torch.equal(sample(llama, CODES, ids, uniforms, **how), tokens)


def test_a_compiled_network_samples_the_same_tokens_by_one_graph(llama, given):
    ids, uniforms = given
    compiled, counters = copy.deepcopy(llama), torch._dynamo.utils.counters
    compiled.compile(backend="eager")
    counters.clear()
    for scale in (2.0, 3.0):
        tokens = sample(compiled, CODES, ids, uniforms, guidance_scale=scale)
        assert torch.equal(tokens, sample(llama, CODES, ids, uniforms, guidance_scale=scale))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_network_samples_under_autocast(llama, given):
    ids, uniforms = given
    compiled = copy.deepcopy(llama)
    compiled.compile(backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = sample(compiled, CODES, ids, uniforms, guidance_scale=2.0)
        assert (tokens == sample(llama, CODES, ids, uniforms, guidance_scale=2.0)).float().mean() > 0.9


def test_guidance_1_is_the_class_alone_and_guidance_0_no_class(llama, given):
    ids, uniforms = given
    conditional = sample(llama, CODES, ids, uniforms)
    assert torch.equal(sample(llama, CODES, ids, uniforms, guidance_scale=1 + 1e-12), conditional)  # both rows computed
    unconditional = sample(llama, CODES, torch.full_like(ids, CODES + CLASSES), uniforms)
    assert torch.equal(sample(llama, CODES, ids, uniforms, guidance_scale=0.0), unconditional)
    assert not torch.equal(conditional, unconditional)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_does_not_depend_on_the_others_in_its_batch(llama, given, scale):
    ids, uniforms = given
    whole = sample(llama, CODES, ids, uniforms, guidance_scale=scale)
    single = [sample(llama, CODES, ids[i : i + 1], uniforms[i : i + 1], guidance_scale=scale) for i in range(6)]
    assert torch.equal(torch.cat(single), whole)
    assert not torch.equal(whole[3], whole[4])  # of one class, with other numbers


def test_guidance_rises_over_the_tokens_as_it_says():
    assert guidance_scales(3.0, "constant", 4) == [3.0] * 4
    assert guidance_scales(3.0, "linear", 5) == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert guidance_scales(3.0, "cosine", 5) == pytest.approx([1, 2 - 2**0.5 / 2, 2, 2 + 2**0.5 / 2, 3])
    assert guidance_scales(3.0, "linear", 1) == [1.0]
    assert guidance_scales(3.0, "linear", 5, 2.0) == pytest.approx([1, 1.125, 1.5, 2.125, 3])
    half = guidance_scales(3.0, "cosine", 5, 0.5)  # the second of five tokens is at half of the rise
    assert half[:2] == pytest.approx([1, 2])
    assert half[-1] == pytest.approx(3)


class Fixed:
    """Answers with logits that only the last token decides."""

    class config:
        vocab_size = 5

    class Output:
        past_key_values = None

    def __init__(self, probabilities):
        self.logits = torch.log(torch.tensor(probabilities))

    def __call__(self, input_ids, past_key_values, use_cache):
        output = self.Output()
        output.logits = self.logits[input_ids]
        return output


CHAIN = [[0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.05, 0.05, 0.9], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]]  # 3: the class


def frequencies(tokens):
    counts = Counter(map(tuple, tokens.tolist()))
    return [counts[(a, b)] for a in range(3) for b in range(3)]


def test_tokens_come_at_their_frequencies():
    drawn = sample(Fixed(CHAIN), 3, torch.full((20_000,), 3), torch.rand(20_000, 2, dtype=torch.float64))
    expected = [20_000 * CHAIN[3][a] * CHAIN[a][b] for a in range(3) for b in range(3)]
    assert chisquare(frequencies(drawn), expected).pvalue > 1e-3


def test_a_code_without_a_chance_is_never_drawn():
    chain = Fixed([[0.0, 0.5, 0.5]] * 5)
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert sample(chain, 3, torch.full((2,), 3), ends).tolist() == [[1], [2]]


def test_a_distribution_is_learned_and_sampled_back_at_its_frequencies():
    llama = make_llama(ModelConfig(size="tiny", depth=1, width=16, heads=2), codes=3, classes=1, tokens=2)
    model, places = NextToken(llama, 3), torch.cartesian_prod(torch.arange(3), torch.arange(3))
    times = torch.tensor([round(200 * CHAIN[3][a] * CHAIN[a][b]) for a, b in places])  # of 200, exact
    pairs = places.repeat_interleave(times, dim=0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.full((len(pairs),), 3), pairs).backward()
        optimizer.step()
    drawn = sample(llama.eval(), 3, torch.full((2_000,), 3), torch.rand(2_000, 2, dtype=torch.float64))
    assert chisquare(frequencies(drawn), 10 * times).pvalue > 1e-3


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, [0.0, 0.375, 0.625]),
        ({"top_p": 0.6}, [0.0, 0.375, 0.625]),
        ({"top_p": 0.45}, [0.0, 0.0, 1.0]),
        ({"temperature": 0.5}, [0.04 / 0.38, 0.09 / 0.38, 0.25 / 0.38]),
    ],
)
def test_temperature_top_k_and_top_p_change_the_distribution_as_they_should(how, kept):
    drawn = sample(Fixed(CHAIN), 3, torch.full((20_000,), 3), torch.rand(20_000, 1, dtype=torch.float64), **how)
    torch.testing.assert_close(drawn.flatten().bincount(minlength=3) / 20_000, torch.tensor(kept), rtol=0, atol=0.02)
