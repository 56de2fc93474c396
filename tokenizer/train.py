"""Train an image tokenizer with NSVQ's three phases, or any other quantizer under the same trainer.

accelerate launch tokenizer/train.py                                                # NSVQ on ImageNet-128
accelerate launch tokenizer/train.py --config configs/imagenet128/simvq.yaml --out runs/simvq --run.batch_size 256
accelerate launch --num_processes 4 --mixed_precision bf16 tokenizer/train.py --config FILE
The same command goes on from the newest checkpoint; the finished tokenizer is in <out>/tokenizer.
"""

import math
import sys
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch.nn.utils import clip_grad_norm_

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.guard import Guard
from nsvq.common.image_metrics import psnr, to_uint8
from nsvq.common.metrics import Means, show
from nsvq.common.run import Run, averaged_weights, code_version, make_accelerator, micro_batch_size, progress_bar
from nsvq.data.bad_images import BadImages
from nsvq.data.batches import eval_batches, train_batches
from nsvq.data.sources import open_split
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.discriminator import PatchDiscriminator
from nsvq.tokenizer.export import latent_statistics, save, to_vqmodel
from nsvq.tokenizer.health import DriftProbe, EpochUsage, alarms, near_duplicates, usage
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.losses import Temperature, discriminator_hinge, generator_adversarial, load_lpips, phase_weights
from nsvq.tokenizer.model import QuantizedDecoder, make_encoder
from nsvq.tokenizer.quantizers import make_quantizer
from nsvq.tokenizer.replacement import replace_dead_codes, write_rows
from nsvq.tokenizer.schedule import Schedule

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "nsvq.yaml"


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    accelerator = make_accelerator(config.run, config.out)
    micro_batch = micro_batch_size(config.run, accelerator)
    device, loss_config = accelerator.device, config.loss

    # Data
    with accelerator.main_process_first():
        train_split, _ = open_split(config.data, "train"), open_split(config.data, "test")
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loading = {"batch_size": micro_batch, "workers": config.run.workers, **ranks}
    epoch_samples = config.schedule.epoch_samples
    if epoch_samples is None:
        epoch_samples = len(train_split)
    bad_images = BadImages(config.data.max_bad_fraction, accelerator)

    # Networks
    quantizer = make_quantizer(config.quantizer, config.model.latent_channels)
    quantizer.nonstationary_weight = loss_config.nonstationary_weight
    encoder, decoder = make_encoder(config.model), QuantizedDecoder(config.model, quantizer)
    discriminator = PatchDiscriminator(loss_config.discriminator_channels, loss_config.discriminator_layers)
    lpips = None
    if loss_config.perceptual != "none":
        with accelerator.main_process_first():
            lpips = load_lpips(loss_config.perceptual, loss_config.perceptual_weights).to(device)

    # Optimizers. The codebook has a group of its own: see optim.codebook_eps.
    optim = config.optim
    groups = [
        {"params": list(encoder.parameters()), "lr": optim.encoder_lr or optim.lr},
        {"params": list(decoder.decoder.parameters()), "lr": optim.lr},
        {"params": list(quantizer.parameters()), "lr": optim.codebook_lr or optim.lr, "eps": optim.codebook_eps},
    ]
    generator_optimizer = torch.optim.Adam(groups, betas=optim.betas)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=optim.lr, betas=optim.betas)
    rates = [*(group["lr"] for group in groups), optim.lr]
    encoder, decoder, discriminator, generator_optimizer, discriminator_optimizer = accelerator.prepare(
        encoder, decoder, discriminator, generator_optimizer, discriminator_optimizer
    )
    live_encoder, live_decoder = accelerator.unwrap_model(encoder), accelerator.unwrap_model(decoder)
    live_discriminator = accelerator.unwrap_model(discriminator)
    quantizer = live_decoder.quantizer
    parameters = [*live_encoder.parameters(), *live_decoder.parameters()]
    ema = EMAModel(parameters, decay=optim.ema_decay)

    # State
    modules = {"encoder": encoder, "decoder": decoder, "discriminator": discriminator}
    optimizers = {"generator": generator_optimizer, "discriminator": discriminator_optimizer}
    run = Run(accelerator, config, config.out, "tokenizer", modules, optimizers)
    guard, means = Guard(accelerator), Means(accelerator)
    schedule = Schedule(config.schedule, epoch_samples)
    epoch_usage = EpochUsage(quantizer.codebook_size, accelerator)
    fixed_images = next(iter(eval_batches(config.data, "test", batch_size=config.validation.probe_images)))["image"]
    probe = DriftProbe(fixed_images.to(device))
    temperature = Temperature(loss_config, quantizer.dim)
    stateful = {"schedule": schedule, "epoch_usage": epoch_usage, "probe": probe, "ema": ema, "guard": guard,
                "means": means, "bad_images": bad_images, "temperature": temperature}  # fmt: skip

    def freeze_encoder() -> None:
        """No gradients from here on: None, not zero, or Adam's momentum would go on moving the encoder. Its average
        becomes a copy of it, since codebook and decoder are fitted to the encoder that trained."""
        live_encoder.requires_grad_(False).eval()
        live_encoder.zero_grad(set_to_none=True)
        for average, parameter in zip(ema.shadow_params, parameters, strict=True):
            if not parameter.requires_grad:
                average.copy_(parameter)

    state = run.load()
    if state is not None:
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        ema.to(device)
        if schedule.phase != "stage1":
            freeze_encoder()

    def states() -> dict:
        return {name: part.state_dict() for name, part in stateful.items()}

    def reconstruct(images: torch.Tensor) -> tuple:
        live_decoder.eval()
        with accelerator.autocast():
            output = live_decoder(live_encoder(images))
        live_decoder.train()
        return output

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """PSNR (per image, 8-bit), L1, quantization error and usage on the test split, with EMA weights."""
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        counts = torch.zeros(quantizer.codebook_size, dtype=torch.int64, device=device)
        with averaged_weights(ema, parameters):
            for batch in eval_batches(config.data, "test", limit=config.validation.images, **loading):
                images = batch["image"].to(device)
                output, quantized = reconstruct(images)
                decibels = psnr(to_uint8(output), to_uint8(images))
                l1 = (output.float().clamp(-1, 1) - images).abs().double().flatten(1).mean(1)
                error = quantized.losses["commitment"].double() * len(images)
                sums += torch.stack([decibels.sum(), l1.sum(), error, decibels.new_tensor(len(images))])
                if quantized.indices is not None:
                    counts += torch.bincount(quantized.indices.flatten(), minlength=len(counts))
        decibels, l1, error, images = accelerator.reduce(sums, "sum").tolist()
        values = {"psnr": decibels / images, "l1": l1 / images, "quantization_error": error / images}
        used = usage(accelerator.reduce(counts, "sum")) if quantizer.has_codes else {}
        return {f"val_{k}": v for k, v in (values | used).items()}

    @torch.no_grad()
    def draw() -> None:
        """Fixed test images above their reconstructions, with EMA weights."""
        images = probe.images[:8]
        with averaged_weights(ema, parameters):
            output, _ = reconstruct(images)
        run.save_picture(torch.cat([images, output.float()]), per_row=len(images))

    @torch.no_grad()
    def training_latents(images: int) -> list[torch.Tensor]:
        """Encoder outputs [n, d] float32 of this rank's part of training images, a batch each."""
        with accelerator.autocast():
            batches = eval_batches(config.data, "train", limit=images, **loading)
            z = [live_encoder(batch["image"].to(device)).float() for batch in batches]
        return [part.permute(0, 2, 3, 1).flatten(0, 2) for part in z]

    def fit_codes() -> None:
        """Codes for a method that trains without, from what the averaged encoder makes of training images."""
        if count := quantizer.final_latents():
            with averaged_weights(ema, parameters):
                tokens = live_encoder(probe.images[:1])[0, 0].numel()
                latents = training_latents(math.ceil(count / tokens))
            quantizer.fit(torch.cat(latents))

    def averages_of(table: torch.Tensor) -> list[torch.Tensor]:
        return [a for a, parameter in zip(ema.shadow_params, parameters, strict=True) if parameter is table]

    def consolidate() -> None:
        """k-means on the frozen encoder's latents, from the codes that training found."""
        if not config.schedule.consolidate:
            return
        table, latents = quantizer.table(), training_latents(config.schedule.consolidate_images)
        fitted = kmeans(lambda: latents, len(table), seed=config.run.seed, start=table.detach(),
                        iterations=config.schedule.consolidate)  # fmt: skip
        rows = torch.arange(len(table), device=device)
        write_rows(table, rows, fitted, averages=averages_of(table), optimizer=generator_optimizer.optimizer)
        quantizer.rows_written(rows)

    def end_epoch() -> dict[str, float]:
        """Usage of the epoch, the schedule's decision, replacement: all of it from numbers summed over ranks."""
        counts, errors, commitment = epoch_usage.total()
        values = {"epoch_commitment": commitment, "replaced_codes": 0}
        values |= usage(counts) if quantizer.has_codes else {}
        before = schedule.phase
        if schedule.end_epoch(commitment):
            freeze_encoder()
            if before == "stage1":
                consolidate()
        elif schedule.replaces_codes():
            dead = replace_dead_codes(
                quantizer.table(), counts, weights=errors if config.schedule.replace_from == "error" else None,
                noise=config.schedule.replace_noise, seed=config.run.seed + schedule.epoch,
                averages=averages_of(quantizer.table()),
                optimizer=generator_optimizer.optimizer if config.schedule.replace_resets_adam else None,
            )  # fmt: skip
            quantizer.rows_written(dead)
            values["replaced_codes"] = len(dead)
        epoch_usage.reset()
        quantizer.end_epoch()
        if quantizer.learns_codes:
            values["near_duplicates"] = near_duplicates(quantizer.codebook())
        return values

    if run.step == 0:
        if count := quantizer.initial_latents():
            start = train_batches(config.data, seed=config.run.seed, start=0, **loading)
            quantizer.initialize(_first_latents(encoder, start, count, accelerator))
            ema = EMAModel(parameters, decay=optim.ema_decay)
            stateful["ema"] = ema
        ema.to(device)

    total_steps = math.ceil(schedule.total_samples / config.run.batch_size)
    batches = iter(train_batches(config.data, seed=config.run.seed, start=run.samples_seen, **loading))
    bar = progress_bar(accelerator, total_steps, run.step)
    for _ in guard.until(lambda: run.step == total_steps):
        phase, frozen = schedule.phase, schedule.phase != "stage1"
        quantizer.revives = schedule.revives_codes()
        weights = phase_weights(loss_config, phase, schedule.adversarial_factor(run.samples_seen), quantizer)
        if run.samples_seen < config.schedule.adversarial_after * epoch_samples:
            weights.pop("adversarial", None)
        factor = optim.lr_factor(run.samples_seen / schedule.total_samples, config.schedule.epochs)
        groups = [*generator_optimizer.param_groups, *discriminator_optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        tau = temperature.value() if "nonstationary" in weights else None
        if tau is None:
            weights.pop("nonstationary", None)
        micro_batches, results = [], []
        for number in range(config.run.accumulation):
            batch = next(batches)
            micro_batches.append(batch)
            bad_images.update(batch)
            run.seed_micro_batch(number, micro_batch)
            images = batch["image"].to(device, non_blocking=True)
            with accelerator.accumulate(encoder, decoder, discriminator), run.counting_flops(phase, micro_batch):
                with torch.set_grad_enabled(not frozen):
                    z = encoder(images)
                output, quantized = decoder(z, tau)
                terms = {"l1": (output - images).abs().mean(), **quantized.losses}
                if loss_config.pixel == "mse":
                    terms["mse"] = (output - images).square().mean()
                if "perceptual" in weights:
                    terms["perceptual"] = lpips(output, images).mean()
                if "adversarial" in weights:
                    live_discriminator.requires_grad_(False)
                    with accelerator.autocast():
                        terms["adversarial"] = generator_adversarial(live_discriminator(output).float())
                    live_discriminator.requires_grad_(True)
                terms["loss"] = sum(weight * terms[name] for name, weight in weights.items())
                accelerator.backward(terms["loss"])
                if "adversarial" in weights:
                    real, fake = discriminator(torch.cat([images, output.detach()])).float().chunk(2)
                    terms["discriminator"] = discriminator_hinge(real, fake)
                    terms |= {"real_logits": real.mean(), "fake_logits": fake.mean()}
                    accelerator.backward(terms["discriminator"])
            terms = {name: value.detach() for name, value in (terms | quantized.stats).items()}
            errors = None
            if config.schedule.replace_from == "error":
                errors = (z.detach().float() - quantized.z_q.detach()).square().sum(1)  # (B, h, w)
            results.append((terms, quantized.indices, errors))
        accelerator.unscale_gradients()
        norms = {"grad_norm": clip_grad_norm_(parameters, optim.clip_grad_norm or math.inf)}
        stepping = [generator_optimizer]
        if "adversarial" in weights:
            norms["discriminator_grad_norm"] = clip_grad_norm_(live_discriminator.parameters(), math.inf)
            stepping.append(discriminator_optimizer)
        stepped = guard.step(stepping, [*(terms["loss"] for terms, *_ in results), *norms.values()])
        quantizer.end_step(stepped)
        if stepped:
            ema.step(parameters)
            share = micro_batch * config.run.accumulation
            for name, value in norms.items():
                means.add(name, share * value, share)
            if loss_config.temperature_relative:
                commitment = torch.stack([terms["commitment"] for terms, *_ in results]).mean()
                temperature.update(accelerator.reduce(commitment, "mean").item())
            for terms, indices, errors in results:
                epoch_usage.update(indices, errors, terms["commitment"], micro_batch)
                for name, value in terms.items():
                    means.add(name, micro_batch * value, micro_batch)
        run.step += 1
        run.samples_seen += config.run.batch_size
        bar.update()
        if guard.in_a_row >= config.run.skip_limit:
            run.give_up(states(), micro_batches, guard.in_a_row)

        values, last = {}, run.step == total_steps
        if run.step % config.run.log_every == 0 or last:
            values |= means.take()
            if accelerator.is_main_process:
                with accelerator.autocast():
                    values |= probe.measure(live_encoder, quantizer, temperature.value() or loss_config.temperature)
            values |= {"adversarial_weight": weights.get("adversarial", 0.0), "bad_images": bad_images.check(),
                       "skipped_steps": guard.skipped}  # fmt: skip
        if schedule.epoch_ended(run.samples_seen):
            values |= end_epoch()
            if schedule.epoch % config.validation.every == 0 and not last:
                values |= validate()
        if last:
            fit_codes()
            values |= validate()
        if values:
            bad = {"bad_image_ids": ids} if (ids := bad_images.news()) else {}
            values = run.log(values, phase=phase, epoch=schedule.epoch, **bad)
            show(bar, values, ("l1", "commitment", "utilization", "val_psnr"), phase=phase)
            for alarm in alarms(values, quantizer.codebook_size):
                run.warn(f"step {run.step}: {alarm}")
        if (run.step % config.run.sample_every == 0 or last) and accelerator.is_main_process:
            draw()
        if run.checkpoint_due() or last or guard.stop:
            run.save(states())
        if guard.stop:
            run.stop(guard.stop)
    bar.close()

    # Export, with EMA weights
    ema.copy_to(parameters)
    images = (batch["image"] for batch in eval_batches(config.data, "train",
              limit=config.validation.statistics_images, **loading))  # fmt: skip
    with accelerator.autocast():
        mean, std = latent_statistics(live_encoder, images, accelerator)
    if accelerator.is_main_process:
        model = to_vqmodel(
            config.model, config.data.image_size, live_encoder.cpu(), live_decoder.cpu(), mean.cpu(), std
        )
        about = {"nsvq": code_version(), "step": run.step, "samples_seen": run.samples_seen, "config":
                 configs.to_dict(config), "data": train_split.fingerprint, "classes": train_split.classes}  # fmt: skip
        save(model, config.out / "tokenizer", about)
        accelerator.print(f"tokenizer: {config.out / 'tokenizer'}")
    accelerator.end_training()


@torch.no_grad()
def _first_latents(encoder, batches, count: int, accelerator) -> torch.Tensor:
    """`count` encoder outputs [count, d], drawn from the first images of the run; the same for any number of ranks."""
    found, images = [], 0
    for batch in batches:
        found.append(accelerator.gather(encoder(batch["image"].to(accelerator.device)).float()))  # in order of position
        images += len(found[-1])
        needed = math.ceil(2 * count / found[-1][0, 0].numel())
        if images >= needed:
            break
    latents = torch.cat(found)[:needed].permute(0, 2, 3, 1).flatten(0, 2)  # (N, d)
    chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:count]
    return latents[chosen.to(latents.device)]


if __name__ == "__main__":
    launch.run(main)
