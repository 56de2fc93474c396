"""Any tokenizer folder, ours or diffusers' `VQModel` and `AutoencoderKL`, as latents, codes and reconstructions."""

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from nsvq.tokenizer.pretrained import Tokenizer


class ContinuousTokenizer(Tokenizer):
    """An `AutoencoderKL`: latents are the mode of its posterior, and there is no codebook."""

    codebook_size = 0
    device = property(lambda self: self.model.device)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent_dist.mode() * self.model.config.scaling_factor


def open_tokenizer(folder: str) -> Tokenizer:
    """Read a stock `VQModel` or `AutoencoderKL` folder. Raises `UserError` where there is none."""
    try:
        kind = VQModel.load_config(folder).get("_class_name")
        if kind == "AutoencoderKL":
            return ContinuousTokenizer(AutoencoderKL.from_pretrained(folder))
    except (OSError, ValueError):
        pass  # the tokenizer's own reader says what is wrong
    return Tokenizer.from_pretrained(folder)


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """images [B, 3, H, W] in [-1, 1] -> {"z": latents [B, d, h, w] in the model's units}; with a codebook "indices"
    [B, h, w], too, and "error" [B] float64, the mean of (z - c)^2 of each image."""
    z = tokenizer.latents(images) / tokenizer.model.config.scaling_factor
    if tokenizer.codebook_size == 0:
        return {"z": z}
    indices = tokenizer.quantize(z)
    return {"z": z, "indices": indices, "error": tokenizer.quantization_error(z, indices)}


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """`encode`, and "image": the reconstructions [B, 3, H, W], not clipped."""
    codes = encode(tokenizer, images)
    if tokenizer.codebook_size == 0:
        return codes | {"image": tokenizer.model.decode(codes["z"]).sample}
    return codes | {"image": tokenizer.decode(codes["indices"])}
