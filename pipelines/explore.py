"""What the tabs of the demo do, without its page: generation step by step, and images, codes and what is between them.

Images are float [.., 3, H, W] in [0, 1] on the CPU, unless a function says otherwise."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from nsvq.common.image_metrics import psnr, to_uint8
from nsvq.data.images import center_crop, to_rgb, to_tensor
from nsvq.pipelines.autoregressive import AutoregressivePipeline
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.health import usage
from nsvq.tokenizer.pretrained import Tokenizer

Pipeline = ClassConditionalPipeline | AutoregressivePipeline
_SHOWN = 384  # least width of a picture: a browser would blur a small one
_AT_ONCE = 8  # images that a tokenizer sees together


class _Left(Exception):
    """Nobody waits for the images any more."""


def generate(pipeline: Pipeline, labels: list, every: int = 0, **how) -> Iterator[tuple[int, Tensor]]:
    """(steps done, images [N, 3, H, W]) after every so many steps (0: none), and of the finished images at the end.

    `how` goes to the pipeline. A generator that is closed before its end stops the sampler at its next step. Raises
    what the pipeline does."""
    news: SimpleQueue = SimpleQueue()
    left, done = Event(), 0

    def on_step(pipeline: Pipeline, step: int, timestep: Tensor, state: dict) -> None:
        nonlocal done
        if left.is_set():
            raise _Left
        done = step + 1
        if every and done % every == 0:
            news.put((done, _preview(pipeline, state).float().cpu()))

    with ThreadPoolExecutor(1) as pool:
        how |= {"output_type": "pt", "callback_on_step_end": on_step}
        result = pool.submit(pipeline, labels, **how)
        result.add_done_callback(lambda _: news.put(None))
        try:
            yield from iter(news.get, None)
        finally:
            left.set()
        yield done, result.result().images.float().cpu()


def _preview(pipeline: Pipeline, state: dict) -> Tensor:
    """What the callback of a pipeline was given, decoded; grey where there are no tokens yet."""
    if "latents" in state:
        return pipeline.decode(state["latents"])
    side, known = pipeline.side, state["tokens"].shape[1]
    images = pipeline.decode(F.pad(state["tokens"], (0, side**2 - known)).unflatten(1, (side, side)))
    there = (torch.arange(side**2, device=images.device) < known).view(1, 1, side, side)
    return images.where(F.interpolate(there.float(), images.shape[2:]) > 0, 0.5)


def between_seeds(pipeline: ClassConditionalPipeline, label, seeds: tuple[int, int], count: int, **how) -> Tensor:
    """Images [count, 3, H, W] of one class, whose noise goes from that of one seed to that of another: cos(u) a +
    sin(u) b with u from 0 to pi / 2, which has the variance of a and b, as they are independent."""
    config = pipeline.transformer.config
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # as the pipeline makes them
    a, b = randn_tensor(shape, generator=generators, dtype=pipeline.transformer.dtype)
    angle = torch.linspace(0, math.pi / 2, count)[:, None, None, None]
    noise = angle.cos() * a + angle.sin() * b
    return pipeline([label] * count, latents=noise, output_type="pt", **how).images.float().cpu()


class Reconstruction(NamedTuple):
    original: Tensor  # [3, S, S]
    image: Tensor  # [3, S, S]
    codes: Tensor  # [h, w]
    psnr: float  # dB, of 8-bit images

    @property
    def difference(self) -> Tensor:
        """Four times the absolute difference, clipped: small errors would look black."""
        return (4 * (self.image - self.original).abs()).clamp(0, 1)


def fitted(tokenizer: Tokenizer, images: list[Image.Image]) -> Tensor:
    """ADM's centre crop at the tokenizer's size: [N, 3, S, S] in [-1, 1] on its device."""
    crops = [center_crop(to_rgb(image), tokenizer.image_size) for image in images]
    return to_tensor(crops).to(tokenizer.device)


def encode(tokenizer: Tokenizer, image: Image.Image) -> Tensor:
    """The codes [h, w] of an image of any size."""
    return tokenizer.encode(fitted(tokenizer, [image]))[0].cpu()


def decode(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes [.., h, w] -> images [.., 3, S, S]."""
    batch = codes.reshape(-1, *codes.shape[-2:]).to(tokenizer.device)
    images = torch.cat([tokenizer.decode(part) for part in batch.split(_AT_ONCE)])
    return (images / 2 + 0.5).clamp(0, 1).cpu().view(*codes.shape[:-2], *images.shape[1:])


