"""Stage one: the image tokenizer. `Tokenizer` reads what a run saved."""

from nsvq.tokenizer.pretrained import Tokenizer

__all__ = ["Tokenizer"]
