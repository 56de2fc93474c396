"""Vector quantization with a codebook of exponential moving averages (VQ-VAE, arXiv 1711.00937, appendix A.1).

With n_k tokens of code k in a step of N over all ranks, and m_k their sum:
N_k <- g N_k + (1 - g) n_k    M_k <- g M_k + (1 - g) m_k    c_k = M_k / N_k
A code that wins nothing stays where it is, since both fade alike; below N_k = eps it is no average any more. Only the
commitment loss trains, and only the encoder. Nothing moves in evaluation.

The NS loss (NSVQ, arXiv 2606.11363, eq. 8-11) is minimised in closed form here: its weights w_ij of losing codes add
alpha sum_i w_ij to n_j and alpha sum_i w_ij z_i to m_j, and codes come to rest where the gradient of both losses is 0.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from nsvq.tokenizer import ranks
from nsvq.tokenizer.codebook import NonStationary, wins
from nsvq.tokenizer.quantizers.vq import TableConfig, TableQuantizer

REMEMBERED = 25  # tokens over which a code of mean use is averaged (configs/imagenet128/nsvq.yaml)


def decay_of_step(tokens: int, codes: int) -> float:
    """The decay at which a code of mean use is an average of its last 25 tokens, where a step has `tokens` over all
    ranks and micro-batches. Not below 0.8: a step of more tokens than that is averaged with those before it."""
    return max(0.8, 1 - tokens / (REMEMBERED * codes))


class EMAConfig(TableConfig):
    name: Literal["ema"] = Field(description="ema: codes are moving averages of their latents.")
    decay: float | None = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay g of counts and sums at each step; null: 1 - tokens in a step / (25 K), at least 0.8.",
    )
    eps: float = Field(1e-5, gt=0, description="Averaged count below which a code stays where it is.")


class EMAQuantizer(TableQuantizer):
    """`weight` [K, d] is a buffer, with `counts` [K] and `sums` [K, d]; micro-batches add up until `end_step`."""

    Config = EMAConfig
    can_revive = True
    terms = ("commitment",)

    def __init__(self, config: EMAConfig, dim: int):
        super().__init__(config, dim)
        k = config.codebook_size
        # Until `nsvq.freeze.decay` says another, or a layer, which has seen no step yet, knows how many tokens one has
        self.decay = 0.99 if config.decay is None else config.decay
        self.register_buffer("weight", self._start())
        self.register_buffer("counts", torch.zeros(k))
        self.register_buffer("sums", torch.zeros(k, dim))
        self._start_averages()
        self.register_buffer("waited", torch.zeros(k))  # tokens that the mean code won since each code's last one
        self.register_buffer("step_wins", torch.zeros(k), persistent=False)
        self.register_buffer("step_counts", torch.zeros(k), persistent=False)
        self.register_buffer("step_sums", torch.zeros(k, dim), persistent=False)
        self.draws = ranks.Draws()

    def initialize(self, latents: Tensor) -> None:
        super().initialize(latents)
        self._start_averages()

    @torch.no_grad()
    def _start_averages(self) -> None:
        """Codes start as if each had just won one token, which later ones soon outweigh."""
        self.counts.fill_(1 - self.decay)
        self.sums.copy_(self.weight * (1 - self.decay))

    def searched(self, z: Tensor, indices: Tensor, ns: NonStationary | None) -> None:
        if not self.training or ranks.in_backward():
            return
        won = wins(indices, self.codebook_size)
        self.step_wins += won
        self.step_counts += won
        self.step_sums.index_add_(0, indices, z)
        self.latest = z
        if ns is not None:
            pulled = torch.addcmul(-z.numel() / 2 * ns.gradient, ns.weight_sums[:, None], self.weight)  # A [K, d]
            self.step_counts += self.nonstationary_weight * ns.weight_sums
            self.step_sums += self.nonstationary_weight * pulled

    @torch.no_grad()
    def end_step(self, stepped: bool) -> None:
        for average, step in ((self.counts, self.step_counts), (self.sums, self.step_sums)):
            if stepped:
                average.lerp_(ranks.total(step), 1 - self.decay)
            step.zero_()
        if stepped:
            counts = self.counts[:, None]
            self.weight.copy_(torch.where(counts >= self.config.eps, self.sums / counts, self.weight))
            if self.revive_after is not None:
                self._revive(ranks.total(self.step_wins))
        self.step_wins.zero_()

    def _revive(self, won: Tensor) -> None:
        """Tensors are as large as if all codes were dead: for their number the host would wait for the GPU."""
        self.waited += won.mean()
        self.waited.masked_fill_(won > 0, 0)
        tokens = sum(ranks.counts(self.latest))
        positions = torch.randperm(tokens, generator=self.draws.generator())[: len(won)]
        # Where latents are too few, those that waited longest move first, and the others in the next steps.
        rows = self.waited.argsort(descending=True, stable=True)[: len(positions)]
        dead = self.waited[rows] > self.revive_after
        latents = ranks.rows(self.latest, positions.to(rows.device, non_blocking=True))
        self.weight[rows] = torch.where(dead[:, None], latents, self.weight[rows])
        self._start_anew(rows, dead)

    @torch.no_grad()
    def rows_written(self, rows: Tensor) -> None:
        self._start_anew(rows, torch.ones_like(rows, dtype=torch.bool))

    def _start_anew(self, rows: Tensor, written: Tensor) -> None:
        """Those of `rows` [n] that were `written` [n] count as codes of mean use that have just won."""
        counts = torch.where(written, self.counts.mean(), self.counts[rows])
        self.waited[rows] = torch.where(written, 0, self.waited[rows])
        self.sums[rows] = torch.where(written[:, None], self.weight[rows] * counts[:, None], self.sums[rows])
        self.counts[rows] = counts
