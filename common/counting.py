"""Memory and FLOPs of a trainer's own step, counted on tensors without values: no GPU is needed, and no data."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsvq.errors import UserError


@dataclass
class Counted:
    """Of one image where it says so, else of the run. Bytes and FLOPs of forward and backward."""

    parameters: int
    fixed: float  # bytes of weights, gradients, optimizers, averages, frozen networks
    saved: float  # bytes that autograd keeps for an image,
    saved_once: float  # and for a micro-batch of any size
    flops: float  # of an image, all networks
    flops_tf32: float  # its part in float32, which a GPU computes in TF32
    flops_codebook: float  # of an image, besides
    checkpoint: float  # bytes


@dataclass
class Step:
    """`run`(images) with the trainer's own step. Which networks train; `averaged` of them have an average. `exact`:
    modules that leave the autocast, by the names of torch's counter."""

    run: Callable[[int], None]
    trained: list[nn.Module]
    averaged: list[nn.Module]
    frozen: list[nn.Module]
    accelerator: "CountingAccelerator"
    exact: list[str] = field(default_factory=list)


class CountingAccelerator:
    """What a trainer's step asks of accelerate's, on tensors without values."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kept: dict[int, Tensor] = {}  # what autograd keeps now, by storage
        self.again = 0  # bytes that the largest checkpointed block keeps, while it is computed again
        self.peak = 0  # bytes of both

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """bfloat16 by CUDA's rules."""
        with _autocast("cuda", torch.bfloat16, self.device.type == "cuda"):
            yield

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def backward(self, loss: Tensor) -> None:
        if self.device.type == "cpu":
            loss.backward()
        self.peak = max(self.peak, _size(self.kept) + self.again)
        self.kept, self.again = {}, 0

    def checkpoint(self, block: Callable[..., Any], *arguments: Any) -> Any:
        """In place of torch's: the block's arguments are kept, and all that it keeps once, since blocks are computed
        again one at a time."""
        for argument in arguments:
            if torch.is_tensor(argument):
                self.keep(argument)
        before = dict(self.kept)
        result = block(*arguments)
        self.again = max(self.again, _size({at: tensor for at, tensor in self.kept.items() if at not in before}))
        self.kept = before
        return result

    def prepared(self, network: nn.Module) -> nn.Module:
        """As `accelerate.prepare` would: under autocast, with float32 results."""
        forward = network.forward

        def call(*arguments: Any) -> Any:
            with self.autocast():
                result = forward(*arguments)
            first, *rest = result if isinstance(result, tuple) else (result,)
            return (first.float(), *rest) if rest else first.float()

        network.forward = call
        return network


def count(make: Callable[[torch.device], Step]) -> Counted:
    """What the step takes that `make` builds on a device. Raises `UserError` for a method whose step looks at values:
    these tensors have none."""
    try:
        return _count(make)
    except RuntimeError as error:  # what torch raises there has many types
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"this config's step looks at values, which a plan has not: {why}") from None


def _count(make: Callable[[torch.device], Step]) -> Counted:
    """Memory by CUDA's rules, forward alone; FLOPs by a backward pass too, which needs a device that is there."""
    few, many = 2, 6
    kept = {}
    with FakeTensorMode(), torch.device("cuda"), patch.object(torch, "autocast", _autocast):
        step = make(torch.device("cuda"))
        own = {
            t.untyped_storage()._cdata
            for module in (*step.trained, *step.frozen)
            for t in (*module.parameters(), *module.buffers())
        }

        for network in step.trained:
            for module in network.modules():
                if hasattr(module, "_gradient_checkpointing_func"):  # diffusers' and transformers' name
                    module._gradient_checkpointing_func = step.accelerator.checkpoint

        def pack(tensor: Tensor) -> Tensor:
            return tensor if tensor.untyped_storage()._cdata in own else step.accelerator.keep(tensor)

        for images in (few, many):
            step.accelerator.peak = 0
            attention = patch.object(F, "scaled_dot_product_attention", _flash_attention)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), attention:
                step.run(images)
            kept[images] = step.accelerator.peak
        parameters = sum(map(_parameters, step.trained))
        averaged = sum(map(_parameters, step.averaged))
        others = sum(b.numel() * b.element_size() for m in step.trained for b in m.buffers())
        frozen = sum(p.numel() * p.element_size() for m in step.frozen for p in (*m.parameters(), *m.buffers()))
    with FakeTensorMode():
        step = make(torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step.run(few)
    by_module = counter.get_flop_counts()
    codebook = sum(n for op, n in by_module["Global"].items() if str(op).startswith("nsvq."))
    exact = sum(sum(by_module.get(name, {}).values()) for name in step.exact)
    saved = (kept[many] - kept[few]) / (many - few)
    return Counted(
        parameters=parameters,
        fixed=16 * parameters + 4 * averaged + others + frozen,
        saved=saved,
        saved_once=kept[few] - few * saved,
        flops=(counter.get_total_flops() - codebook) / few,
        flops_tf32=exact / few,
        flops_codebook=codebook / few,
        checkpoint=12 * parameters + 4 * averaged + others,
    )


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> Iterator[None]:
    """torch.autocast, which does not look for a GPU."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, enabled)
    torch.set_autocast_dtype(device_type, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
        if not before[0]:
            torch.clear_autocast_cache()


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
    """What a GPU would take; without one, torch chooses the formula that keeps N x N numbers."""
    half = (tensor.bfloat16() for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(*half, 0.0, is_causal)[0]


def _size(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
