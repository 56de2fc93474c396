"""Train discrete image tokenizers with NSVQ, generators on their tokens, and load the results with diffusers.

The public face. What is imported with it loads when it is first used."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsvq.pipelines.pipeline import ClassConditionalPipeline
    from nsvq.tokenizer.layer import ResidualVectorQuantizer, VectorQuantizer
    from nsvq.tokenizer.pretrained import Tokenizer

__version__ = metadata.version("nsvq")
__all__ = ["ClassConditionalPipeline", "ResidualVectorQuantizer", "Tokenizer", "VectorQuantizer", "__version__"]

_WHERE = {
    "ClassConditionalPipeline": "nsvq.pipelines.pipeline",
    "ResidualVectorQuantizer": "nsvq.tokenizer.layer",
    "Tokenizer": "nsvq.tokenizer.pretrained",
    "VectorQuantizer": "nsvq.tokenizer.layer",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'nsvq' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
