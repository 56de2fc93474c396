"""A GPU that is none: tensors on "cuda:0" whose values lie on the CPU, and which are refused what CUDA refuses.

    with Pretend() as device:
        z = torch.randn(4, 8).to(DEVICE)
        with device.counting() as waits: ...

Raises `Mixed` where CUDA would raise: tensors of both sides in one operator, a CPU generator for a draw on the device,
indices on the device for a tensor on the CPU, and `numpy()`. `counting` lists where the host waits for the device:
numbers that are read, shapes that depend on values, and copies that block. To C++ the tensors are on "meta", of which
autograd asks no driver; Python, and so this project, sees "cuda:0". The codebook's own operators count as kernels.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE, _META = torch.device("cuda", 0), torch.device("meta", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
_COPIES = {aten._to_copy, aten.copy_}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_ONE_SIDE = {aten.cat, aten.stack}  # not even a scalar of the other side
_WAITS = {aten._local_scalar_dense, aten.nonzero, aten.bincount, aten._unique2, aten.unique_dim, aten.masked_select}
_WAITS |= {aten.unique_consecutive, aten.equal, aten.repeat_interleave, aten.multinomial, aten._linalg_eigh}
_WAITS |= {aten._linalg_svd, aten.histc, aten.is_nonzero}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


class Mixed(AssertionError):
    """What CUDA would not do."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on the GPU; `value` is on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        how = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, value.size(), device=_META, **how)
        self.value = value
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise Mixed("numpy() of a tensor on the device")

    __array__ = numpy

    def untyped_storage(self):
        return self.value.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.value.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = OnDevice(self.value.detach().clone())
        if isinstance(self, torch.nn.Parameter) or getattr(self, "_is_param", False):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self):
        return f"OnDevice({self.value!r})"


class _OnMeta(TorchFunctionMode):
    """C++ is told "meta" for "cuda", whose driver it would look for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def meta(x):
            return _META if isinstance(x, torch.device) and x.type == "cuda" else x

        kwargs = {name: meta(x) for name, x in (kwargs or {}).items()}
        if func in _FROM_NUMBERS:
            device = kwargs.pop("device", args[0].device if func is torch.Tensor.new_tensor else "cpu")
            if func is torch.Tensor.new_tensor:
                kwargs, args, func = {"dtype": args[0].dtype} | kwargs, args[1:], torch.tensor
            return func(*args, **kwargs).to(device)
        return func(*map(meta, args), **kwargs)


class Pretend(TorchDispatchMode):
    """While it is entered, what is made on "cuda" is an `OnDevice`."""

    def __init__(self):
        super().__init__()
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        was = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # else `Module.to` would leave optimizers behind
        self._patches.callback(torch.__future__.set_swap_module_params_on_conversion, was)
        for name in ("_lazy_init", "synchronize", "max_memory_allocated", "max_memory_reserved"):
            self._patches.enter_context(mock.patch.object(torch.cuda, name, return_value=0))
        self._patches.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="pretended"))
        self._patches.enter_context(_OnMeta())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[str]]:
        """A list that gets a line for each time that the host waits: the operator, and the project's lines."""
        found: list[str] = []
        _LISTENERS.append(found)
        try:
            yield found
        finally:
            _LISTENERS.remove(found)


_LISTENERS: list[list[str]] = []


def _is_device(device: object) -> bool:
    return torch.device(device).type == "cuda" or torch.device(device) == _META  # "meta" alone is meant as such


def _run(func, args, kwargs):
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    wanted = kwargs.get("device")
    on_device = bool(here) if wanted is None else _is_device(wanted)
    packet = func.overloadpacket
    if here or on_device:
        _check(packet, args, kwargs, tensors, here, on_device)
    known = {id(x.value): x for x in here}
    args, kwargs = tree_map(lambda x: x.value if isinstance(x, OnDevice) else x, (args, kwargs))
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    result = func(*args, **kwargs)
    if packet is aten.copy_:
        on_device = id(args[0]) in known
    if not on_device:
        return result
    if packet is aten._local_scalar_dense or (not here and wanted is None):
        return result

    def wrapped(x):
        return known[id(x)] if id(x) in known else OnDevice(x) if isinstance(x, torch.Tensor) else x

    return tree_map(wrapped, result)


