"""The trainer of stage one: encoder, quantizer, decoder and discriminator through NSVQ's three phases."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from nsvq.common import checkpoints
from nsvq.common import config as configs
from nsvq.common.image_metrics import psnr, to_uint8
from nsvq.common.metrics import surviving
from nsvq.common.optimized import Optimized
from nsvq.common.run import code_version
from nsvq.common.trainer import Trainer
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import eval_batches, fixed_images, train_batches
from nsvq.data.understood import announce
from nsvq.errors import UsageError
from nsvq.files import state_hash
from nsvq.tokenizer import ranks
from nsvq.tokenizer.adversary import Adversary
from nsvq.tokenizer.codebook import wins
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.dino_discriminator import ViTFeatures
from nsvq.tokenizer.discriminator import make_discriminator
from nsvq.tokenizer.export import latent_statistics, save, to_vqmodel
from nsvq.tokenizer.health import DriftProbe, EpochUsage, alarms, near_duplicates, usage
from nsvq.tokenizer.losses import load_losses
from nsvq.tokenizer.quantizers.ema import EMAQuantizer
from nsvq.tokenizer.schedule import Schedule
from nsvq.tokenizer.step import TokenizerStep, make_networks, make_optimizers
from nsvq.tokenizer.temperature import Temperature
from nsvq.tokenizer.upkeep import CodebookUpkeep
from nsvq.tokenizer.warm_start import warm_start

PICTURE_IMAGES = 8
_EAGER = torch.compiler.set_stance("force_eager")  # compiling is for steps: each other size of batch would take minutes


class Distance(Protocol):
    """What measures rFID, collectively: images [B, 3, H, W] uint8 with their numbers, since the last `begin`."""

    def begin(self) -> None: ...
    def add(self, images: Tensor, numbers: Tensor) -> None: ...
    def value(self) -> dict[str, float]: ...


class TokenizerTrainer(Trainer):
    """Trains a tokenizer as `config` says, and leaves it in <out>/tokenizer. Its clock is the number of samples seen,
    cut into epochs. `distance`, where there is one, compares reconstructions with the images of each validation."""

    config: TrainConfig
    shown = ("phase", "l1", "commitment", "utilization", "val_psnr")

    def __init__(self, config: TrainConfig, accelerator: Accelerator, distance: Distance | None = None):
        super().__init__(config, accelerator)
        self.distance = distance
        optim, loss, pull = config.optim, config.loss, config.nsvq.pull

        # Data
        self.images = announce(config.data, accelerator)
        self.bad_images = BadImages(config.data.max_bad_fraction, accelerator)

        # Networks
        encoder, decoder = make_networks(config)
        quantizer = decoder.quantizer
        if isinstance(quantizer, EMAQuantizer):
            tokens, k = config.run.batch_size * config.tokens, quantizer.codebook_size
            what = f"a code of mean use remembers {tokens / k / (1 - quantizer.decay):.3g} tokens"
            accelerator.print(f"codes: decay {quantizer.decay:.4g}, {what} ({tokens:,} a step, K = {k:,})")
        with accelerator.main_process_first():  # which downloads frozen networks, if any does
            features, discriminator = make_discriminator(config.discriminator, config.run.seed)
            losses = load_losses(loss, config.model.latent_channels, self.device)
        self.inputs = {"data.source": self.images.fingerprint}
        if isinstance(features, ViTFeatures):
            self.inputs["discriminator.vit"] = state_hash(features.vit)
        self.has_codes = False
        if config.init_from and not checkpoints.complete(config.out / "checkpoints"):
            with accelerator.main_process_first():  # which downloads it, if any does
                taken = warm_start(config.init_from, config.model, encoder, decoder, config.init_codes)
            self.inputs["init_from"], self.has_codes = taken.fingerprint, taken.has_codes
            accelerator.print(taken.text)
        if config.model.compile:
            encoder.compile()
            decoder.decoder.compile()
        extra = {}
        if logits := losses.logits:
            self.inputs["loss.logits.network"] = state_hash(logits.classifier)
        if alignment := losses.alignment:
            extra["alignment"] = alignment.head = accelerator.prepare(alignment.head)
            self.inputs["loss.alignment.network"] = state_hash(alignment.teacher)
        optimizers = make_optimizers(config, encoder, decoder, list(extra.values()), discriminator, self.device)
        encoder, decoder, discriminator, *optimizers = accelerator.prepare(encoder, decoder, discriminator, *optimizers)
        self.adversary = Adversary(features.to(self.device), discriminator, loss.lecam_weight, accelerator)
        self.micro_step = step = TokenizerStep(config, encoder, decoder, losses, self.adversary, accelerator)
        self.live_encoder, self.live_decoder, self.quantizer = step.live_encoder, step.live_decoder, step.quantizer

        # State
        parameters = [*self.live_encoder.parameters(), *self.live_decoder.parameters()]
        trained = parameters + [parameter for head in extra.values() for parameter in head.parameters()]
        self.register(
            "tokenizer",
            {"encoder": encoder, "decoder": decoder, "discriminator": discriminator, **extra},
            {
                "generator": Optimized(optimizers[0], trained, optim.clip_grad_norm or math.inf),
                "discriminator": Optimized(optimizers[1], list(self.adversary.live_network.parameters())),
            },
            parameters,
            {"decay": optim.ema_decay, "foreach": self.device.type == "cuda"},
        )
        self.schedule = Schedule(config.schedule, config.nsvq, config.schedule.epoch_samples or len(self.images))
        if (epoch := self.schedule.epoch_samples) < config.run.batch_size:
            what = f"an epoch of {epoch} images is shorter than run.batch_size = {config.run.batch_size}"
            raise UsageError(f"{what}: set schedule.epoch_samples to some batches")
        tokens = len(self.images) * config.tokens
        if quantizer.final_latents() and tokens < quantizer.codebook_size:
            what = f"{quantizer.codebook_size} codes cannot be found among {tokens} tokens of {len(self.images)} images"
            raise UsageError(f"{what}: set a smaller quantizer.codebook_size")
        self.total_steps = math.ceil(self.schedule.total_samples / config.run.batch_size)
        if loss.adversarial_weight and config.schedule.adversarial_after_steps >= self.total_steps:
            what = f"schedule.adversarial_after_steps leaves no GAN in the {self.total_steps} steps of this run"
            raise UsageError(f"{what}; lower it, or set loss.adversarial_weight: 0")
        adam, seed = optimizers[0].optimizer, config.run.seed
        self.upkeep = CodebookUpkeep(self.quantizer, config.nsvq, self.schedule, adam, self._averages_of, seed)
        self.epoch_usage = EpochUsage(self.quantizer.codebook_size, accelerator)
        self.temperature = Temperature(pull, self.quantizer.dim)
        self.probe = DriftProbe(fixed_images(config.data, "test", config.validation.probe_images).to(self.device))
        kept = ("schedule", "epoch_usage", "probe", "bad_images", "temperature")
        self.stateful |= {name: getattr(self, name) for name in kept}
        self.stateful |= {f"adaptive_{name}": part for name, part in step.adaptive.items()}
        if self.adversary.lecam:
            self.stateful["lecam"] = self.adversary.lecam

    def batches(self, start: int) -> Iterator[dict]:
        return train_batches(self.config.data, seed=self.config.run.seed, start=start, **self.loading)

    def start(self) -> None:
        if not self.has_codes:
            self.upkeep.start(self._first_latents)
        if self.schedule.phase != "stage1":
            self.freeze_encoder()
            self.upkeep.consolidate(self._training_latents)

    def resume(self) -> None:
        if self.schedule.phase != "stage1":
            self.freeze_encoder()

    # A step

    def rate_factor(self) -> float:
        progress = self.run.samples_seen / self.schedule.total_samples
        return self.config.optim.lr_factor(progress, self.config.schedule.epochs)

    def begin_step(self) -> None:
        """What this step trains with: phase, weights of the losses, temperature."""
        schedule, seen, step = self.schedule, self.run.samples_seen, self.micro_step
        self.phase = schedule.phase_at(seen)
        self.upkeep.begin_step()
        late, batch = self.config.schedule, self.config.run.batch_size
        without = max(late.adversarial_after * schedule.epoch_samples, late.adversarial_after_steps * batch)
        factor = None if seen < without else schedule.adversarial_factor(seen)
        step.begin(self.phase, factor, self.temperature.value())
        if step.perturbation is not None:
            step.perturbation.alpha = self.config.perturbation.alpha_at(seen / schedule.epoch_samples)
        with_gan = "adversarial" in step.weights
        self.flops_of = self.phase + (" with GAN" if with_gan else "")
        self.optimized["discriminator"].trains = with_gan
        self.optimized["generator"].trains = step.generator_trains
        self.tokens: list[tuple] = []  # of each micro-batch: indices, squared errors, commitment loss

    @contextlib.contextmanager
    def heaviest(self) -> Iterator[None]:
        """stage1 with its GAN: all networks have gradients."""
        counted, self.bad_images = self.bad_images, BadImages(self.config.data.max_bad_fraction)
        self.tokens = []
        self.micro_step.begin("stage1", 1.0, self.temperature.value() or self.temperature.config.temperature)
        try:
            with ranks.alone():
                yield
        finally:
            self.adversary.live_network.requires_grad_(True)
            self.micro_step.end(stepped=False)
            self.tokens, self.bad_images = [], counted

    def step(self, batch: dict) -> dict[str, Tensor]:
        self.bad_images.update(batch)
        images = batch["image"].to(self.device, non_blocking=True)
        terms, z, quantized = self.micro_step(images, batch["position"])
        errors, replace = None, self.config.nsvq.replace
        if replace and replace.weights == "error":
            errors = self.quantizer.squared_errors(z, quantized.z_q)
        self.tokens.append((quantized.indices, errors, terms["commitment"]))
        return terms

    def end_step(self, stepped: bool) -> None:
        self.micro_step.end(stepped)
        if not stepped:
            return
        for indices, errors, commitment in self.tokens:
            self.epoch_usage.update(indices, errors, commitment, self.micro_batch)
        if self.temperature.follows:
            self.temperature.update(self.guard.told)

    def told(self) -> Tensor | None:
        if not self.temperature.follows:
            return None
        return torch.stack([commitment for *_, commitment in self.tokens]).mean()

    # An epoch's end, and what is measured

    def measure(self, due: bool, last: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if due:
            if self.accelerator.is_main_process:
                tau = self.temperature.value() or self.temperature.config.temperature
                with self.accelerator.autocast(), _EAGER:
                    values |= self.probe.measure(self.live_encoder, self.quantizer, tau)
            step = self.micro_step
            values["adversarial_weight"] = float(step.weights.get("adversarial", 0.0))
            if "alignment" in step.adaptive and "alignment" in step.weights:
                values["alignment_weight"] = float(step.weights["alignment"])
            values["bad_images"] = self.bad_images.check()
            if step.perturbation is not None:
                values["perturbation_alpha"] = step.perturbation.alpha
        if self.schedule.epoch_ended(self.run.samples_seen):
            values |= self.end_epoch(last)
        if last:
            self.upkeep.fit(self._averaged_latents)
            values |= self.validate()
        if values:
            values |= {"phase": self.phase, "epoch": self.schedule.epoch}
            if bad := self.bad_images.news():
                values["bad_image_ids"] = bad
        return values

    def watch(self, values: dict[str, Any]) -> None:
        for alarm in alarms(values, self.quantizer.codebook_size):
            self.run.warn(f"step {self.run.step}: {alarm}")

    def end_epoch(self, last: bool) -> dict[str, float]:
        """Usage of the epoch, the schedule's decision, validation, and then replacement, whose codes have not trained
        yet: all of it from numbers summed over ranks."""
        counts, errors, commitment = self.epoch_usage.total()
        values = {"epoch_commitment": commitment} | (usage(counts) if self.quantizer.has_codes else {})
        if self.schedule.end_epoch(commitment):
            self.freeze_encoder()
            if self.phase == "stage1":
                self.upkeep.consolidate(self._training_latents)
        if self.schedule.epoch % self.config.validation.every == 0 and not last:
            values |= self.validate()
        values["replaced_codes"] = self.upkeep.replace(counts, errors)
        self.epoch_usage.reset()
        self.quantizer.end_epoch()
        if self.quantizer.learns_codes:
            values["near_duplicates"] = near_duplicates(self.quantizer.codebook())
        return values

    def freeze_encoder(self) -> None:
        """No gradients from here on: None, not zero, or Adam's momentum would go on moving the encoder. Its average
        becomes a copy of it, since codebook and decoder are fitted to the encoder that trained."""
        self.live_encoder.requires_grad_(False).eval()
        self.live_encoder.zero_grad(set_to_none=True)
        for average, parameter in self._averages():
            if not parameter.requires_grad:
                average.copy_(parameter)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR (per image, 8-bit), L1, quantization error, usage, and rFID where asked for, on the test split, with
        averaged weights."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        counts = torch.zeros(self.quantizer.codebook_size, dtype=torch.int64, device=self.device)
        if self.distance:
            self.distance.begin()
        with self.averaged_weights():
            for batch in eval_batches(self.config.data, "test", limit=self.config.validation.images, **self.loading):
                if self.guard.interrupted():
                    break
                if not len(batch["image"]):  # none of them decodes
                    continue
                images = batch["image"].to(self.device)
                output, quantized = self._reconstruct(images)
                made = to_uint8(output)
                decibels = psnr(made, to_uint8(images))
                l1 = (output.float().clamp(-1, 1) - images).abs().double().flatten(1).mean(1)
                error = quantized.losses["commitment"].double() * len(images)
                sums += torch.stack([decibels.sum(), l1.sum(), error, decibels.new_tensor(len(images))])
                if quantized.indices is not None:
                    counts += wins(quantized.indices.flatten(), len(counts))
                if self.distance:
                    self.distance.add(made, batch["index"])
        if self.guard.interrupted_anywhere():
            self.run.warn("a signal came: no validation here, it would take the time of the checkpoint")
            return {}
        decibels, l1, error, images = self.accelerator.reduce(sums, "sum").tolist()
        if not images:
            self.run.warn("no image of the test split that is measured on decodes")
            return {}
        values = {"psnr": decibels / images, "l1": l1 / images, "quantization_error": error / images}
        if self.quantizer.has_codes:
            values |= usage(self.accelerator.reduce(counts, "sum"))
        if self.distance:
            values |= self.distance.value()
        return {f"val_{name}": value for name, value in values.items()}

    @torch.no_grad()
    def draw(self) -> None:
        """Fixed test images above their reconstructions."""
        images = self.probe.images[:PICTURE_IMAGES]
        output, _ = self._reconstruct(images)
        self.run.save_picture(torch.cat([images, output.float()]), per_row=len(images))

    def keep(self) -> None:
        every = self.config.export_every
        if every is not None and self.run.step % every == 0:
            name = f"tokenizers/step-{self.run.step}"
            with surviving(name):
                self._save(self.config.out / name)

    def export(self) -> None:
        """<out>/tokenizer, with averaged weights."""
        self._save(self.config.out / "tokenizer")
        self.accelerator.print(f"tokenizer: {self.config.out / 'tokenizer'}")

    @_EAGER
    def _save(self, folder: Path) -> None:
        config = self.config
        with self.averaged_weights():
            batches = eval_batches(config.data, "train", limit=config.validation.statistics_images, **self.loading)
            images = (batch["image"] for batch in batches)
            with self.accelerator.autocast():
                mean, std = latent_statistics(self.live_encoder, images, self.accelerator)
            if not self.accelerator.is_main_process:
                return
            model = to_vqmodel(config.model, config.data.image_size, self.live_encoder, self.live_decoder, mean, std)
        trained = {"nsvq": code_version(), "step": self.run.step, "samples_seen": self.run.samples_seen}
        about = {"config": configs.to_dict(config), "data": self.images.fingerprint, "classes": self.images.classes}
        folder.parent.mkdir(exist_ok=True)
        save(model, folder, trained | about)

    @_EAGER
    def _reconstruct(self, images: Tensor) -> tuple:
        self.live_decoder.eval()
        with self.accelerator.autocast():
            output = self.live_decoder(self.live_encoder(images))
        self.live_decoder.train()
        return output

    def _averages_of(self, table: Tensor) -> list[Tensor]:
        return [average for average, parameter in self._averages() if parameter is table]

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        """(average, parameter) of each; none before the first step."""
        return list(zip(self.ema.shadow_params, self.averaged, strict=True)) if self.ema else []

    @_EAGER
    @torch.no_grad()
    def _first_latents(self, count: int) -> Tensor:
        """`count` encoder outputs [count, d], drawn from the first images of the run; the same for any number of
        ranks."""
        found, images = [], 0
        for batch in self.batches(0):
            z = self.micro_step.encoder(batch["image"].to(self.device)).float()
            found.append(self.accelerator.gather(z))  # in order of position
            images += len(found[-1])
            needed = math.ceil(2 * count / z[0, 0].numel())
            if images >= needed:
                break
        latents = torch.cat(found)[:needed].permute(0, 2, 3, 1).flatten(0, 2)  # (N, d)
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:count]
        return latents[chosen.to(latents.device)]

    @_EAGER
    @torch.no_grad()
    def _training_latents(self, images: int) -> list[Tensor]:
        """Encoder outputs [n, d] float32 of this rank's part of training images, a batch each."""
        with self.accelerator.autocast():
            batches = eval_batches(self.config.data, "train", limit=images, **self.loading)
            z = [self.live_encoder(batch["image"].to(self.device)).float() for batch in batches]
        return [part.permute(0, 2, 3, 1).flatten(0, 2) for part in z]

    @_EAGER
    @torch.no_grad()
    def _averaged_latents(self, count: int) -> Tensor:
        """At least `count` outputs over all ranks of the averaged encoder, this rank's part [n, d]."""
        with self.averaged_weights():
            tokens = self.live_encoder(self.probe.images[:1])[0, 0].numel()
            return torch.cat(self._training_latents(math.ceil(count / tokens)))
