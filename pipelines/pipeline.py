"""Sampling, with classes or without, from a stock pipeline folder, with what the stock class lacks.

pipeline = ClassConditionalPipeline.from_pretrained("runs/dit-b/pipeline").to("cuda")
images = pipeline(["golden retriever", 207], guidance_scale=2.0, seeds=[0, 1]).images
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, ImagePipelineOutput, ModelMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from nsvq.autoregressive.sampling import generators_of
from nsvq.diffusion.cpu_attention import use_cpu_attention
from nsvq.diffusion.dit import PipelineDiT
from nsvq.diffusion.samplers import make_sampler, same_process, sample, set_steps
from nsvq.files import state_hash
from nsvq.pipelines.autoregressive import CLASS_NAME, AutoregressivePipeline
from nsvq.pipelines.class_names import ClassNames
from nsvq.pipelines.export import STOCK_NULL_CLASS, from_stock, label_table, save_pipeline, stock_label, to_stock
from nsvq.pipelines.folders import InstalledCode, local_folder, read_index, read_ldm, refuse_options

_DISTANCES = 2**27  # elements of the table of distances that the stock quantizer makes: 512 MiB
_DECODED_AT_ONCE = 8  # images, by a VAE without a codebook


class ClassConditionalPipeline(InstalledCode, ClassNames, DiTPipeline):
    """Loads and saves the folders of the stock `DiTPipeline`, and of `LDMPipeline`, whose models have no classes.

    The constructor takes {label of the stock pipeline: name}, as model_index.json holds it; attribute `id2label` is
    {class id: name}, which differs from class 1000 on (see `export.stock_label`). Names are numbers where none are
    given."""

    def __init__(self, transformer, vae, scheduler, id2label: dict[int, str] | dict[str, str] | None = None):
        super().__init__(transformer, vae, scheduler, id2label)
        names = {int(label) - (int(label) > STOCK_NULL_CLASS): name for label, name in (id2label or {}).items()}
        self.id2label = names or {i: str(i) for i in range(_trained_classes(transformer))}
        self.null_class = max(STOCK_NULL_CLASS, max(self.id2label, default=0) + 1)
        self.register_to_config(id2label={str(stock_label(i)): name for i, name in self.id2label.items()})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options
    ) -> "ClassConditionalPipeline | AutoregressivePipeline":
        """As diffusers' own; also from folders that ship code, which is not run: they are read with this project's. A
        stock DiT of ours becomes our faster class, but one that is passed, or placed by a `device_map`, stays; a folder
        of an autoregressive model gives its own class."""
        index = read_index(pretrained_model_name_or_path, options)
        if index["_class_name"] == CLASS_NAME:
            return AutoregressivePipeline.from_pretrained(pretrained_model_name_or_path, **options)
        folder = local_folder(pretrained_model_name_or_path, index, options)
        if index["_class_name"] == "LDMPipeline":
            return cls.from_pipe(read_ldm(folder, options))
        pipeline = super().from_pretrained(folder, **options)
        kept = options.get("transformer") is not None or options.get("device_map") is not None
        if isinstance(pipeline.transformer, DiTTransformer2DModel) and not kept:
            with contextlib.suppress(ValueError):  # of another architecture, it stays
                pipeline.transformer = from_stock(pipeline.transformer)
        return pipeline

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, **ignored
    ) -> None:
        """Write a folder of the stock class, class names included; `push_to_hub` uploads the same. The weights of a
        `variant` are written beside those that are there."""
        refuse_options(ignored, safe_serialization)
        network = to_stock(self.transformer) if isinstance(self.transformer, PipelineDiT) else self.transformer
        save_pipeline(Path(save_directory), network, self.vae, self.scheduler, self.id2label, variant=variant)

    def load_guide(self, folder: str | Path) -> ModelMixin:
        """The transformer of another pipeline, where this one's is, for autoguidance. Raises `ValueError` where it
        knows other classes, or predicts something else or of other latents."""
        other = type(self).from_pretrained(folder)
        if other.id2label != self.id2label:
            raise ValueError(f"the guide {folder} has other classes than this pipeline: take one of the same data")
        _check_guide(other.transformer, self.transformer)
        trained = f"the guide {folder} was trained on another"
        if not same_process(other.scheduler, self.scheduler):
            raise ValueError(f"{trained} objective or noise schedule than this pipeline")
        if state_hash(other.vae) != state_hash(self.vae):
            raise ValueError(f"{trained} tokenizer than this pipeline")
        return other.transformer.to(self._execution_device, self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | Tensor | None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        sampler: str | None = None,
        guide: ModelMixin | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images of the given classes, one each.

        class_labels: ids or names, as a list, range, tensor or array; None is "no class".
        guidance_scale: null + scale (class - null) of predictions, on all channels; 1 is without guidance, 0
            unconditional.
        guidance_interval: (low, high) in t / 1000, 0 to 1, which is sigma of a rectified flow; outside of it only the
            class is evaluated.
        sampler: one of `diffusion.samplers.Sampler` that fits the model; null is the folder's own scheduler.
        guide: transformer of a smaller or earlier model of the same latents and classes, for autoguidance: guide +
            scale (transformer - guide), both of the class.
        seeds: one an image, in the same forms. It alone decides the image's noise, so that an image does not depend on
            the others, on their number or on `batch_size`, but for float error.
        generator: one for all images, or one an image, as in stock pipelines; instead of seeds.
        latents: the noise to start from [N, C, h, w], as in stock pipelines; what a sampler draws on the way comes
            from seeds or generator still.
        batch_size: images to sample at once; null is all of them.
        output_type: "pil", "np" [N, H, W, 3] or "pt" [N, 3, H, W] in [0, 1], or "latent" [N, C, h, w] before decoding.
        callback_on_step_end(pipeline, step, timestep, {"latents": latents}) is called after every step of every batch
            (Heun's method: every evaluation); a dict that it returns may hold other latents to go on with.

        Raises `ValueError` where a class does not exist or an argument has no meaning."""
        ids = self.class_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty")
        if not self.id2label and guide is None:
            guidance_scale = 1.0  # nothing to guide from
        low, high = guidance_interval
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", not {output_type!r}')
        if not math.isfinite(guidance_scale) or guidance_scale < 0:
            raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {(low, high)}")
        if guide is not None:
            _check_guide(guide, self.transformer)
        if num_inference_steps < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError("num_inference_steps and batch_size must be 1 or more")
        if seeds is not None:
            if generator is not None:
                raise ValueError("give seeds or a generator, not both")
            generator = generators_of(seeds)
        if isinstance(generator, list) and len(generator) != len(ids):
            raise ValueError(f"{len(ids)} images need {len(ids)} seeds or generators, not {len(generator)}")

        scheduler = self.scheduler if sampler is None else make_sampler(sampler, self.scheduler)
        evaluations = len(set_steps(scheduler, num_inference_steps))

        config, device = self.transformer.config, self._execution_device
        shape = (len(ids), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")
        noise = latents.to(device, self.transformer.dtype)
        stock_labels = [STOCK_NULL_CLASS if i == self.null_class else stock_label(i) for i in ids]
        labels = torch.tensor(stock_labels, device=device, dtype=torch.int64)
        batches = [slice(i, i + (batch_size or len(ids))) for i in range(0, len(ids), batch_size or len(ids))]
        done = []
        with self.progress_bar(total=len(batches) * evaluations) as bar:

            def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                returned = callback_on_step_end(self, step, timestep, {"latents": latents})
                return (returned or {}).get("latents", latents)

            how = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "on_step": on_step}
            how |= {"steps": num_inference_steps, "guide": None if guide is None else _predictor(guide)}
            predictor = _predictor(self.transformer)
            for part in batches:
                how["generator"] = generator[part] if isinstance(generator, list) else generator
                latents = sample(predictor, scheduler, noise[part], labels[part], STOCK_NULL_CLASS, **how)
                done.append(latents if output_type == "latent" else self.decode(latents))
        images = torch.cat(done)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()  # (N, H, W, 3)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> images [N, 3, H, W] in [0, 1], a few at a time: the quantizer's table of distances
        has N h w x K elements."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        codes = self.vae.config.get("num_vq_embeddings")
        at_once = _DISTANCES // (latents.shape[2] * latents.shape[3] * codes) if codes else _DECODED_AT_ONCE
        parts = latents.split(max(1, at_once))
        return torch.cat([(self.vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in parts])


def _predictor(transformer: ModelMixin) -> Callable:
    """The transformer as `sample` calls it."""
    use_cpu_attention(transformer)
    without_classes = isinstance(transformer, UNet2DModel) and transformer.class_embedding is None

    def predict(latents: Tensor, time: Tensor, labels: Tensor, **known) -> Tensor:
        return transformer(latents, timestep=time, class_labels=None if without_classes else labels, **known).sample

    # Where weights are offloaded, only the forward pass brings them to the device.
    if isinstance(transformer, PipelineDiT) and not hasattr(transformer, "_hf_hook"):
        predict.condition = transformer.condition  # type: ignore[attr-defined]
    return predict


def _check_guide(guide: ModelMixin, transformer: ModelMixin) -> None:
    """Raises `ValueError` where the guide is of other latents."""
    shapes = [(model.config.in_channels, model.config.sample_size) for model in (guide, transformer)]
    if shapes[0] != shapes[1]:
        theirs, ours = (f"{channels} x {side} x {side}" for channels, side in shapes)
        raise ValueError(f"the guide is a model of {theirs} latents, not {ours}: take one of the same tokenizer")


def _trained_classes(transformer: ModelMixin) -> int:
    """How many classes a model has whose folder has lost their names: unused rows repeat the null row."""
    if isinstance(transformer, UNet2DModel):
        if transformer.class_embedding is None:
            return 0
        table = transformer.class_embedding.weight
    elif isinstance(transformer, PipelineDiT):
        table = label_table(transformer.class_embed.weight)
    else:
        table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    used = (table != table[STOCK_NULL_CLASS]).any(1).nonzero()
    last = int(used.max()) if len(used) else -1
    return last + 1 - (last > STOCK_NULL_CLASS)
