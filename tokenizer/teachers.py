"""Frozen networks that losses and codebooks ask about images: vision models of transformers, classifiers of
torchvision, and networks that a Python file registers with torch-fidelity, as `--features` of eval/ takes them.

A teacher takes images [B, 3, H, W] in [-1, 1] of any size. It is in eval mode, its parameters have no gradients, and it
is in no checkpoint. What it was is told by `nsvq.files.state_hash`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchvision import models
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection
from transformers.image_processing_base import ImageProcessingMixin

from nsvq.common.extractors import build_registered, register_file
from nsvq.errors import UsageError, UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSIFIERS = {"resnet50": models.resnet50, "convnext_small": models.convnext_small}
_SIDE = 224  # pixels, what networks for ImageNet's classes were trained for


def resized(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] -> [B, 3, size, size], bilinear and antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


class Teacher(nn.Module):
    """`network` in autocast to bfloat16, or without any autocast, whatever is around it; gives float32."""

    def __init__(self, network: nn.Module, precision: Literal["fp32", "bf16"] = "fp32"):
        super().__init__()
        self.network, self.bf16 = network.eval().requires_grad_(False), precision == "bf16"

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(images.float()).float()


class Normalized(nn.Module):
    """Images in [-1, 1] -> (pixels in [0, 1] - mean) / std, by channel. torchvision's function would look at the
    numbers, and the host wait for the GPU."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self.mean) / self.std


class Classifier(nn.Module):
    """Logits [B, C] of a classifier of torchvision's kind, at 224 pixels and with ImageNet's normalisation."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.normalize = network, Normalized(IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(resized(images, _SIDE)))


class VisionModel(nn.Module):
    """Patch features [B, D, h, w] of a vision model of transformers: the last layer's patch tokens, for CLIP after its
    final norm and projection. `size`: the side to which images are resized; None leaves them as they are."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int | None = None):
        super().__init__()
        self.model, self.normalize, self.size = model, Normalized(mean, std), size
        self.clip = isinstance(model, CLIPVisionModelWithProjection)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.normalize(resized(images, self.size or images.shape[-1]))
        if not self.clip:
            return _grid(self.model(pixels).last_hidden_state)
        hidden = self.model.vision_model(pixels).last_hidden_state
        return _grid(self.model.visual_projection(self.model.vision_model.post_layernorm(hidden)))


def _grid(tokens: Tensor) -> Tensor:
    """Tokens [B, n, D] -> [B, D, h, h], without class and register tokens before them, which are fewer than 2 h + 1; a
    map [B, D, h, w] as it is."""
    if tokens.dim() != 3:
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, tokens.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))


class Registered(nn.Module):
    """A network that a Python file registers, on float images and with their gradient: one of its outputs, `output`, or
    what its part `layer` gives.

    Such a network takes uint8, through which no gradient goes. At its own size it only scales pixels before its first
    convolution, channel by channel: how is seen from a black and a white image, and the convolution then gets float
    images scaled so. Raises `UserError` where an image of noise shows that it does something else."""

    def __init__(self, file: str, output: str | None = None, layer: str | None = None):
        super().__init__()
        name = register_file(Path(file).resolve())
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        self.network = build_registered(name, [output or cls.get_provided_features_list()[0]]).requires_grad_(False)
        parts = dict(self.network.named_modules())
        if layer is not None and layer not in parts:
            some = ", ".join(part for part in parts if part and "." not in part)
            raise UsageError(f"{file}: the network {name} has no part {layer}; it has {some}, and parts of these")
        self.layer = None if layer is None else parts[layer]
        self.first = next((part for part in parts.values() if isinstance(part, nn.Conv2d)), None)
        refusal = f"{file}: {name} does more to {_SIDE} x {_SIDE} images than to scale pixels before its convolutions"
        if self.first is None:
            raise UserError(f"{refusal}: no gradient can go through it")
        black, white = (self._seen(torch.full((1, 3, _SIDE, _SIDE), level)) for level in (0.0, 255.0))
        self.register_buffer("scale", (white - black)[:, :, :1, :1] / 2, persistent=False)
        self.register_buffer("offset", (white + black)[:, :, :1, :1] / 2, persistent=False)
        noise = torch.randint(256, (1, 3, _SIDE, _SIDE), generator=torch.Generator().manual_seed(0)).float()
        scaled = self.scale * (noise / 127.5 - 1) + self.offset
        if (seen := self._seen(noise)).shape != scaled.shape or not torch.allclose(seen, scaled, rtol=0, atol=1e-3):
            raise UserError(f"{refusal}: no gradient can go through it")

    def _seen(self, levels: Tensor) -> Tensor:
        """What the first convolution gets of an image of `levels`, 0 to 255 [1, 3, S, S], without padding."""
        seen: list[Tensor] = []
        handle = self.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            self.network(levels.to(torch.uint8))
        handle.remove()
        return seen[0]

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.scale * resized(images, _SIDE) + self.offset
        found: list[Tensor] = []
        handles = [self.first.register_forward_pre_hook(lambda *_: (pixels,))]
        if self.layer is not None:
            handles.append(self.layer.register_forward_hook(lambda *call: found.append(call[-1])))
        blank = torch.zeros(len(images), 3, _SIDE, _SIDE, dtype=torch.uint8, device=images.device)
        try:
            output = self.network(blank)
        finally:
            for handle in handles:
                handle.remove()
        return _grid(found[0]) if self.layer is not None else output[0]


