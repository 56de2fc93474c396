"""What codes say about how well a tokenizer generates: bits an image, and how wrong ones are decoded (pFID)."""

import math

import torch
from torch import Tensor

from nsvq.errors import UsageError
from nsvq.tokenizer.perturbation import PerturbationConfig, nearest_codes, perturb
from nsvq.tokenizer.pretrained import Tokenizer

_EVALUATION = 11  # sets the draws apart from those of training


class Perturbed:
    """Codes [B, h, w] of images with the numbers `index` [B] -> the same with some replaced by near ones (RobustTok,
    arXiv 2503.08354). Which ones is a function of the image's number: neither the batch nor the number of ranks changes
    it. Raises `UsageError` where there is no codebook, or too small a one."""

    def __init__(self, config: PerturbationConfig, tokenizer: Tokenizer):
        if config.delta > tokenizer.codebook_size:
            what = f"must be at most the number of codes, {tokenizer.codebook_size}"
            raise UsageError(f"--pfid.delta {config.delta} {what}")
        self.config, self.codebook = config, tokenizer.codebook
        # [K, delta], found for all codes at once: in batches of other shapes, distances round in other ways.
        self.nearest: Tensor | None = None

    def __call__(self, indices: Tensor, index: Tensor) -> Tensor:
        config = self.config
        if self.nearest is None:
            self.nearest = nearest_codes(self.codebook, self.codebook, config.delta)
        seeds = [(_EVALUATION, number) for number in index.tolist()]
        return perturb(indices, self.nearest.__getitem__, seeds, config.alpha, config.beta, config.delta)


def code_bits(codes: Tensor) -> dict[str, float]:
    """Bits an image of codes [N, h, w], by entropies of their frequencies: "unigram_bits" h w H(c), and "bigram_bits"
    h H(c) + h (w - 1) H(c | its left neighbour). Pairs are counted sparsely, so that K does not matter."""
    height, width = codes.shape[1:]
    single = _entropy(codes.flatten())
    left, right = codes[:, :, :-1].flatten().long(), codes[:, :, 1:].flatten().long()
    conditional = _entropy(left * (int(codes.max()) + 1) + right) - _entropy(left) if width > 1 else 0.0
    bigram = height * single + height * (width - 1) * conditional
    return {"unigram_bits": height * width * single, "bigram_bits": bigram}


def _entropy(values: Tensor) -> float:
    """Of the frequencies of values [n], in bits."""
    p = torch.unique(values, return_counts=True)[1].double() / len(values)
    return -(p * p.log()).sum().item() / math.log(2)
