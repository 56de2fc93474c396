"""A quantizer that needs no trainer: a forward in training starts, moves, revives and replaces its codes.

The parts are the trainer's (upkeep.py, schedule.py, temperature.py); their clock is counted in tokens, and kept in
buffers, so that a `state_dict` between two steps is all that a resume needs."""

import math
import sys

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsvq.errors import UsageError
from nsvq.tokenizer import ranks
from nsvq.tokenizer.codebook import wins
from nsvq.tokenizer.nsvq_config import NSVQConfig
from nsvq.tokenizer.quantizers import QuantizerOptions, make_quantizer
from nsvq.tokenizer.quantizers.base import NearestQuantizer
from nsvq.tokenizer.quantizers.ema import EMAQuantizer, decay_of_step
from nsvq.tokenizer.schedule import Schedule, ScheduleConfig
from nsvq.tokenizer.temperature import Temperature
from nsvq.tokenizer.upkeep import CodebookUpkeep


def _no_averages(table: Tensor) -> list[Tensor]:
    return []


class StandaloneQuantizer(nn.Module):
    """Tokens [N, d] -> (z_q [N, d] float32 with its gradient, indices [N], loss, a scalar).

    `weights` of the two VQ losses. `accumulation` forwards in training are one step. An epoch, at whose end unused
    codes are replaced, is `replace_every` K tokens over all ranks. Where a method's `decay` is None, each step's tokens
    set it.

    State: `clock` [4], a seed, whether codes have started, finished epochs, tokens of all of them; `distance` [], of
    the temperature; `usage` [K] and `errors` [K] of the epoch. It is the same on all ranks."""

    # What this step's last forward saw, for activation checkpointing, which repeats it in the backward pass.
    tau: float | None = None
    share = 1.0
    starts = False  # in this step: where codes start from its latents, their distances say nothing
    codes_before: dict[str, Tensor]

    def __init__(
        self,
        options: QuantizerOptions,
        dim: int,
        nsvq: NSVQConfig,
        weights: dict[str, float],
        replace_every: float,
        accumulation: int,
    ):
        super().__init__()
        self.quantizer = quantizer = make_quantizer(options, dim)
        self.accumulation = accumulation
        own = {name: weights[name] for name in quantizer.terms} | quantizer.loss_weights()
        nsvq.set_up(quantizer)
        if nsvq.pull and list(quantizer.parameters()):  # averages follow it in closed form, without a gradient
            own["nonstationary"] = nsvq.pull.weight
        self.weights = own
        k = quantizer.codebook_size
        self.schedule = Schedule(ScheduleConfig(epochs=sys.maxsize), nsvq, math.ceil(replace_every * k))
        self.temperature = Temperature(nsvq.pull, dim)
        # An optimizer's moments of a replaced code have faded by then: an epoch gave it no gradient.
        self.upkeep = CodebookUpkeep(quantizer, nsvq, self.schedule, None, averages=_no_averages, seed=0)
        self.register_buffer("clock", torch.stack([torch.randint(2**31, ()), *torch.zeros(3, dtype=torch.int64)]))
        self.register_buffer("distance", torch.zeros(()))
        self.register_buffer("usage", torch.zeros(k, dtype=torch.int64))
        self.register_buffer("errors", torch.zeros(k))
        self.window: list[tuple] = []  # of the step's micro-batches: `_count`
        self._known = ((-1, -1), [0, 0, 0, 0], 0.0)  # `_versions`, clock and distance, on the host; not known yet

    def _apply(self, fn, recurse=True):
        """`.half()` and `.bfloat16()` of a whole model leave codes alone: averages would stand still in them."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return self._quantize(z, None)
        if ranks.in_backward():
            z_q, indices, loss = self._quantize(z, self.tau, self.codes_before)
            return z_q, indices, loss * self.share
        with ranks.unequal():  # a mask leaves each rank a number of its own
            return self._train_step(z)

    def _train_step(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A latent that is not finite, as an overflow of float16 leaves it, must reach no code.
        here = torch.full((3,), len(z), device=z.device)
        here[1], here[2] = (~z.detach().isfinite()).sum(), not len(z)
        count, bad, empty = ranks.total(here).tolist()
        if 0 < empty < ranks.world()[1] and not isinstance(self.quantizer, NearestQuantizer):
            raise ValueError(f"{self.quantizer.config.name} needs a valid position on every rank; {empty} have none")
        # DDP takes the mean over ranks, which is that over all tokens only if a rank with more of them weighs more.
        self.share = len(z) * ranks.world()[1] / max(count, 1)
        if not self.window:
            self._begin_step(z, may_start=count > 0 and not bad)
        z_q, indices, loss = self._quantize(z, self.tau)
        self.window.append(self._count(z, z_q, indices, count, bad))
        if len(self.window) == self.accumulation:
            self._end_step()
        return z_q, indices, loss * self.share

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Start anew, from `codes` [K, d]. Raises `UsageError` where a method makes its codes of other weights, and
        `ValueError` for another shape."""
        table, codes = self.quantizer.table(), torch.as_tensor(codes)
        if table is None:
            raise UsageError(f"{self.quantizer.config.name} makes its codes itself: they cannot be set")
        if codes.shape != table.shape:
            raise ValueError(f"expected codes {list(table.shape)}, got {list(codes.shape)}")
        table.copy_(codes)
        self.quantizer.initialize(table.detach().clone())
        self.clock[1:] = torch.tensor([1, 0, 0])
        for remembered in (self.distance, self.usage, self.errors):
            remembered.zero_()

    def codes(self, indices: Tensor) -> Tensor:
        """Indices [...] -> codes [..., d] float32, of zeros where an index is -1."""
        return self.quantizer.codes(indices.clamp(min=0)).masked_fill((indices < 0)[..., None], 0.0)

    def _quantize(self, z: Tensor, tau: float | None, buffers: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if not len(z):  # a mask may leave none; the parameters take part, since DDP waits for their gradients
            nothing = sum((p.sum() for p in self.quantizer.parameters()), z.sum()) * 0.0
            none = z.new_zeros(0, dtype=torch.int64)
            if isinstance(self.quantizer, NearestQuantizer):
                self.quantizer.searched(z.detach().float(), none, None)
            return z.float(), none, nothing.float()
        image = z.T[None, :, :, None]  # (1, d, N, 1)
        out = functional_call(self.quantizer, buffers, (image, tau)) if buffers else self.quantizer(image, tau)
        loss = sum(weight * out.losses[name] for name, weight in self.weights.items() if name in out.losses)
        return out.z_q[0, :, :, 0].T, out.indices.flatten(), loss + out.z_q.new_zeros(())

    def _versions(self) -> tuple[int, int]:
        return self.clock._version, self.distance._version

    @torch.no_grad()
    def _begin_step(self, z: Tensor, may_start: bool) -> None:
        if self._known[0] != self._versions():  # asked of the GPU no more than it must be
            self._known = (self._versions(), self.clock.tolist(), float(self.distance))
        _, (seed, started, epoch, tokens), distance = self._known
        self.starts = not started and may_start
        if self.starts:
            self._start(z, torch.Generator().manual_seed(seed))
            self.clock[1] = 1
        self.schedule.epoch, self.upkeep.seed = epoch, seed
        if self.schedule.epoch_ended(tokens):  # before a step, as no graph holds the codes then
            self.schedule.end_epoch(math.nan)
            self.upkeep.replace(self.usage, self.errors)
            self.quantizer.end_epoch()
            self.clock[2] = self.schedule.epoch
            self.usage.zero_()
            self.errors.zero_()
        self.upkeep.begin_step()
        self.temperature.distance = distance or None
        self._known = (self._versions(), [seed, int(started or self.starts), self.schedule.epoch, tokens], distance)
        self.tau = self.temperature.value() if self.schedule.nsvq.pull else None
        codes = dict(self.quantizer.named_buffers(recurse=False)).get("weight")
        self.codes_before = {} if codes is None else {"weight": codes.clone()}

    def _start(self, z: Tensor, generator: torch.Generator) -> None:
        """From latents of this batch of all ranks, each of them once, or all of them several times."""
        if not (codes := self.quantizer.initial_latents()):
            return
        tokens = sum(ranks.counts(z))
        positions = torch.randperm(tokens, generator=generator)[torch.arange(codes) % tokens].to(z.device)
        latents = ranks.rows(z.float(), positions)
        noise = torch.randn(latents.shape, generator=generator).to(latents) * latents.std(correction=0)
        latents[tokens:] += 1e-3 * noise[tokens:]
        self.quantizer.initialize(latents)

    @torch.no_grad()
    def _count(self, z: Tensor, z_q: Tensor, indices: Tensor, count: int, bad: int) -> tuple:
        """What the end of the step needs of a micro-batch, over all ranks."""
        errors = self.quantizer.squared_errors(z.T[None, :, :, None], z_q.T[None, :, :, None]).flatten()
        won = wins(indices, len(self.usage))
        of_codes = torch.zeros_like(self.errors).index_add_(0, indices, errors)
        return ranks.total(won), ranks.total(of_codes), count, bad

    @torch.no_grad()
    def _end_step(self) -> None:
        won, errors, counts, bad = (sum(values) for values in zip(*self.window, strict=True))
        self.window.clear()
        stepped = counts > 0 and not bad
        if isinstance(self.quantizer, EMAQuantizer) and self.quantizer.config.decay is None:
            self.quantizer.decay = decay_of_step(counts, len(won))
        self.quantizer.end_step(stepped)
        if stepped:
            _, (seed, started, epoch, tokens), distance = self._known
            self.usage += won
            self.errors += errors
            self.clock[3] += counts
            if self.temperature.follows and not self.starts:
                self.temperature.update(float(errors.sum()) / (counts * self.quantizer.dim))
                distance = float(torch.tensor(self.temperature.distance))  # as float32, which is what a resume reads
                self.distance.fill_(distance)
            self._known = (self._versions(), [seed, started, epoch, tokens + counts], distance)
