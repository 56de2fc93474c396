"""Quantizers by the name that a config gives them: one method, one file (docs/tokenizers.md)."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, get_args

from nsvq.tokenizer.quantizers.base import Quantized, Quantizer, QuantizerOptions
from nsvq.tokenizer.quantizers.bsq import BSQ
from nsvq.tokenizer.quantizers.ema import EMAQuantizer
from nsvq.tokenizer.quantizers.fc_l2 import NormalizedVQ
from nsvq.tokenizer.quantizers.fsp import FSP
from nsvq.tokenizer.quantizers.fsq import FSQ
from nsvq.tokenizer.quantizers.fvq import FVQ
from nsvq.tokenizer.quantizers.ibq import IBQ
from nsvq.tokenizer.quantizers.lc import LC
from nsvq.tokenizer.quantizers.lfq import LFQ
from nsvq.tokenizer.quantizers.ns_vq import NSVQPrecursor
from nsvq.tokenizer.quantizers.simvq import SimVQ
from nsvq.tokenizer.quantizers.transvq import TransVQ
from nsvq.tokenizer.quantizers.vp import VP
from nsvq.tokenizer.quantizers.vq import VQ

_METHODS = (VQ, EMAQuantizer, NormalizedVQ, SimVQ, NSVQPrecursor, TransVQ, LC, FVQ, FSQ, LFQ, BSQ, IBQ, VP, FSP)
QUANTIZERS: dict[str, type[Quantizer]] = {get_args(m.Config.model_fields["name"].annotation)[0]: m for m in _METHODS}
# The options of one method or of another, told apart by `name`.
if TYPE_CHECKING:
    QuantizerConfig = QuantizerOptions
else:
    QuantizerConfig = reduce(or_, (method.Config for method in _METHODS))


def make_quantizer(options: QuantizerOptions, dim: int) -> Quantizer:
    """The quantizer of `options.name` for latents of `dim` channels. Raises `ValueError` where it cannot have them."""
    options.check_dim(dim)
    return QUANTIZERS[options.name](options, dim)


__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "QuantizerConfig", "QuantizerOptions", "make_quantizer"]
