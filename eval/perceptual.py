"""The LPIPS networks of a reconstruction's result, and which weights they have."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from nsvq.errors import UserError
from nsvq.eval.distributed import build_in_turn
from nsvq.files import file_hash
from nsvq.tokenizer.losses import load_lpips

_KNOWN = {"vgg": VGG16_Weights, "alex": AlexNet_Weights, "squeeze": SqueezeNet1_1_Weights}


def load_networks(
    nets: Sequence[str], weights: list[Path], accelerator: Accelerator, result: dict
) -> tuple[dict[str, nn.Module], dict[str, dict]]:
    """The LPIPS networks by backbone, and {backbone: its weights' file and SHA-256}.

    `weights`: a file for each of `nets`, or none: torchvision's download, without which the backbone is skipped in the
    result. A .pth file that is not torchvision's is warned of. Raises `UserError` for a wrong file. A collective call.
    """
    loaded, about = {}, {}
    for i, net in enumerate(net for net in nets if net != "none"):
        path = weights[i] if weights else None
        try:
            module = build_in_turn(accelerator, partial(load_lpips, net, path))
        except UserError:
            if path is not None:
                raise
            how = "give torchvision's file of them with --lpips_weights FILE, or choose another --lpips"
            result["skipped"][f"lpips_{net}"] = f"the {net} backbone's weights cannot be downloaded; {how}"
            continue
        loaded[net] = module.to(accelerator.device)
        url = _KNOWN[net].IMAGENET1K_V1.url
        file = path or Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        about[net] = {"weights": str(file), "weights_sha256": file_hash(file)}
        known = Path(url).stem.rpartition("-")[2]  # torchvision's names end in the first digits
        if file.suffix == ".pth" and not about[net]["weights_sha256"].startswith(known):
            other = f"{file} is not torchvision's {Path(url).name}"
            result["warnings"].append(f"lpips_{net}: {other}: it compares with no published number")
    return loaded, about
