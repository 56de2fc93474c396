"""The network: `transformers.LlamaForCausalLM` over codes and classes, and its loss. LlamaGen's recipe (arXiv
2406.06525), with 1-D rotary positions.

The vocabulary is K codes, C classes and the null class, in this order. A sequence is a class and the codes of an image
row by row, and each place predicts the code that follows.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from nsvq.common.config import Config

SIZES = {  # depth, width, heads
    "tiny": (6, 192, 3),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
}
LOGITS_AT_ONCE = 2**26, 2**27  # elements, at least and at most: 256 and 512 MiB in float32


class ModelConfig(Config):
    """The transformer."""

    size: Literal["tiny", "B", "L", "XL", "XXL"] = Field("B", description="Depth, width and heads together.")
    depth: int | None = Field(None, ge=1, description="Layers; null is the size's.")
    width: int | None = Field(None, ge=8, description="Width of the tokens; null is the size's.")
    heads: int | None = Field(None, ge=1, description="Attention heads; null is the size's.")
    tie_embeddings: bool = Field(
        False, description="One table for embeddings and output layer; at K = 65,536 each is 50 M parameters of B."
    )
    start_from_codes: bool = Field(
        False, description="Codes that are near start with embeddings and outputs that are near; LlamaGen's do not."
    )
    class_dropout: float = Field(0.1, ge=0, le=1, description="Share of classes replaced by the null class.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of embeddings, and of what each layer adds to them.")
    gradient_checkpointing: bool = Field(False, description="Trade a third more compute for less memory.")
    compile: bool = Field(False, description="torch.compile: a faster step after minutes of compiling at the start.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        _, width, heads = self.dimensions()
        if width % (2 * heads):
            raise ValueError(f"width {width} must be a multiple of 2 x heads ({heads}): rotary positions turn pairs")
        return self

    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads)."""
        depth, width, heads = SIZES[self.size]
        return self.depth or depth, self.width or width, self.heads or heads


def make_llama(config: ModelConfig, codes: int, classes: int, tokens: int) -> LlamaForCausalLM:
    """The network for images of `tokens` of K = `codes` codes, and C = `classes` classes (0: unconditional).

    `generate` on it, given the ids of classes (K + class; K + C is the null class), draws codes alone.
    """
    depth, width, heads = config.dimensions()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=codes + classes + 1,
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 256) * 256,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=tokens + 1,
            rms_norm_eps=1e-5,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if not config.tie_embeddings:
        nn.init.zeros_(llama.lm_head.weight)
    null = codes + classes
    llama.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        suppress_tokens=list(range(codes, null + 1)),
        pad_token_id=null,
    )
    return llama


@torch.no_grad()
def start_from_codes(llama: LlamaForCausalLM, table: Tensor) -> None:
    """Embeddings and output layer start as random rotations of the codes [K, d] into the width, with mean 0 and Llama's
    standard deviation of 0.02. Without it the network learns from co-occurrence alone which codes look alike."""
    codes = table.float().cpu() - table.float().cpu().mean(0)
    tied = llama.config.tie_word_embeddings
    for layer in [llama.model.embed_tokens] if tied else [llama.model.embed_tokens, llama.lm_head]:
        turned = codes @ nn.init.orthogonal_(torch.empty(codes.shape[1], layer.weight.shape[1]))  # (K, D)
        layer.weight[: len(codes)] = 0.02 * turned / turned.square().mean().sqrt()


class NextToken(nn.Module):
    """What trains: the layers of `llama`, which it shares, with dropout, and their loss on the first `codes` ids.

    forward(ids [B], codes [B, N]) -> mean cross-entropy of the codes in nats, each given the class and those before it.
    """

    _no_split_modules = ("LlamaDecoderLayer",)  # of FSDP

    def __init__(self, llama: LlamaForCausalLM, codes: int, dropout: float = 0.0):
        super().__init__()
        self.codes = codes
        self.body = llama.model
        self.head = None if llama.config.tie_word_embeddings else llama.lm_head
        if dropout:
            # Llama has dropout of attention weights alone. These are the places where LlamaGen has it.
            places = [part for layer in self.body.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
            for part in (self.body.embed_tokens, *places):
                part.register_forward_hook(lambda module, _, output: F.dropout(output, dropout, module.training))

    def forward(self, ids: Tensor, codes: Tensor) -> Tensor:
        body, tokens = self.body, torch.cat([ids[:, None], codes[:, :-1]], dim=1)
        hidden = body.embed_tokens(tokens)  # (B, N, D)
        rotary = body.rotary_emb(hidden, position_ids=torch.arange(tokens.shape[1], device=tokens.device)[None])
        # `body(tokens)` would look at the positions for packed sequences: the host would wait for the answer, and where
        # it is traced each layer would get a mask, with which attention has no flash kernel.
        for layer in body.layers:
            hidden = layer(hidden, position_embeddings=rotary)
        table = (self.head or body.embed_tokens).weight
        # Autocast casts a slice anew for each chunk: the gradients of a cast that it kept would add up in bfloat16.
        return chunked_cross_entropy(body.norm(hidden).flatten(0, 1), table[: self.codes], codes.flatten())


def chunked_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, at_once: int | None = None) -> Tensor:
    """Mean of -log softmax(hidden table^T)[targets] over rows: hidden [M, D], table [K, D], targets [M] -> scalar.

    Logits are made `at_once` elements at a time, forward and again backward, and never kept; None is an eighth of them
    within the bounds of `LOGITS_AT_ONCE`. Each time costs a cast of the table, and its gradient's addition.
    """
    least, most = LOGITS_AT_ONCE
    at_once = at_once or min(max(least, len(hidden) * len(table) // 8), most)
    rows = max(1, at_once // len(table))
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(_summed, h, table, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
    return torch.stack(losses).sum() / len(targets)


def _summed(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, table)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
