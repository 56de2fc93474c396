"""From a trained tokenizer to a diffusers `VQModel` folder, exact to float error: stock where the code is the nearest
row of a table, else `tokenizer.vqmodel.QuantizerVQModel`."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import VQModel
from torch import Tensor, nn

from nsvq.files import atomic_folder
from nsvq.tokenizer.model import ModelConfig, QuantizedDecoder, vqmodel_arguments
from nsvq.tokenizer.pretrained import TRAINING_FILE
from nsvq.tokenizer.vqmodel import QuantizerVQModel


@torch.no_grad()
def latent_statistics(encoder: nn.Module, batches: Iterable[Tensor], accelerator: Accelerator) -> tuple[Tensor, float]:
    """(per-channel mean [d], one standard deviation around it) of the latents of images [B, 3, H, W], over all ranks.
    Sums are float64."""
    count, total, squares = 0, 0, 0
    for images in batches:
        z = encoder(images.to(accelerator.device)).double()
        count += z.numel() // z.shape[1]
        total = total + z.sum((0, 2, 3))
        squares = squares + z.square().sum((0, 2, 3))
    # A rank may have no images, and does not know then how many channels there are.
    parts = gather_object([(count, torch.as_tensor(total).cpu(), torch.as_tensor(squares).cpu())])
    count, total, squares = (sum(values) for values in zip(*parts, strict=True))
    mean = (total / count).to(accelerator.device)
    variance = squares.to(mean) / count - mean.square()
    return mean.float(), variance.mean().sqrt().item()


@torch.no_grad()
def to_vqmodel(
    config: ModelConfig, image_size: int, encoder: nn.Module, decoder: QuantizedDecoder, mean: Tensor, std: float
) -> VQModel:
    """A model with the same codes and images. Its latents times `scaling_factor` have mean 0 and deviation 1.

    The shift by `mean` [d] sits in `quant_conv`, the codebook and `post_quant_conv`; the scale is isotropic, since
    one per channel would change which code is nearest. A table with more than d columns widens the latents by zeros.
    Without a table the project's class keeps the quantizer, which takes the shift back itself. The model is on the CPU,
    where its table is computed."""
    quantizer, mean = copy.deepcopy(decoder.quantizer).cpu(), mean.cpu()
    table = quantizer.export_table()
    arguments = vqmodel_arguments(config) | {"sample_size": image_size, "scaling_factor": 1 / std}
    arguments["num_vq_embeddings"] = quantizer.codebook_size
    arguments["vq_embed_dim"] = quantizer.dim if table is None else table.shape[1]
    if table is None:
        model = QuantizerVQModel(quantizer=quantizer.config.model_dump(mode="json"), **arguments)
        model.quantize.quantizer.load_state_dict(quantizer.state_dict())
        model.quantize.mean.copy_(mean)
        unshift = torch.zeros_like(mean)
    else:
        model = VQModel(**arguments)
        wide_mean = nn.functional.pad(mean, (0, table.shape[1] - len(mean)))
        model.quantize.embedding.weight.copy_(table - wide_mean)
        unshift = mean
    model.encoder.load_state_dict(encoder.state_dict())
    model.decoder.load_state_dict(decoder.decoder.state_dict())
    nn.init.dirac_(model.quant_conv.weight)
    nn.init.dirac_(model.post_quant_conv.weight)
    model.quant_conv.bias.zero_()[: len(mean)] = -mean
    model.post_quant_conv.bias.copy_(unshift)
    return model.eval()


def save(model: VQModel, folder: Path, about: dict) -> None:
    """Write the `VQModel` folder in one step, with `about` (how it was trained) as nsvq.json beside the weights."""
    with atomic_folder(folder) as part:
        model.save_pretrained(part)
        (part / TRAINING_FILE).write_text(json.dumps(about, indent=2))
