"""Images to codes and back, from a saved folder: ours (docs/tokenizers.md says of which class), or any stock `VQModel`.

tokenizer = Tokenizer.from_pretrained("runs/nsvq/tokenizer")
codes = tokenizer.encode(images)      # [B, 3, H, W] in [-1, 1] -> [B, h, w]
images = tokenizer.decode(codes)"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from nsvq.data.hub import hub_answers
from nsvq.errors import UserError
from nsvq.files import state_hash
from nsvq.tokenizer.codebook import nearest_code
from nsvq.tokenizer.magvit import MagvitVQModel
from nsvq.tokenizer.vqmodel import QuantizerVQModel

VQ_MODELS = {model.__name__: model for model in (VQModel, QuantizerVQModel, MagvitVQModel)}
CONTINUOUS_MODELS = {model.__name__: model for model in (AutoencoderKL, AutoencoderDC, AutoencoderTiny)}
TRAINING_FILE = "nsvq.json"  # beside the weights of a tokenizer that this project trained


def read_training(folder: str | Path) -> dict | None:
    """How the tokenizer in `folder` was trained: config, samples seen, version; None where it is not ours."""
    path = Path(folder) / TRAINING_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def find_tokenizer(source: str | Path) -> Path:
    """The folder `source`, or the local copy of a tokenizer's Hub id, from the cache where the Hub is out of reach.
    Raises `UserError` where there is none."""
    folder, why = Path(source), ""
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        try:
            wanted = ["config.json", TRAINING_FILE, "*.safetensors", "*.safetensors.index.json"]
            offline = not hub_answers()
            folder = Path(snapshot_download(str(source), allow_patterns=wanted, local_files_only=offline))
        except (OSError, ValueError) as error:
            out_of_reach = "no copy of it is cached, and the Hub is out of reach"
            why = f" (as a Hub id: {out_of_reach if offline else str(error).splitlines()[0]})"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no tokenizer at {source}: train one with `accelerate launch tokenizer/train.py`, give "
            f"<out>/tokenizer of a finished run, or the folder or Hub id of a diffusers VQModel{why}"
        )
    return folder


class Tokenizer(nn.Module):
    """A frozen tokenizer in eval mode around a `VQModel`, attribute `model`. `codebook` holds what the decoder sees of
    each code [K, d]; `downsampling` is the factor f between image and tokens."""

    def __init__(self, model: VQModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config = model.config
        widths = config.get("encoder_block_out_channels") or config.block_out_channels
        self.downsampling = 2 ** (len(widths) - 1)
        self.image_size: int | None = config.get("sample_size")
        self.trained: dict | None = None  # see `read_training`

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Load `folder`, or a Hub id. Raises `UserError` where no whole `VQModel`, stock or ours, is there, or one of
        images that are not RGB."""
        tokenizer = open_tokenizer(folder)
        if not isinstance(tokenizer.model, VQModel):
            raise UserError(f"{folder} holds a {type(tokenizer.model).__name__}, not a VQModel: it has no codes")
        return tokenizer

    @property
    def codebook_size(self) -> int:
        """0 without a codebook."""
        return self.model.config.get("num_vq_embeddings", 0)

    @property
    def latent_channels(self) -> int:
        return self.codebook.shape[1]

    @property
    def codebook(self) -> Tensor:
        if isinstance(self.model, QuantizerVQModel):
            return self.model.quantize.quantizer.codebook()
        return self.model.quantize.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Continuous latents before quantisation, as a diffusion model sees them (times `scaling_factor`). images
        [B, 3, H, W] in [-1, 1] -> [B, d, h, w]. Raises `ValueError` where H or W is no multiple of f."""
        f = self.downsampling
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"expected images [B, 3, H, W] with H and W multiples of {f}, got {tuple(images.shape)}")
        return self._encoded(images) * self.model.config.scaling_factor

    def _encoded(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latents

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> code indices [B, h, w] int64."""
        return self.quantize(self.latents(images) / self.model.config.scaling_factor)

    @torch.no_grad()
    def quantize(self, z: Tensor) -> Tensor:
        """Latents before `scaling_factor` [B, d, h, w] -> code indices [B, h, w] int64."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B h w, d)
        ours = isinstance(self.model, QuantizerVQModel)
        indices = self.model.quantize.lookup(flat) if ours else nearest_code(flat, self.codebook)
        return indices.view(z.shape[0], *z.shape[2:])

    @torch.no_grad()
    def quantization_error(self, z: Tensor, indices: Tensor) -> Tensor:
        """Mean squared distance of latents [B, d, h, w] to their codes, where the method compares them: [B] float64."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, d)
        if isinstance(self.model, QuantizerVQModel):
            flat = self.model.quantize.prepare(flat)
        residual = flat - self.codebook[indices.flatten()]
        return residual.double().square().reshape(len(z), -1).mean(1)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Code indices [B, h, w] -> images [B, 3, H, W], about in [-1, 1]. Raises `ValueError` on a wrong index."""
        if indices.dim() != 3:
            raise ValueError(f"expected indices [B, h, w], got {tuple(indices.shape)}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(f"indices must lie in 0..{self.codebook_size - 1}, got {indices.min()}..{indices.max()}")
        if self.model.config.get("lookup_from_codebook"):  # as aMUSEd's, which looks the codes up itself
            shape = (*indices.shape, self.codebook.shape[1])
            return self.model.decode(indices, force_not_quantize=True, shape=shape).sample
        z_q = self.codebook[indices].permute(0, 3, 1, 2)  # (B, d, h, w)
        return self.model.decode(z_q.contiguous(), force_not_quantize=True).sample

    def fingerprint(self) -> str:
        """SHA-256 over config and weights: names this tokenizer in latent caches and results."""
        config = {k: v for k, v in self.model.config.items() if not k.startswith("_")}
        return state_hash(self.model, json.dumps(config, sort_keys=True, default=list))


class ContinuousTokenizer(Tokenizer):
    """An autoencoder without a codebook; of an `AutoencoderKL`, latents are the mode of its posterior. `shift_factor`
    is not subtracted: the stock `DiTPipeline` does not add it."""

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    def _encoded(self, images: Tensor) -> Tensor:
        coded = self.model.encode(images)
        if isinstance(self.model, AutoencoderKL):
            return coded.latent_dist.mode()
        return coded.latent if isinstance(self.model, AutoencoderDC) else coded.latents


def open_tokenizer(source: str | Path) -> Tokenizer:
    """Read a tokenizer of any kind from a folder or by its Hub id. Raises `UserError` where there is none."""
    folder = find_tokenizer(source)
    try:
        found = VQModel.load_config(folder).get("_class_name")
        if found not in VQ_MODELS | CONTINUOUS_MODELS:
            known = ", ".join([VQModel.__name__, *CONTINUOUS_MODELS])
            raise UserError(f"{source} holds a {found}, which is no tokenizer that is known here: {known}")
        kind: type = ContinuousTokenizer if found in CONTINUOUS_MODELS else Tokenizer
        model, loading = (VQ_MODELS | CONTINUOUS_MODELS)[found].from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:  # the second: no JSON, or a tensor of another shape
        raise UserError(f"cannot read the tokenizer at {source}: {str(error).splitlines()[0]}") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{source} lacks {len(missing)} tensors of its {found}: {', '.join(missing[:8])}")
    inside = model.config.in_channels
    if (channels := (inside, model.config.get("out_channels", inside))) != (3, 3):
        what = f"{channels[0]} channel{'s' * (channels[0] != 1)} in and {channels[1]} out"
        raise UserError(f"{source} is a tokenizer of images with {what}: images here have 3, red, green and blue")
    tokenizer = kind(model)
    tokenizer.trained = read_training(folder)
    return tokenizer
