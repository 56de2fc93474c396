"""What names the content of a file, or the weights of a network."""

import hashlib
from pathlib import Path

import torch
from torch import nn


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_hash(module: nn.Module, prefix: str = "") -> str:
    """SHA-256 over `prefix` and the names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
