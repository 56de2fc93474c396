"""Quantizers by the name that a config gives them: one method, one file (docs/tokenizers.md)."""

from functools import reduce
from operator import or_
from typing import get_args

from tokenizer.quantizers.base import Quantized, Quantizer, QuantizerOptions
from tokenizer.quantizers.bsq import BSQ
from tokenizer.quantizers.ema import EMAQuantizer
from tokenizer.quantizers.fc_l2 import NormalizedVQ
from tokenizer.quantizers.fsp import FSP
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.fvq import FVQ
from tokenizer.quantizers.ibq import IBQ
from tokenizer.quantizers.lc import LC
from tokenizer.quantizers.lfq import LFQ
from tokenizer.quantizers.ns_vq import NSVQPrecursor
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.transvq import TransVQ
from tokenizer.quantizers.vp import VP
from tokenizer.quantizers.vq import VQ

_METHODS = (
    VQ,
    EMAQuantizer,
    NormalizedVQ,
    SimVQ,
    NSVQPrecursor,
    TransVQ,
    LC,
    FVQ,
    FSQ,
    LFQ,
    BSQ,
    IBQ,
    VP,
    FSP,
)
QUANTIZERS: dict[str, type[Quantizer]] = {
    name: method for method in _METHODS for name in get_args(method.Config.model_fields["name"].annotation)
}
# The options of one method or of another, told apart by `name`.
QuantizerConfig = reduce(or_, (method.Config for method in _METHODS))


def make_quantizer(options: QuantizerOptions, dim: int) -> Quantizer:
    """The quantizer of `options.name` for latents of `dim` channels. Raises `ValueError` where it cannot have them."""
    options.check_dim(dim)
    return QUANTIZERS[options.name](options, dim)


__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerConfig", "QuantizerOptions", "make_quantizer"]