def load_pretrained(name: str, advice: str, weights: bool = True) -> nn.Module:
    """A vision model of transformers by its id or folder, in float32 on the CPU; of CLIP the vision part. Without
    `weights` its architecture alone. Raises `UserError`, with `advice`, where it cannot be had, or lacks weights, which
    transformers would draw at random."""
    try:
        config = AutoConfig.from_pretrained(name)
        if not weights:
            return AutoModel.from_config(config)
        clip = config.model_type in ("clip", "clip_vision_model")
        cls = CLIPVisionModelWithProjection if clip else AutoModel
        model, info = cls.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no vision model at {name} ({_why(error)}): {advice}") from None
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(f"{name} lacks weights ({', '.join(missing[:3])}): {advice}")
    return model.float()  # they may be of half precision


def load_vision_model(name: str, advice: str, size: int | None = None) -> VisionModel:
    """`load_pretrained`, normalised as its folder says. Raises `UserError`, with `advice`, where it does not say so."""
    model, mean, std = load_pretrained(name, advice), CLIP_MEAN, CLIP_STD
    if not isinstance(model, CLIPVisionModelWithProjection):
        try:
            how = ImageProcessingMixin.get_image_processor_dict(name)[0]  # of preprocessor_config.json
            mean, std = tuple(how["image_mean"]), tuple(how["image_std"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name} does not say how images are normalised ({_why(error)}): {advice}") from None
    return VisionModel(model.eval().requires_grad_(False), mean, std, size)


def _why(error: Exception) -> str:
    """Its kind, and its first line where it has one."""
    return " ".join([type(error).__name__, *str(error).splitlines()[:1]])


def load_classifier(name: str, weights: Path | None) -> nn.Module:
    """Images -> ImageNet logits [B, C], on the CPU: a name of `CLASSIFIERS`, with torchvision's weights from a file or
    by download, or a Python file that registers a network with class outputs. Raises `UserError` where weights cannot
    be had, `UsageError` for a file that registers none."""
    if name.endswith(".py"):
        cls = FEATURE_EXTRACTORS_REGISTRY[register_file(Path(name).resolve())]
        try:
            output = cls.get_default_feature_layer_for_metric("isc")
        except (NotImplementedError, KeyError):
            raise UsageError(f"{name} registers a network that names no class outputs (its layer for isc)") from None
        network = Registered(name, output=output)
        if not network(torch.zeros(1, 3, _SIDE, _SIDE, requires_grad=True)).requires_grad:
            raise UserError(f"{name}: the network computes without gradients (torch.no_grad), so nothing learns of it")
        return network
    build = CLASSIFIERS[name]
    if weights is None:
        try:
            return Classifier(build(weights="IMAGENET1K_V1"))
        except (URLError, OSError) as error:
            advice = "give a file of torchvision's weights (--loss.logits.weights FILE), or set loss.logits: null"
            raise UserError(f"the weights of {name} cannot be downloaded ({error}); {advice}") from None
    network, safe = build(weights=None), weights.suffix == ".safetensors"
    try:
        state = load_file(weights) if safe else torch.load(weights, "cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # a file that holds something else fails in many ways
        raise UserError(f"{weights} does not hold torchvision's weights of {name}: {_why(error)}") from None
    return Classifier(network)


def feature_width(teacher: Callable[[Tensor], Tensor], advice: str) -> int:
    """D of a teacher's patch features. Raises `UserError` where it gives none of images of its size."""
    try:
        with torch.no_grad():
            features = teacher(torch.zeros(1, 3, _SIDE, _SIDE))
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the network takes no such images ({_why(error)}): {advice}") from None
    if features.dim() != 4:
        raise UserError(f"the network gives {tuple(features.shape)}, not a map of features [1, D, h, w]: {advice}")
    return features.shape[1]
