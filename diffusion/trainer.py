"""The trainer of stage two: a DiT, or a U-Net, by rectified flow or as a DDPM, on cached latents."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from nsvq.common.generator import Distance, GeneratorTrainer
from nsvq.diffusion.config import TrainConfig
from nsvq.diffusion.model import make_model
from nsvq.diffusion.objectives import drop_labels, make_objective
from nsvq.diffusion.samplers import sample
from nsvq.errors import UsageError
from nsvq.tokenizer.latents import LatentCache, train_batches
from nsvq.tokenizer.pretrained import Tokenizer

_QUARTILES = 4  # of the noise level, in the loss that is logged
_DECODED_AT_ONCE = 8  # images
_STD = 0.7, 1.4  # of latents, about which nothing is said


class DiffusionTrainer(GeneratorTrainer):
    """Trains the network of `config` on latents. Raises `UsageError` where the model does not fit them."""

    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        cache: LatentCache,
        save: Callable[[Path, "DiffusionTrainer"], None],
        distance: Distance | None,
    ):
        super().__init__(config, accelerator, tokenizer, cache, save, distance)
        self.names = self.names if config.model.conditional else {}
        self.objective = make_objective(config.objective, cache.shape)
        self.total_steps = config.steps
        try:
            model = make_model(config.model, cache.shape, len(self.names))
        except ValueError as error:
            raise UsageError(f"the model does not fit these latents: {error}") from None
        if config.model.compile:
            model.compile()
        optim = config.optim
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            model.parameters(), optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=fused
        )
        self.adopt("diffusion", model, optimizer, drawn=model)
        self._check_scale()

    def _check_scale(self) -> None:
        std, factor = self.cache.manifest["overall_std"], self.tokenizer.model.config.scaling_factor
        if not _STD[0] <= std <= _STD[1]:
            found = f"the latents' standard deviation is {std:.3g}, and noise levels are for about 1"
            todo = f"set scaling_factor in the tokenizer's config.json to {factor / std:.4g} (it is {factor:.4g})"
            self.run.warn(f"{found}: {todo}, and train with another --out and --cache")

    def batches(self, start: int) -> Iterator[dict]:
        return train_batches(self.cache, seed=self.config.run.seed, start=start, **self.loading)

    def resume(self) -> None:
        if self.run.step > self.total_steps:
            raise UsageError(
                f"{self.config.out} has been trained for {self.run.step} steps: --steps {self.total_steps} is too few"
            )

    def rate_factor(self) -> float:
        return min(1.0, (self.run.step + 1) / max(1, self.config.optim.warmup_steps))

    def step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor | int]]:
        batch = {name: batch[name].to(self.device, non_blocking=True) for name in batch if name != "id"}
        levels = self.objective.levels(batch["time_normal"])
        labels = drop_labels(
            batch["labels"], batch["drop_uniform"], self.config.model.label_dropout(), self.model.null_class
        )
        with self.accelerator.autocast():  # accelerate puts none around a network that FSDP2 splits
            losses = self.objective.losses(self.network, batch["latents"], batch["noise"], levels, labels)
        self.accelerator.backward(losses.mean())
        return _loss_terms(losses.detach(), levels)

    @torch.no_grad()
    def sample(self, labels: list[int], seeds: range, guidance_scale: float) -> Tensor:
        noise = [torch.randn(self.cache.shape, generator=torch.Generator().manual_seed(i)) for i in seeds]
        with self.accelerator.autocast():
            latents = sample(
                self.drawn,
                self.objective.scheduler(),
                torch.stack(noise).to(self.device),
                torch.tensor(labels, device=self.device),
                self.drawn.null_class,
                steps=self.config.sampling.steps,
                guidance_scale=guidance_scale,
            )
        vae = self.tokenizer.model
        latents = latents / vae.config.scaling_factor
        return torch.cat([vae.decode(part).sample for part in latents.split(_DECODED_AT_ONCE)])


def _loss_terms(losses: Tensor, levels: Tensor) -> dict[str, tuple[Tensor, Tensor | int]]:
    """(sum, count) of losses [B] at noise levels [B], in all and by quarter of the level."""
    terms = {"loss": (losses.sum(), len(losses))}
    quartile = (levels * _QUARTILES).long().clamp(max=_QUARTILES - 1)
    for q in range(_QUARTILES):
        inside = (quartile == q).float()
        terms[f"loss_level_q{q + 1}"] = (losses * inside).sum(), inside.sum()
    return terms
