"""Plain vector quantization with a trainable table (VQ-VAE, arXiv 1711.00937; VQGAN, arXiv 2012.09841).

NSVQ (arXiv 2606.11363) uses this same table: what makes it NSVQ composes with other quantizers too (nsvq_config.py).
Factorized codes (VQGAN-FC) are this table at a small d."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nsvq.tokenizer.quantizers.base import CodebookConfig, NearestConfig, NearestQuantizer


class TableConfig(CodebookConfig, NearestConfig):
    """Options of a method with a free table of codes."""

    init: Literal["latents", "uniform"] = Field("latents", description="Start: encoder outputs, or uniform in +-1/K.")


class TableQuantizer(NearestQuantizer):
    """K codes of width d as the rows of `weight`, a parameter or a buffer; `initialize` starts them from latents."""

    free_table = can_consolidate = True

    def _start(self) -> Tensor:
        return torch.empty(self.codebook_size, self.dim).uniform_(-1 / self.codebook_size, 1 / self.codebook_size)

    def codebook(self) -> Tensor:
        return self.weight

    def initial_latents(self) -> int:
        return self.codebook_size if self.config.init == "latents" else 0

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        self.weight.copy_(latents)
        self.rows_written(torch.arange(self.codebook_size, device=latents.device))


class VQConfig(TableConfig):
    name: Literal["vq"] = Field("vq", description="vq: a trained table.")


class VQ(TableQuantizer):
    """The table trains by gradient, from the codebook loss, and the NS loss where there is one."""

    Config = VQConfig

    def __init__(self, config: VQConfig, dim: int):
        super().__init__(config, dim)
        self.weight = nn.Parameter(self._start())
