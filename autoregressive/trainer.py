"""The trainer of the autoregressive stage: a Llama on cached codes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import LlamaForCausalLM

from nsvq.autoregressive.config import TokenSampling, TrainConfig
from nsvq.autoregressive.model import NextToken, make_llama, start_from_codes
from nsvq.autoregressive.sampling import draw_uniforms, sample
from nsvq.common.drawing import Distance, Drawing
from nsvq.common.optimized import Optimized
from nsvq.common.trainer import Trainer
from nsvq.tokenizer.latents import LatentCache, code_batches
from nsvq.tokenizer.pretrained import Tokenizer

_DECODED_AT_ONCE = 8  # images


class AutoregressiveTrainer(Trainer):
    """Trains the network of `config` on the codes of `cache`, which `tokenizer` made, and measures it on those of
    `held_out`. Its clock is the optimizer step.

    save(folder, trainer) writes the pipeline of the weights in `trainer.drawing.network`; `distance` measures samples,
    as `Drawing` says.
    """

    config: TrainConfig
    shown = ("loss", "grad_norm")

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        cache: LatentCache,
        held_out: LatentCache,
        save: Callable[[Path, "AutoregressiveTrainer"], None],
        distance: Distance | None,
    ):
        super().__init__(config, accelerator)
        self.tokenizer, self.cache, self.held_out, self.save = tokenizer, cache, held_out, save
        key = cache.manifest["key"]
        self.inputs = {"data.source": key["data"], "tokenizer": key["tokenizer"]}
        self.names = dict(enumerate(cache.classes))
        self.codes, self.null = tokenizer.codebook_size, tokenizer.codebook_size + len(self.names)
        self.total_steps = config.schedule.steps

        set_seed(config.run.seed)  # whatever encoding drew
        llama = self.make_network()
        if config.model.gradient_checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.compile:
            llama.model.compile()
        self.drawing = Drawing(self, llama, len(self.names), self._sample, distance)
        model = NextToken(llama, self.codes, config.model.dropout)
        optim = config.optim
        matrices = [p for p in model.parameters() if p.dim() > 1]
        norms = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, optim.lr, optim.betas, fused=self.device.type in ("cpu", "cuda"))
        self.model = model
        self.network, optimizer = accelerator.prepare(model, optimizer)
        parameters = list(model.parameters())
        self.register(
            "autoregressive",
            {"model": self.network},
            {"model": Optimized(optimizer, parameters, optim.clip_grad_norm)},
            parameters,
            {"decay": optim.ema_decay, "foreach": True},
        )

    def make_network(self) -> LlamaForCausalLM:
        """The network as a run starts with it; a subclass may change it."""
        llama = make_llama(self.config.model, self.codes, len(self.names), math.prod(self.cache.shape))
        if self.config.model.start_from_codes:
            start_from_codes(llama, self.tokenizer.codebook)
        return llama

    def batches(self, start: int) -> Iterator[dict]:
        return code_batches(self.cache, seed=self.config.run.seed, start=start, **self.loading)

    def rate_factor(self) -> float:
        schedule, step = self.config.schedule, self.run.step
        rise = (step + 1) / max(1, schedule.warmup_steps)
        held = schedule.hold * (schedule.steps - 1)
        fallen = max(0.0, (step - held) / max(1.0, schedule.steps - 1 - held))
        return min(rise, 1 - (1 - schedule.final) * fallen)

    def step(self, batch: dict) -> dict[str, Tensor | tuple[Tensor, Tensor | int]]:
        batch = {name: batch[name].to(self.device, non_blocking=True) for name in batch if name != "id"}
        dropped = (batch["drop_uniform"] < self.config.model.class_dropout) | (batch["labels"] < 0)
        ids = torch.where(dropped, self.null, self.codes + batch["labels"])
        self.model.train()
        with self.accelerator.autocast():  # accelerate puts none around a network that FSDP2 splits
            loss = self.network(ids, batch["codes"].flatten(1))
        self.accelerator.backward(loss)
        return {"loss": loss.detach()}

    def measure(self, due: bool, last: bool) -> dict[str, float]:
        values = {}
        if due:
            (group, _) = self.optimized["model"].optimizer.param_groups
            values = {"lr": group["lr"], "ema_decay": self.ema.cur_decay_value}
        if self.run.step % self.config.held_out.every == 0 or last:
            with self.averaged_weights():
                values["held_out_bits"] = self.held_out_bits()
        return values | self.drawing.distance(last)

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """-log2 of the probability of an image's codes given its class, mean over `held_out`, in float32, with the
        weights that draw. A collective call."""
        network, bits = NextToken(self.drawing.network, self.codes).eval(), 0.0
        mine = range(self.accelerator.process_index, len(self.held_out), self.accelerator.num_processes)
        for start in range(0, len(mine), self.micro_batch):  # on more ranks than images, some have none
            read = [self.held_out.read(i, 0) for i in mine[start : start + self.micro_batch]]
            tokens = torch.stack([codes.long() for codes, _ in read]).flatten(1).to(self.device)
            ids = torch.tensor([self.null if label < 0 else self.codes + label for _, label in read])
            with torch.compiler.set_stance("force_eager"):
                nats = network(ids.to(self.device), tokens)
            bits += nats.item() * tokens.numel() / math.log(2)
        total = torch.tensor(bits, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(total, "sum").item() / len(self.held_out)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self.drawing.network.eval()
        with self.drawing.averaged(super().averaged_weights):
            yield

    def draw(self) -> None:
        self.drawing.picture()

    @torch.no_grad()
    def _sample(self, labels: list[int], seeds: range, guidance_scale: float) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1], of these classes and seeds."""
        how = self.config.sampling.model_dump(include=set(TokenSampling.model_fields))
        each = [torch.Generator().manual_seed(i) for i in seeds]
        uniforms = torch.stack([draw_uniforms(math.prod(self.cache.shape), one) for one in each]).to(self.device)
        ids = self.codes + torch.tensor(labels, device=self.device)
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            tokens = sample(self.drawing.network, self.codes, ids, uniforms, guidance_scale=guidance_scale, **how)
        codes = tokens.unflatten(1, self.cache.shape)
        return torch.cat([self.tokenizer.decode(part) for part in codes.split(_DECODED_AT_ONCE)])

    def export(self) -> None:
        """<out>/pipeline, with averaged weights."""
        with self.averaged_weights():
            if self.accelerator.is_main_process:
                self.save(self.config.out / "pipeline", self)
        self.accelerator.print(f"pipeline: {self.config.out / 'pipeline'}")