def reconstruct(tokenizer: Tokenizer, image: Image.Image) -> Reconstruction:
    """An image of any size, and what its codes decode to."""
    original = fitted(tokenizer, [image]).cpu() / 2 + 0.5
    codes = encode(tokenizer, image)
    decoded = decode(tokenizer, codes[None])
    ratio = psnr(*(to_uint8(2 * images - 1) for images in (decoded, original))).item()
    return Reconstruction(original[0], decoded[0], codes, ratio)


def set_code(codes: Tensor, row: int, column: int, code: int) -> Tensor:
    """A copy of codes [h, w] with another code at a place. Raises `ValueError` where there is no such place."""
    height, width = codes.shape
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"there is no token at row {row}, column {column}: there are {height} rows, {width} columns")
    changed = codes.clone()
    changed[row, column] = code
    return changed


def swap_codes(codes: Tensor, one: int, other: int) -> Tensor:
    """A copy of codes [h, w] in which two codes have changed places, everywhere."""
    return torch.where(codes == one, other, torch.where(codes == other, one, codes))


def between_images(tokenizer: Tokenizer, one: Image.Image, other: Image.Image, count: int) -> Tensor:
    """Images [count, 3, S, S] whose latents lie on the line from one image's to the other's, quantized and decoded."""
    a, b = tokenizer.latents(fitted(tokenizer, [one, other])) / tokenizer.model.config.scaling_factor
    weight = torch.linspace(0, 1, count, device=a.device)[:, None, None, None]
    return decode(tokenizer, tokenizer.quantize((1 - weight) * a + weight * b))


class CodeUse(NamedTuple):
    codes: Tensor  # [U], the most used first
    counts: Tensor  # [U]
    patches: Tensor  # [U, 3, f, f]: the mean of the pixels that became the code

    @property
    def perplexity(self) -> float:
        return usage(self.counts)["perplexity"]


def code_use(tokenizer: Tokenizer, images: list[Image.Image]) -> CodeUse:
    """The codes that some images of any size use."""
    f = tokenizer.downsampling
    indices, patches = [], []
    for start in range(0, len(images), _AT_ONCE):
        batch = fitted(tokenizer, images[start : start + _AT_ONCE])
        indices.append(tokenizer.encode(batch).flatten().cpu())  # (B h w)
        patches.append(F.unfold(batch.cpu() / 2 + 0.5, f, stride=f).mT.flatten(0, 1))  # (B h w, 3 f f)
    codes, place, counts = torch.cat(indices).unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(codes), 3 * f * f).index_add_(0, place, torch.cat(patches))
    means = (sums / counts[:, None]).view(-1, 3, f, f)
    order = counts.argsort(descending=True, stable=True)
    return CodeUse(codes[order], counts[order], means[order])


def code_colors(codebook: Tensor) -> Tensor:
    """Colours [K, 3] of a codebook [K, d], by which near codes look alike: places along its first three principal
    components, counted in codes, so that all colours are used."""
    centred = (codebook - codebook.mean(0)).double().cpu()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]  # of the largest variance first
    ranks = (centred @ axes).argsort(0).argsort(0) / max(1, len(codebook) - 1)
    return F.pad(ranks.float(), (0, 3 - ranks.shape[1]), value=0.5)


def token_map(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes [h, w] in their colours [3, h, w]."""
    return code_colors(tokenizer.codebook)[codes].permute(2, 0, 1)


def picture(images: Tensor, columns: int = 1) -> Image.Image:
    """[3, H, W], or [N, 3, H, W] in rows of so many columns, enlarged by a whole factor."""
    if images.dim() == 4:
        images = make_grid(images, nrow=columns, padding=max(1, images.shape[3] // 32), pad_value=1.0)
    pixels = to_uint8(2 * images - 1).permute(1, 2, 0).numpy()  # (H, W, 3)
    image, factor = Image.fromarray(pixels), math.ceil(_SHOWN / images.shape[2])
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