def _check(packet, args, kwargs, tensors, here, on_device) -> None:
    """Raises `Mixed`, or tells the listeners that the host waits."""
    generator = kwargs.get("generator")
    if generator is not None and on_device and generator.device.type == "cpu":
        raise Mixed(f"a CPU generator for {packet} on the device")
    if packet is aten._foreach_copy_:
        for goal, source in zip(args[0], args[1], strict=True):
            _check(aten.copy_, (goal, source, *args[2:]), kwargs, [goal, source], here, on_device)
        return
    elsewhere = [x for x in tensors if not isinstance(x, OnDevice)]
    if packet in _COPIES:
        source = args[1] if packet is aten.copy_ else args[0]
        goal = isinstance(args[0], OnDevice) if packet is aten.copy_ else on_device
        blocks = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
        if isinstance(source, OnDevice) != goal and blocks:
            _waits(packet)
        return
    if packet in _INDEXING:
        indices = [x for x in args[1] if x is not None]
        values = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)]
        if not isinstance(args[0], OnDevice) and here:
            raise Mixed(f"{packet} of a tensor on the CPU by one on the device")
        if any(x.dim() and not isinstance(x, OnDevice) for x in values):
            raise Mixed(f"{packet}: values on the CPU for a tensor on the device")
        fills = len(values) == 2 and values[1].numel() == 1 and len(indices) == 1  # a fill where the mask is true
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not fills
        if masks or any(not isinstance(x, OnDevice) for x in indices):
            _waits(packet)
        return
    if here and any(x.dim() or packet in _ONE_SIDE for x in elsewhere):
        raise Mixed(f"{packet} of tensors on the device and on the CPU")
    if here and packet in _WAITS:
        _waits(packet)


def _waits(packet) -> None:
    if _LISTENERS:
        frames = traceback.extract_stack()
        ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
        lines = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno} {f.line}" for f in ours if f.filename != __file__]
        for found in _LISTENERS:
            found.append(f"{packet} at {' < '.join(lines[:-3:-1])}")


class PretendAccelerator(Accelerator):
    """An accelerator of one process whose device is `DEVICE`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, cpu=True)
        self.state.device = PartialState().device = DEVICE


@contextlib.contextmanager
def two_ranks(accelerator: Accelerator) -> Iterator[list[str]]:
    """Have `accelerator` and `torch.distributed` take this process for rank 0 of two that hold the same. Collectives
    raise `Mixed` for tensors on the CPU, as NCCL's do; the list that is given gets their names."""
    called: list[str] = []

    def collective(name, work):
        def call(*args, **kwargs):
            called.append(name)
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            if not all(isinstance(x, OnDevice) for x in tensors):
                raise Mixed(f"{name} of a tensor on the CPU: NCCL has no backend for it")
            work(*args)

        return mock.patch.object(dist, name, call)

    def fill(parts, own, *_):
        for part in parts:
            part.copy_(own)

    fakes = {
        "all_reduce": lambda value, *_: value.mul_(2),
        "broadcast": lambda *_: None,
        "all_gather": fill,
        "all_gather_into_tensor": lambda out, own, *_: out.copy_(torch.cat([own, own])),
    }
    with contextlib.ExitStack() as patches:
        for name, work in fakes.items():
            patches.enter_context(collective(name, work))
        plain = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "barrier": None}
        plain["broadcast_object_list"] = None
        for name, answer in plain.items():
            patches.enter_context(mock.patch.object(dist, name, lambda *_, answer=answer, **__: answer))
        for state in (accelerator.state._shared_state, PartialState._shared_state):
            patches.enter_context(
                mock.patch.dict(state, {"distributed_type": DistributedType.MULTI_GPU, "num_processes": 2})
            )
        yield called
