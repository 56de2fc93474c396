import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights

from nsvq.autoregressive.model import ModelConfig, NextToken, chunked_cross_entropy, make_llama, start_from_codes

TINY = {"size": "tiny", "depth": 2, "width": 32, "heads": 2}


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_chunked_loss_and_its_gradients_equal_the_dense_ones_in_float64(at_once):
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    table = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(17, (23,))
    dense = F.cross_entropy(hidden @ table.T, targets)
    expected = torch.autograd.grad(3 * dense, (hidden, table))
    chunked = chunked_cross_entropy(hidden, table, targets, at_once)
    torch.testing.assert_close(chunked, dense, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * chunked, (hidden, table)), expected, rtol=1e-10, atol=1e-14)


def test_logits_of_all_places_are_never_kept():
    """Saved for the backward pass, beside the inputs, is nothing of their size."""
    hidden, table = torch.randn(64, 2, requires_grad=True), torch.randn(100, 2, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        chunked_cross_entropy(hidden, table, torch.randint(100, (64,)), at_once=800)
    assert max(saved) <= table.numel()


def test_logits_are_made_in_eighths_of_256_to_512_mib(monkeypatch):
    monkeypatch.setattr("nsvq.autoregressive.model.LOGITS_AT_ONCE", (2000, 4000))
    for rows, expected in ((10, [10]), (100, [20] * 5), (240, [30] * 8), (480, [40] * 12)):
        seen = []
        monkeypatch.setattr(
            "nsvq.autoregressive.model._summed", lambda h, *_, seen=seen: (seen.append(len(h)), h.sum())[1]
        )
        chunked_cross_entropy(torch.zeros(rows, 2), torch.zeros(100, 2), torch.zeros(rows, dtype=torch.int64))
        assert seen == expected


def test_gradients_of_chunks_add_up_in_float32_under_autocast(monkeypatch):
    """As they would not where autocast kept its bfloat16 copy of the output layer."""
    llama = make_llama(ModelConfig(**TINY), codes=61, classes=3, tokens=16)
    torch.nn.init.normal_(llama.lm_head.weight)
    model, codes = NextToken(llama, 61), torch.randint(61, (64, 16))

    def gradient(chunks, bf16):
        monkeypatch.setattr("nsvq.autoregressive.model.LOGITS_AT_ONCE", (codes.numel() * 61 // chunks,) * 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(61 + torch.arange(64) % 3, codes)
        return torch.autograd.grad(loss, llama.lm_head.weight)[0]

    exact = gradient(1, False)
    whole, parts = ((gradient(chunks, True) - exact).norm() / exact.norm() for chunks in (1, 128))
    assert parts < 1.2 * whole


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_next_code_given_the_class_and_the_codes_before(tied):
    llama = make_llama(ModelConfig(**TINY, tie_embeddings=tied), codes=11, classes=3, tokens=6)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, codes = torch.tensor([11, 14, 13]), torch.randint(11, (3, 6))
    logits = llama(torch.cat([ids[:, None], codes], dim=1)).logits[:, :-1, :11]
    expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(NextToken(llama, 11)(ids, codes), expected)
    assert len(NextToken(llama, 11).state_dict()) == len(dict(llama.named_parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_is_causal_without_a_mask_also_where_layers_are_compiled(monkeypatch, checkpointing):
    """A mask would keep it from flash kernels. One graph serves all layers."""
    attention, eager, graphs = F.scaled_dot_product_attention, [], []

    def spy(*tensors, attn_mask=None, is_causal=False, **options):
        eager.append((attn_mask, is_causal))
        return attention(*tensors, attn_mask=attn_mask, is_causal=is_causal, **options)

    def backend(module, inputs):
        graphs.append([node.kwargs for m in module.modules() for node in m.graph.nodes if node.target is attention])
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def gradients():
        torch.manual_seed(0)
        loss = model(torch.tensor([11, 14]), torch.arange(12).view(2, 6) % 11)
        return torch.autograd.grad(loss, list(model.parameters()))

    llama = make_llama(ModelConfig(**TINY | {"depth": 10}), codes=11, classes=3, tokens=6)
    torch.nn.init.normal_(llama.lm_head.weight)
    model = NextToken(llama, 11, 0.1).train()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        expected = gradients()
    assert eager == [(None, True)] * 10
    if checkpointing:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in llama.model.layers:
        layer.compile(backend=backend)
    torch.testing.assert_close(gradients(), expected)
    ((found,),) = graphs
    assert (found["attn_mask"], found["is_causal"]) == (None, True)


def test_an_untrained_network_gives_every_code_the_same_chance():
    llama = make_llama(ModelConfig(**TINY), codes=11, classes=3, tokens=6)
    loss = NextToken(llama, 11, 0.1).train()(torch.tensor([11, 12]), torch.randint(11, (2, 6)))
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_are_near_start_with_near_embeddings_and_outputs(tied):
    llama = make_llama(ModelConfig(**TINY, tie_embeddings=tied), codes=11, classes=3, tokens=6)
    classes = llama.model.embed_tokens.weight[11:].clone()
    table = 5 + 3 * torch.randn(11, 4)
    start_from_codes(llama, table)
    assert torch.equal(llama.model.embed_tokens.weight[11:], classes)
    for layer in (llama.model.embed_tokens, llama.lm_head):
        rows = layer.weight[:11].detach()
        assert rows.square().mean().sqrt().item() == pytest.approx(0.02)
        ratios = torch.pdist(rows) / torch.pdist(table)
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_dropout_acts_in_training_on_embeddings_and_on_what_layers_add_and_on_no_weight():
    llama = make_llama(ModelConfig(**TINY), codes=11, classes=3, tokens=6)
    model, seen = NextToken(llama, 11, 0.5), {}
    places = {
        "embed": llama.model.embed_tokens,
        "attention": llama.model.layers[1].self_attn.o_proj,
        "mlp": llama.model.layers[0].mlp.down_proj,
    }
    for name, place in places.items():
        place.register_forward_hook(lambda _, __, output, name=name: seen.update({name: (output == 0).float().mean()}))
    model.train()(torch.tensor([11, 14]), torch.randint(11, (2, 6)))
    assert all(0.35 < share < 0.65 for share in seen.values()), seen
    model.eval()(torch.tensor([11, 14]), torch.randint(11, (2, 6)))
    assert not any(seen.values())


@pytest.mark.parametrize(("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411)])
def test_sizes_are_llamagens(size, millions):
    """LlamaGen, arXiv 2406.06525, Table 1 (K = 16,384, 1000 classes), XXL as its code counts it."""
    with init_empty_weights():
        llama = make_llama(ModelConfig(size=size), codes=16384, classes=1000, tokens=256)
    assert sum(p.numel() for p in llama.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_heads_must_divide_the_width_into_pairs():
    with pytest.raises(ValueError, match="width 36 must be a multiple of 2 x heads"):
        ModelConfig(width=36, heads=4)
