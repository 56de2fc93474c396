"""Quantizers by the name that a config gives them: one method, one file.

`nsvq` looks codes up in the same plain table as `vq`. What makes it NSVQ composes with any quantizer here: the
NS loss (tokenizer/codebook.py), code replacement (tokenizer/replacement.py) and the phases (tokenizer/schedule.py).
"""

from tokenizer.quantizers.base import CodebookQuantizer, Quantized
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import VQ

QUANTIZERS: dict[str, type[CodebookQuantizer]] = {"nsvq": VQ, "simvq": SimVQ, "vq": VQ}

__all__ = ["QUANTIZERS", "VQ", "CodebookQuantizer", "Quantized", "SimVQ"]
