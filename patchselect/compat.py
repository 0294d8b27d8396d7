"""What older releases of Python and torch lack, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEEPS_STORAGES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 4)
_compiler: Any = getattr(torch, "compiler", None)

if hasattr(_compiler, "is_compiling"):  # torch 2.3
    is_compiling = _compiler.is_compiling
    is_dynamo_compiling = _compiler.is_dynamo_compiling
else:
    try:
        from torch._dynamo import is_compiling  # type: ignore[attr-defined] # torch 2.1
    except (ImportError, AttributeError):  # torch 2.0: dynamo says it in no way; torch 1: there is none

        def is_compiling() -> bool:
            return False

    is_dynamo_compiling = is_compiling

if hasattr(_compiler, "is_exporting"):  # torch 2.7
    is_exporting = _compiler.is_exporting
else:

    def is_exporting() -> bool:
        return bool(torch.onnx.is_in_onnx_export())


def memory_of(tensor: Tensor) -> Any:
    """An object that lives as long as the memory of `tensor`."""
    # On torch 2.1 the finalizer of a storage never runs, and before it the object around a storage is made anew for
    # each call; the tensor lives on. 2.4.1 is right.
    return tensor.untyped_storage() if KEEPS_STORAGES else tensor


def address_of(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    held = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return int(held._cdata if KEEPS_STORAGES else held.data_ptr())


def bits_of(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a flat tensor, read as another type."""
    try:
        return flat.view(dtype)
    except RuntimeError:  # torch 1.10: types of one size alone
        alike = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        return torch.from_numpy(flat.view(alike).cpu().numpy().view(str(dtype).rpartition(".")[2]))


def in_graph_task() -> bool:
    """Whether this thread runs a backward pass."""
    found = getattr(torch._C, "_current_graph_task_id", None)  # torch 2.0
    if found is not None:
        return bool(found() != -1)
    try:
        torch.autograd.Variable._execution_engine.queue_callback(_nothing)  # type: ignore[attr-defined]
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    pass


def in_functorch() -> bool:
    found = getattr(torch._C, "_are_functorch_transforms_active", None)  # torch 2.1
    if found is not None:
        return bool(found())
    functorch = getattr(torch._C, "_functorch", None)
    peek = getattr(functorch, "peek_interpreter_stack", None)
    return peek is not None and peek() is not None


def allow_in_files(*classes: type) -> None:
    """Classes that `torch.load(weights_only=True)` may make."""
    allow = getattr(torch.serialization, "add_safe_globals", None)  # torch 2.4
    if allow is not None:
        allow(list(classes))


def fork_rng(devices: Any, device_type: str) -> Any:
    try:
        return torch.random.fork_rng(devices=devices, device_type=device_type)
    except TypeError:  # torch 2.0 and before: CUDA alone
        return torch.random.fork_rng(devices=devices)


def partial_average() -> Any:
    """How a gradient that each rank has a share of becomes one."""
    try:
        from torch.distributed.tensor import Partial  # torch 2.5
    except ImportError:
        from torch.distributed._tensor import Partial  # type: ignore[attr-defined, no-redef]
    return Partial("avg")


try:
    from torch.utils.flop_counter import FlopCounterMode  # torch 2.1
except ImportError:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:  # torch 1.12 and before

        class TorchDispatchMode:  # type: ignore[no-redef]
            def __enter__(self) -> Any:
                raise RuntimeError("counting the FLOPs of a model needs torch 1.13 or newer")

            def __exit__(self, *exception: object) -> None:
                pass

    class FlopCounterMode(TorchDispatchMode):  # type: ignore[no-redef]
        """Counts matrix products."""

        def __init__(self, display: bool = False) -> None:
            super().__init__()
            self.total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.__name__.split(".")[0]
            if name in ("mm", "bmm", "addmm", "baddbmm"):
                left = args[1] if name in ("addmm", "baddbmm") else args[0]
                self.total += 2 * out.numel() * left.shape[-1]
            return out

        def get_total_flops(self) -> int:
            return self.total
