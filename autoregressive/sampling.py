"""Sampling from a model of codes: as a function, and as the pipeline class that travels with the model.

This file needs torch, diffusers and transformers alone: pipelines/export.py ships it, so that
DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) runs it where this project is not installed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, VQModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GuidanceSchedule = Literal["constant", "linear", "cosine"]
_DECODED_AT_ONCE = 8  # images


def guidance_scales(scale: float, schedule: GuidanceSchedule, tokens: int, power: float = 1.0) -> list[float]:
    """The scale of each token: `scale`, or a rise from 1 to it, linear or by half a cosine, in (i / (N - 1))^`power`.

    RAR (arXiv 2411.00776) has the cosine, with powers of 1.2 to 2.75 and i / N: `scale` itself is never quite reached.
    """
    rise = [(i / max(1, tokens - 1)) ** power for i in range(tokens)]
    if schedule == "cosine":
        rise = [(1 - math.cos(math.pi * r)) / 2 for r in rise]
    return [scale if schedule == "constant" else 1 + (scale - 1) * r for r in rise]


def check_rise(schedule: str, power: float) -> None:
    """Raises `ValueError` where `guidance_scales` would know no such schedule, or its power would mean nothing."""
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"guidance_schedule must be constant, linear or cosine, not {schedule!r}")
    if not 0 < power < math.inf or (power != 1 and schedule == "constant"):
        raise ValueError("guidance_power must be above 0, and 1 unless guidance_schedule is linear or cosine")


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    codes: int,
    ids: Tensor,
    uniforms: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_schedule: GuidanceSchedule = "constant",
    guidance_power: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Tokens [B, N], below K = `codes`, of the ids K + class [B] on the model's device.

    uniforms [B, N] in [0, 1) decide each token, so that an image depends on its own alone, but for float error.
    guidance_scale: null + scale (class - null) of logits, both in one batch; 1 is without guidance, 0 unconditional.
    guidance_schedule, guidance_power: how the scale rises, as of `guidance_scales`.
    temperature: 0 takes the likeliest token. top_k, top_p: as of `generate`; 0 and 1 are all tokens.
    on_token(i, tokens [B, i + 1]) is called after each.
    After `model.compile()` the cache is static, so that one graph serves all tokens.
    """
    count, tokens = uniforms.shape
    scales = guidance_scales(guidance_scale, guidance_schedule, tokens, guidance_power)
    guided = any(scale != 1 for scale in scales)
    rows = torch.cat([ids, torch.full_like(ids, model.config.vocab_size - 1)]) if guided else ids
    warpers = [TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    cache = _StaticCache(config=model.config, max_cache_len=tokens) if compiled else None
    found, last = ids.new_empty(count, tokens), rows[:, None]
    for i in range(tokens):
        with torch.compiler.set_stance("force_eager") if compiled and not i else nullcontext():  # it makes the cache
            output = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1, :codes].float()
        if guided:
            main, base = logits.chunk(2)
            logits = base + scales[i] * (main - base)
        for warper in warpers:
            logits = warper(None, logits)
        found[:, i] = _draw(logits, uniforms[:, i]) if temperature else logits.argmax(1)
        last = found[:, i : i + 1].repeat(2 if guided else 1, 1)
        if on_token is not None:
            on_token(i, found[:, : i + 1])
    return found


class _StaticCache(StaticCache):
    """Under autocast rotary positions leave float32 keys beside values of half the size; it holds both in one type."""

    def update(self, keys: Tensor, values: Tensor, *arguments, **options) -> tuple[Tensor, Tensor]:
        return super().update(keys.to(values.dtype), values, *arguments, **options)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The inverse of the distribution function at `uniforms` [B]; float64, since float32 loses rare codes in sums."""
    sums = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(sums, uniforms.to(sums)[:, None] * sums[:, -1:], right=True)[:, 0]


def as_list(values) -> list:
    """One label or seed, or a list, tuple, range, tensor or array of them, as a list of Python's own.

    Raises `ValueError` where they are in rows.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    found = [one.item() if hasattr(one, "item") else one for one in (values if _is_many(values) else [values])]
    if any(_is_many(one) for one in found):
        raise ValueError("labels and seeds are one list, not a list of lists")
    return found


def _is_many(values) -> bool:
    return isinstance(values, list | tuple | range)


