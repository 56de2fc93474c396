"""From a trained tokenizer to a stock diffusers `VQModel` folder, exact to float error."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import VQModel
from torch import Tensor, nn

from tokenizer.model import ModelConfig, QuantizedDecoder, vqmodel_arguments
from tokenizer.pretrained import TRAINING_FILE


@torch.no_grad()
def latent_statistics(encoder: nn.Module, batches: Iterable[Tensor], accelerator: Accelerator) -> tuple[Tensor, float]:
    """(per-channel mean [d], one standard deviation around it) of the latents of images [B, 3, H, W], over all ranks.

    Sums are float64.
    """
    count, total, squares = 0, 0, 0
    for images in batches:
        z = encoder(images.to(accelerator.device)).double()
        count += z.numel() // z.shape[1]
        total = total + z.sum((0, 2, 3))
        squares = squares + z.square().sum((0, 2, 3))
    count = accelerator.reduce(torch.tensor(float(count), device=accelerator.device), "sum")
    mean = accelerator.reduce(total, "sum") / count
    variance = accelerator.reduce(squares, "sum") / count - mean.square()
    return mean.float(), variance.mean().sqrt().item()


@torch.no_grad()
def to_vqmodel(
    config: ModelConfig, image_size: int, encoder: nn.Module, decoder: QuantizedDecoder, mean: Tensor, std: float
) -> VQModel:
    """The stock model with the same codes and images. Its latents times `scaling_factor` have mean 0 and deviation 1.

    The shift by `mean` [d] sits in `quant_conv`, the codebook and `post_quant_conv`; the scale is isotropic, since
    one per channel would change which code is nearest.
    """
    codebook = decoder.quantizer.codebook()
    model = VQModel(
        **vqmodel_arguments(config),
        sample_size=image_size,
        num_vq_embeddings=len(codebook),
        vq_embed_dim=codebook.shape[1],
        scaling_factor=1 / std,
    )
    model.encoder.load_state_dict(encoder.state_dict())
    model.decoder.load_state_dict(decoder.decoder.state_dict())
    model.quantize.embedding.weight.copy_(codebook - mean)
    for conv, bias in ((model.quant_conv, -mean), (model.post_quant_conv, mean)):
        nn.init.dirac_(conv.weight)
        conv.bias.copy_(bias)
    return model.eval()


def save(model: VQModel, folder: Path, about: dict) -> None:
    """Write the `VQModel` folder in one step, with `about` (how it was trained) as nsvq.json beside the weights."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / TRAINING_FILE).write_text(json.dumps(about, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
