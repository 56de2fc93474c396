"""A published tokenizer's checkpoint as a diffusers `VQModel` folder, for every command that takes --tokenizer.

python tokenizer/convert.py --from taming last.ckpt --output tokenizers/vqgan
python tokenizer/convert.py --from llamagen vq_ds16_c2i.pt --output tokenizers/llamagen
python tokenizer/convert.py --from magvit2 imagenet_128_L.ckpt --image_size 128 --output tokenizers/magvit2

Widths, levels, attention, K and d are read off the checkpoint. docs/converting.md says what is exact.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, create_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.errors import UsageError, UserError
from nsvq.files import atomic_folder
from nsvq.tokenizer.layouts import averaged, to_vqmodel
from nsvq.tokenizer.magvit import MagvitVQModel

STATE_DICTS = ("ema", "state_dict", "model")  # where repositories keep it; the first of these that a file has
STRIP = (
    "python -c \"import torch; c = torch.load({old!r}, 'cpu', weights_only=False); "
    'torch.save({{k: c[k] for k in {keys} if k in c}}, {new!r})"'
)


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("give the repository and its checkpoint, as in --from taming last.ckpt")
    return value


class _Options(configs.Config):
    output: Path = Field(description="The folder to write; it must not exist.")
    image_size: int = Field(256, ge=8, description="Side of the images that it was trained on, in pixels.")
    scaling_factor: float = Field(1.0, gt=0, description="1 / the latents' standard deviation, if you know it.")
    codebook_l2_norm: bool = Field(True, description="LlamaGen's option of that name; its weights do not tell.")


Source = Literal["taming", "llamagen", "simvq", "magvit2", "ibq", "vqgan-lc"]
ConvertConfig = create_model(  # type: ignore[call-overload]  # since `from` is a keyword
    "ConvertConfig",
    __base__=_Options,
    __doc__="Convert a published tokenizer: --from REPOSITORY CHECKPOINT --output DIR.",
    **{"from": (Annotated[tuple[Source, Path], BeforeValidator(_pair)], Field(description="Repository, checkpoint."))},
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, by name; no code in it is run.

    Raises `UserError` where it cannot be read so, with the way out for a file that is trusted.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options, in LlamaGen's and VQGAN-LC's files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        new = str(path.with_name(f"{path.stem}-weights.pt"))
        raise UserError(
            f"{path} holds more than weights ({_reason(error)}), and reading it would run code. If you trust its "
            f"source, run {STRIP.format(old=str(path), new=new, keys=STATE_DICTS)} where the code that wrote it is "
            f"installed, then convert {new}"
        ) from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    state = next((checkpoint[name] for name in STATE_DICTS if isinstance(checkpoint.get(name), dict)), checkpoint)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _reason(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))  # how torch names the class that it does not read
    return found[1] if found else str(error).splitlines()[0]


def main() -> None:
    config = configs.parse(ConvertConfig, sys.argv[1:])
    source, path = getattr(config, "from")
    if config.output.exists():
        raise UsageError(f"--output {config.output} is there already: give a new name, or delete it")
    state, count = averaged(read_checkpoint(path))
    model, dropped = to_vqmodel(source, state, config.image_size, config.scaling_factor, config.codebook_l2_norm)
    with atomic_folder(config.output) as part:
        model.save_pretrained(part)
    factor, (codes, width) = 2 ** (len(model.config.block_out_channels) - 1), model.quantize.embedding.weight.shape
    print(f"{config.output}: {codes} codes of {width} values, f = {factor}")
    print(f"{count} tensors are moving averages; {len(dropped) - count} others, of training alone, were left out")
    if isinstance(model, MagvitVQModel):
        adaptive = ", decoder.adaptive.* (scale and shift from the codes)" if model.config.adaptive_norm else ""
        print(
            "a stock VQModel cannot hold encoder.down.*.downsample (a zero on every side), decoder.up.*.upsample "
            f"(depth to space){adaptive}: the folder is a MagvitVQModel, which needs nsvq installed"
        )


if __name__ == "__main__":
    launch.run(main)
