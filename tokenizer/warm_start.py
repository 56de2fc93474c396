"""The start of a run from a saved tokenizer (`init_from`): one of ours, a stock `VQModel`, or a converted one.

A `VQModel` has a 1x1 convolution on each side of its codes, and our networks have none. `quant_conv` becomes part of
the convolution before it. `post_quant_conv` maps a code c to P c + p, and the convolution behind it pads with zeros: it
can take in P, but p only away from the border. So latents and codes move by a shift s with P s = p, where there is one.
"""

import math
from typing import NamedTuple

import torch
from diffusers import VQModel
from torch import Tensor, nn

from nsvq.errors import UsageError, UserError
from nsvq.tokenizer.model import ModelConfig, QuantizedDecoder, vqmodel_arguments
from nsvq.tokenizer.pretrained import Tokenizer
from nsvq.tokenizer.quantizers import Quantizer
from nsvq.tokenizer.quantizers.fc_l2 import NormalizedVQ
from nsvq.tokenizer.quantizers.ibq import IBQ
from nsvq.tokenizer.vqmodel import QuantizerVQModel

_FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group"}  # in all models of ours


class WarmStart(NamedTuple):
    """What a run starts from: a hash of it, whether its codes were taken too, and a line that says so."""

    fingerprint: str
    has_codes: bool
    text: str


@torch.no_grad()
def warm_start(
    source: str, config: ModelConfig, encoder: nn.Module, decoder: QuantizedDecoder, take_codes: bool
) -> WarmStart:
    """Fill `encoder` and `decoder`, built by `config`, with the weights of the folder or Hub id `source`; the quantizer
    gets its codes where `take_codes` and it can hold them.

    Raises `UserError` where that is no tokenizer or has layers that ours lack, and `UsageError` with the values to
    write where `config` is another architecture."""
    tokenizer = Tokenizer.from_pretrained(source)
    model, quantizer = tokenizer.model, decoder.quantizer
    q_weight, q_bias = _matrix(model.quant_conv)  # (D, L), (D)
    p_weight, p_bias = _matrix(model.post_quant_conv)  # (L, D), (L)
    used = (p_weight != 0).any(0)  # not a column that only tells codes apart (IBQ)
    if not torch.equal(used, (q_weight != 0).any(1) | (q_bias != 0)):
        raise UserError(f"init_from {source}: its decoder reads other channels than its encoder writes")
    _check(source, config, _architecture(source, model, int(used.sum())))
    q_weight, q_bias, p_weight = q_weight[used], q_bias[used], p_weight[:, used]

    shifts = _shifts(model, p_weight, p_bias)
    shift, why_not = shifts[0], "init_codes is false"
    if take_codes:
        shift, why_not = _take_codes(model, quantizer, used, shifts)
    of_codes = torch.zeros_like(shift) if isinstance(model, QuantizerVQModel) else shift
    left = p_bias - p_weight @ of_codes  # (L)
    ours, theirs = encoder.state_dict(), model.encoder.state_dict()
    weight, bias = theirs["conv_out.weight"].double(), theirs["conv_out.bias"].double()  # (L, C, 3, 3), (L)
    theirs["conv_out.weight"] = torch.einsum("dl,lcyx->dcyx", q_weight, weight)
    theirs["conv_out.bias"] = q_weight @ bias + q_bias + shift
    encoder.load_state_dict(theirs)
    theirs = model.decoder.state_dict()
    weight, bias = theirs["conv_in.weight"].double(), theirs["conv_in.bias"].double()  # (C, L, 3, 3), (C)
    theirs["conv_in.weight"] = torch.einsum("clyx,ld->cdyx", weight, p_weight)
    theirs["conv_in.bias"] = bias + torch.einsum("clyx,l->c", weight, left)
    decoder.decoder.load_state_dict(theirs)

    text = f"init_from {source}: {len(ours) + len(theirs)} tensors of encoder and decoder, "
    text += f"no codes ({why_not})" if why_not else f"and {tokenizer.codebook_size} codes"
    if left.norm() > 1e-4 * p_bias.norm():
        text += "; the decoder starts a little off at the border, as no latent holds the bias of post_quant_conv"
    return WarmStart(tokenizer.fingerprint(), not why_not, text)


