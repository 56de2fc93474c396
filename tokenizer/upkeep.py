"""What a run does to its codebook besides training it: start, revive, replace, consolidate, fit.

start         a method that asks for it begins with encoder outputs of the run's first images
revive        until replacement sets in, a method that can moves codes that win nothing, in each step
replace       at the end of an epoch in stage1, codes that won nothing in it move onto used ones
consolidate   when the encoder is frozen: k-means on its latents, from the codes that training found
fit           after the last step: codes for a method that trains without
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.quantizers import Quantizer
from nsvq.tokenizer.replacement import replace_dead_codes, write_rows
from nsvq.tokenizer.schedule import Schedule


class CodebookUpkeep:
    """Keeps the codes of `quantizer` alive. Every rank calls the same methods with the same numbers, and ends with the
    same codes.

    `optimizer`: a plain one whose moments of a written code are cleared. `averages`: finds the averaged copies of a
    parameter.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        nsvq: NSVQConfig,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        averages: Callable[[Tensor], list[Tensor]],
        seed: int,
    ):
        self.quantizer, self.config, self.schedule = quantizer, nsvq, schedule
        self.optimizer, self.averages, self.seed = optimizer, averages, seed

    def start(self, latents: Callable[[int], Tensor]) -> None:
        """Before the first step; latents(n): n encoder outputs [n, d], the same on all ranks."""
        if count := self.quantizer.initial_latents():
            self.quantizer.initialize(latents(count))

    def begin_step(self) -> None:
        """Say to a method that revives codes after how long, if it may, and to moving averages how fast they forget."""
        self.quantizer.revive_after = self.schedule.revive_after()
        if self.schedule.phase != "stage1" and self.config.freeze.decay is not None:
            self.quantizer.decay = self.config.freeze.decay

    def replace(self, counts: Tensor, errors: Tensor) -> int:
        """At the end of an epoch in which the codes won `counts` tokens [K] and left squared `errors` [K], over all
        ranks. Returns how many codes were replaced."""
        if not self.schedule.replaces_codes():
            return 0
        table = self.quantizer.table()
        dead = replace_dead_codes(
            table,
            counts,
            weights=errors if self.config.replace.weights == "error" else None,
            noise=self.config.replace.noise,
            # Not their sum, or seed 0 would draw at epoch 7 what seed 1 draws at epoch 6.
            seed=int(np.random.SeedSequence([self.seed, self.schedule.epoch]).generate_state(1)[0]),
            averages=self.averages(table),
            optimizer=self.optimizer if self.config.replace.reset_adam else None,
        )
        self.quantizer.rows_written(dead)
        return len(dead)

    def consolidate(self, latents: Callable[[int], list[Tensor]]) -> None:
        """When the encoder has just been frozen; latents(n): its outputs for this rank's part of n training images, a
        batch [m, d] each."""
        freeze = self.config.freeze
        if not freeze.consolidate:
            return
        table, batches = self.quantizer.table(), latents(freeze.consolidate_images)
        fitted = kmeans(
            lambda: batches, len(table), seed=self.seed, start=table.detach(), iterations=freeze.consolidate
        )
        rows = torch.arange(len(table), device=table.device)
        write_rows(table, rows, fitted, averages=self.averages(table), optimizer=self.optimizer)
        self.quantizer.rows_written(rows)

    def fit(self, latents: Callable[[int], Tensor]) -> None:
        """After the last step; latents(n): this rank's part of at least n outputs [m, d] of the averaged encoder."""
        if count := self.quantizer.final_latents():
            self.quantizer.fit(latents(count))