def generators_of(seeds) -> list[torch.Generator]:
    """One an image, of seeds as `as_list` takes them. Raises `ValueError` where one is no whole number."""
    seeds = as_list(seeds)
    if wrong := [seed for seed in seeds if not isinstance(seed, int) or isinstance(seed, bool)]:
        raise ValueError(f"seeds must be whole numbers, not {wrong[0]!r}")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class TokenPipeline(DiffusionPipeline):
    """Images of classes, by their ids 0 to C - 1 or their names, from a Llama over the codes of a `VQModel`."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: LlamaForCausalLM, vae: VQModel, id2label: dict | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.null_class = transformer.config.vocab_size - vae.config.num_vq_embeddings - 1
        self.side = math.isqrt(transformer.generation_config.max_new_tokens)  # of the square of tokens
        self.id2label = {i: str(i) for i in range(self.null_class)} | {int(i): n for i, n in (id2label or {}).items()}
        self.register_to_config(id2label={str(i): name for i, name in self.id2label.items()})  # for from_pipe

    def class_ids(self, class_labels: int | str | Sequence[int | str | None] | Tensor | None) -> list[int]:
        """Ids of classes given by id, by whole name or by one of a name's comma-separated synonyms; None is "no class".

        Raises `ValueError` where there is no such class, or several.
        """
        whole: dict[str, list[int]] = {}
        words: dict[str, list[int]] = {}
        for i, name in self.id2label.items():
            whole.setdefault(name.strip().lower(), []).append(i)
            for word in name.lower().split(","):
                words.setdefault(word.strip(), []).append(i)

        def ids_of(label: int | str | None) -> list[int]:
            if isinstance(label, str):
                return whole.get(label.strip().lower()) or words.get(label.strip().lower(), [])
            return [self.null_class] if label is None else [i for i in self.id2label if i == label]

        found = {label: ids_of(label) for label in as_list(class_labels)}
        if unknown := [label for label, ids in found.items() if len(ids) != 1]:
            raise ValueError(f"{unknown} is no class, or several; give an id of {self.id2label}")
        return [found[label][0] for label in as_list(class_labels)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | Tensor | None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images of the given classes, one each; `sample` says what guidance, temperature, top_k and top_p are.

        class_labels: ids or names, as a list, range, tensor or array; None is "no class".
        seeds: one an image, in the same forms, which alone decides it, whatever the others and `batch_size` are.
        generator: one for all images, or one an image, as in stock pipelines; instead of seeds.
        batch_size: images to sample at once; null is all of them.
        output_type: "pil", "np" [N, H, W, 3] or "pt" [N, 3, H, W] in [0, 1], or "latent": codes [N, h, w].
        callback_on_step_end(pipeline, i, i, {"tokens": tokens [B, i + 1]}) is called after token i of every batch.

        Raises `ValueError` where a class does not exist or an argument has no meaning.
        """
        ids = self.class_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", not {output_type!r}')
        check_rise(guidance_schedule, guidance_power)
        if not 0 <= guidance_scale < math.inf or not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("guidance_scale, temperature and top_k must be 0 or more, and top_p above 0 and at most 1")
        if batch_size is not None and batch_size < 1:
            raise ValueError("batch_size must be 1 or more")
        if seeds is not None:
            if generator is not None:
                raise ValueError("give seeds or a generator, not both")
            generator = generators_of(seeds)
        if isinstance(generator, list) and len(generator) != len(ids):
            raise ValueError(f"{len(ids)} images need {len(ids)} seeds or generators, not {len(generator)}")

        device, codes = self._execution_device, self.vae.config.num_vq_embeddings
        each = generator if isinstance(generator, list) else [generator] * len(ids)
        uniforms = torch.stack([draw_uniforms(self.side**2, one) for one in each]).to(device)
        classes = torch.tensor(ids, device=device) + codes
        starts, size = range(0, len(ids), batch_size or len(ids)), batch_size or len(ids)
        done = []
        with self.progress_bar(total=len(starts) * self.side**2) as bar:

            def on_token(i: int, tokens: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, i, i, {"tokens": tokens})

            for start in starts:
                part = slice(start, start + size)
                done.append(
                    sample(
                        self.transformer,
                        codes,
                        classes[part],
                        uniforms[part],
                        guidance_scale=guidance_scale if self.null_class else 1.0,  # no class, nothing to guide from
                        guidance_schedule=guidance_schedule,
                        guidance_power=guidance_power,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        on_token=on_token,
                    )
                )
        images = torch.cat(done).unflatten(1, (self.side, self.side))
        if output_type != "latent":
            images = self.decode(images)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()  # (N, H, W, 3)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, h, w] -> images [N, 3, H, W] in [0, 1], a few at a time."""
        return torch.cat([(_decoded(self.vae, part) / 2 + 0.5).clamp(0, 1) for part in codes.split(_DECODED_AT_ONCE)])


@apply_forward_hook  # the table, too, is needed on the device, where weights are offloaded
def _decoded(vae: VQModel, codes: Tensor) -> Tensor:
    shape = (*codes.shape, vae.config.vq_embed_dim or vae.config.latent_channels)
    if vae.config.get("lookup_from_codebook"):  # as aMUSEd's, which looks the codes up itself
        return vae.decode(codes, force_not_quantize=True, shape=shape).sample
    z_q = vae.quantize.get_codebook_entry(codes.flatten(), shape)  # (B, d, h, w)
    return vae.decode(z_q, force_not_quantize=True).sample


def draw_uniforms(tokens: int, generator: torch.Generator | None) -> Tensor:
    """One image's numbers [N], float64 in [0, 1)."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(tokens, generator=generator, device=device, dtype=torch.float64).cpu()