def _matrix(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution in float64."""
    return layer.weight.double()[:, :, 0, 0], layer.bias.double()


def _architecture(source: str, model: VQModel, latent_channels: int) -> ModelConfig:
    """The config that builds the encoder and decoder of `model`."""
    stock = model.config
    foreign = [f"{key} = {stock[key]}" for key, ours in _FIXED.items() if stock[key] != ours]
    if type(model) not in (VQModel, QuantizerVQModel):
        foreign.append(f"the layers of a {type(model).__name__}")
    attention = [name.startswith("Attn") for name in stock.down_block_types]
    if attention != [name.startswith("Attn") for name in reversed(stock.up_block_types)]:
        foreign.append("attention on other levels of the encoder than of the decoder")
    if foreign:
        raise UserError(f"init_from {source}: no model of ours has {', '.join(foreign)}")
    channels = math.gcd(*stock.block_out_channels)
    return ModelConfig(
        channels=channels,
        channel_multipliers=[width // channels for width in stock.block_out_channels],
        layers_per_block=stock.layers_per_block,
        latent_channels=latent_channels,
        norm_groups=stock.norm_num_groups,
        mid_attention=stock.mid_block_add_attention,
        attention_levels=[level for level, attends in enumerate(attention) if attends],
    )


def _check(source: str, config: ModelConfig, found: ModelConfig) -> None:
    if vqmodel_arguments(config) == vqmodel_arguments(found):
        return
    wrong = [f"--model.{key} {_written(value)}" for key, value in found if value != getattr(config, key)]
    raise UsageError(f"the model of init_from {source} is another: give {' '.join(wrong)}")


def _written(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "[]"
    return str(value).lower()


def _shifts(model: VQModel, p_weight: Tensor, p_bias: Tensor) -> list[Tensor]:
    """Shifts [d] to choose from: the exact one, or the nearest to it, and none."""
    if isinstance(model, QuantizerVQModel):
        return [model.quantize.mean.double()]  # of the latents alone, as its quantizer takes them back (export.py)
    return [torch.linalg.pinv(p_weight) @ p_bias, torch.zeros_like(p_weight[0])]


def _take_codes(model: VQModel, quantizer: Quantizer, used: Tensor, shifts: list[Tensor]) -> tuple[Tensor, str]:
    """Give `quantizer` the codes of `model`, with the first of `shifts` with which they are looked up as they were.
    Returns (shift, why there is none)."""
    name, here = quantizer.config.name, quantizer.codebook_size
    if isinstance(model, QuantizerVQModel):
        theirs = model.quantize.quantizer
        if theirs.config != quantizer.config:
            return shifts[0], f"they are those of {theirs.config.name}, and here is {name}, or one with other options"
        quantizer.load_state_dict(theirs.state_dict())
        return shifts[0], ""
    table = model.quantize.embedding.weight.double()  # (K, D)
    if not quantizer.free_table:
        return shifts[0], f"those of {name} are not a table that may be written"
    if len(table) != here:
        return shifts[0], f"they are {len(table)}, and here quantizer.codebook_size = {here}"
    for shift in shifts:
        codes, more = table[:, used] + shift, table[:, ~used]
        if _same_lookup(quantizer, codes, more):
            quantizer.table().copy_(codes)
            quantizer.rows_written(torch.arange(here))
            return shift, ""
    return shifts[0], f"{name} would look them up in another way"


def _same_lookup(quantizer: Quantizer, codes: Tensor, more: Tensor) -> bool:
    """Whether the code [K, d] that `quantizer` finds for z is the row of (codes, more) nearest to (z, 0)."""
    lengths = codes.square().sum(1)
    if isinstance(quantizer, IBQ):  # the largest inner product is the nearest among rows of one length
        return _all_equal(lengths + more.square().sum(1))
    if isinstance(quantizer, NormalizedVQ) and not _all_equal(torch.cat([lengths, torch.ones_like(lengths[:1])])):
        return False
    return _all_equal(more.square().sum(1))


def _all_equal(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= 1e-4 * values.max())
