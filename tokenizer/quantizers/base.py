"""What every quantizer with a codebook shares: nearest-code lookup, straight-through gradient, the two VQ losses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizer.codebook import nearest_code, search_with_nonstationary_loss


class Quantized(NamedTuple):
    """`z_q` [B, d, h, w] with the straight-through gradient, `indices` [B, h, w], unweighted losses, statistics."""

    z_q: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class CodebookQuantizer(nn.Module):
    """Base class. A method says what its effective codebook is, and which of its rows can be written directly."""

    def codebook(self) -> Tensor:
        """The effective codebook [K, d] float32, as used for lookup, with its gradient."""
        raise TypeError(f"{type(self).__name__} does not define codebook()")

    def table(self) -> nn.Parameter | None:
        """The parameter [K, d] whose rows are the codes; None where codes are computed from something else."""
        return None

    def forward(self, z: Tensor, temperature: float | None = None) -> Quantized:
        """z [B, d, h, w] -> `Quantized`. With a `temperature` the NS loss joins the losses (NSVQ, eq. 8-11).

        Losses are means over all B h w d elements (NSVQ, eq. 52): "codebook" |sg[z] - c|^2, "commitment"
        |z - sg[c]|^2. Everything is float32, whatever the autocast.
        """
        with torch.autocast(z.device.type, enabled=False):
            batch, d, height, width = z.shape
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, d)  # (N, d)
            codebook, stats, ns = self.codebook(), {}, None
            if temperature is None:
                indices = nearest_code(flat, codebook)
            else:
                indices, ns = search_with_nonstationary_loss(flat, codebook, temperature)
            codes = codebook[indices]  # (N, d)
            losses = {
                "codebook": (flat.detach() - codes).square().mean(),
                "commitment": (flat - codes.detach()).square().mean(),
            }
            if ns is not None:
                losses["nonstationary"] = ns.loss
                stats = {"winner_mass": ns.winner_mass, "effective_codes": ns.effective_codes}
            z_q = flat + (codes - flat).detach()
            z_q = z_q.view(batch, height, width, d).permute(0, 3, 1, 2)  # (B, d, h, w)
        return Quantized(z_q, indices.view(batch, height, width), losses, stats)
