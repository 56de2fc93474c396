"""What accelerate puts around networks, taken off; and tensors that FSDP2 splits over the ranks: put together for
checkpoints and samples, split again on loading."""

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside of DDP and of torch.compile (`accelerate launch --dynamo_backend`), whose names of weights
    are the same with and without."""
    return extract_model_from_parallel(module, keep_torch_compile=False)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split, on its device. A collective call where it is."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, *, keep: bool = True) -> Any:
    """`value`, of dicts, lists and tuples, with split tensors put together on the CPU. Ranks that do not `keep` them
    get None. A collective call where anything is split; nothing changes where nothing is."""
    if isinstance(value, dict):
        return {key: whole(part, keep=keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(part, keep=keep) for part in value)
    if isinstance(value, DTensor):
        found = full(value)
        return found.cpu() if keep else None
    return value


def split_like(value: Tensor, like: Tensor | None) -> Tensor:
    """This rank's part of a whole tensor, which is equal on all ranks, where `like` is split; else `value` itself."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_module(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """`weights`, whole, into a module that may be split. Raises what `load_state_dict` does."""
    own = module.state_dict()
    module.load_state_dict({name: split_like(value, own.get(name)) for name, value in weights.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The moments in the `state` of an optimizer of whole parameters, into one whose parameters may be split. Rates,
    decay and the like stay as `optimizer` has them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: split_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
