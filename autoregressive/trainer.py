"""The trainer of the autoregressive stage: a Llama on cached codes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM

from nsvq.autoregressive.config import TokenSampling, TrainConfig
from nsvq.autoregressive.model import NextToken, make_llama, start_from_codes
from nsvq.autoregressive.sampling import draw_uniforms, sample
from nsvq.common.generator import Distance, GeneratorTrainer
from nsvq.tokenizer.latents import LatentCache, code_batches
from nsvq.tokenizer.pretrained import Tokenizer

_DECODED_AT_ONCE = 8  # images


class AutoregressiveTrainer(GeneratorTrainer):
    """Trains the network of `config` on codes, and measures it on those of `held_out`."""

    config: TrainConfig

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
        super().__init__(config, accelerator, tokenizer, cache, save, distance)
        self.held_out = held_out
        self.codes, self.null = tokenizer.codebook_size, tokenizer.codebook_size + len(self.names)
        self.total_steps = config.schedule.steps
        llama = self.make_network()
        if config.model.gradient_checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.compile:
            for layer in llama.model.layers:  # one graph for all
                layer.compile()
        model = NextToken(llama, self.codes, config.model.dropout)
        optim = config.optim
        matrices = [p for p in model.parameters() if p.dim() > 1]
        norms = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, optim.lr, optim.betas, fused=self.device.type in ("cpu", "cuda"))
        self.adopt("autoregressive", model, optimizer, drawn=llama)

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
        values = super().measure(due, last)
        if self.run.step % self.config.held_out.every == 0 or last:
            with self.averaged_weights():
                values["held_out_bits"] = self.held_out_bits()
        return values

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """-log2 of the probability of an image's codes given its class, mean over `held_out`, in float32, with the
        weights that draw. A collective call."""
        network, bits = NextToken(self.drawn, self.codes).eval(), 0.0
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
        self.drawn.eval()
        with super().averaged_weights():
            yield

    @torch.no_grad()
    def sample(self, labels: list[int], seeds: range, guidance_scale: float) -> Tensor:
        how = self.config.sampling.model_dump(include=set(TokenSampling.model_fields))
        each = [torch.Generator().manual_seed(i) for i in seeds]
        uniforms = torch.stack([draw_uniforms(math.prod(self.cache.shape), one) for one in each]).to(self.device)
        ids = self.codes + torch.tensor(labels, device=self.device)
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            tokens = sample(self.drawn, self.codes, ids, uniforms, guidance_scale=guidance_scale, **how)
        codes = tokens.unflatten(1, self.cache.shape)
        return torch.cat([self.tokenizer.decode(part) for part in codes.split(_DECODED_AT_ONCE)])
