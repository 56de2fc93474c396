"""The trainer of stage two: a DiT, or a U-Net, by rectified flow or as a DDPM, on cached latents."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from nsvq.common.drawing import Distance, Drawing
from nsvq.common.metrics import surviving
from nsvq.common.optimized import Optimized
from nsvq.common.trainer import Trainer
from nsvq.diffusion.config import TrainConfig
from nsvq.diffusion.model import make_model
from nsvq.diffusion.objectives import drop_labels, make_objective
from nsvq.diffusion.samplers import sample
from nsvq.errors import UsageError
from nsvq.tokenizer.latents import LatentCache, train_batches
from nsvq.tokenizer.pretrained import Tokenizer

_QUARTILES = 4  # of the noise level, in the loss that is logged
_DECODED_AT_ONCE = 8  # images


class DiffusionTrainer(Trainer):
    """Trains the network of `config` on the latents of `cache`, which `tokenizer` made. Its clock is the optimizer
    step.

    save(folder, trainer) writes the pipeline of the weights in `trainer.drawing.network`; `distance` measures samples,
    as `Drawing` says. Raises `UsageError` where the model does not fit the latents.
    """

    config: TrainConfig
    shown = ("loss", "grad_norm")

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        cache: LatentCache,
        save: Callable[[Path, "DiffusionTrainer"], None],
        distance: Distance | None,
    ):
        super().__init__(config, accelerator)
        self.tokenizer, self.cache, self.save = tokenizer, cache, save
        key = cache.manifest["key"]
        self.inputs = {"data.source": key["data"], "tokenizer": key["tokenizer"]}
        self.names = dict(enumerate(cache.classes)) if config.model.conditional else {}
        self.objective = make_objective(config.objective, cache.shape)
        self.total_steps = config.steps

        set_seed(config.run.seed)  # whatever encoding drew
        try:
            model = make_model(config.model, cache.shape, len(self.names))
        except ValueError as error:
            raise UsageError(f"the model does not fit these latents: {error}") from None
        if config.model.compile:
            model.compile()
        self.drawing = Drawing(self, model, len(self.names), self._sample, distance)
        optim = config.optim
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            model.parameters(), optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=fused
        )
        self.model = model
        self.network, optimizer = accelerator.prepare(model, optimizer)
        parameters = list(model.parameters())
        self.register(
            "diffusion",
            {"model": self.network},
            {"model": Optimized(optimizer, parameters, optim.clip_grad_norm)},
            parameters,
            {"decay": optim.ema_decay, "foreach": True},
        )

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

    def measure(self, due: bool, last: bool) -> dict[str, float]:
        values = {}
        if due:
            (group,) = self.optimized["model"].optimizer.param_groups
            values = {"lr": group["lr"], "ema_decay": self.ema.cur_decay_value}
        return values | self.drawing.distance(last)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        with self.drawing.averaged(super().averaged_weights):
            yield

    def draw(self) -> None:
        self.drawing.picture()

    def keep(self) -> None:
        every = self.config.export_every
        if every is not None and self.run.step % every == 0:
            name = f"pipelines/step-{self.run.step}"
            with surviving(name):
                self._save(self.config.out / name)

    def export(self) -> None:
        """<out>/pipeline, with averaged weights."""
        self._save(self.config.out / "pipeline")
        self.accelerator.print(f"pipeline: {self.config.out / 'pipeline'}")

    def _save(self, folder: Path) -> None:
        with self.averaged_weights():
            if self.accelerator.is_main_process:
                folder.parent.mkdir(exist_ok=True)
                self.save(folder, self)

    @torch.no_grad()
    def _sample(self, labels: list[int], seeds: range, guidance_scale: float) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of these classes and seeds."""
        network = self.drawing.network
        noise = [torch.randn(self.cache.shape, generator=torch.Generator().manual_seed(i)) for i in seeds]
        with self.accelerator.autocast():
            latents = sample(
                network,
                self.objective.scheduler(),
                torch.stack(noise).to(self.device),
                torch.tensor(labels, device=self.device),
                network.null_class,
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
