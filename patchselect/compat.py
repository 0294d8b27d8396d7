"""What older releases of Python and torch lack, in one place."""

from __future__ import annotations

import inspect
import math
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._python_dispatch
import torch.utils.checkpoint
from torch import Tensor

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
KEEPS_STORAGES = RELEASE >= (2, 4)
TRACES = RELEASE >= (1, 13)
_compiler: Any = getattr(torch, "compiler", None)

if hasattr(_compiler, "is_compiling"):  # torch 2.3
    is_compiling = _compiler.is_compiling
    is_dynamo_compiling = _compiler.is_dynamo_compiling
elif hasattr(torch._utils, "is_compiling"):  # torch 2.1; dynamo's own would bring transformers along
    is_compiling = is_dynamo_compiling = torch._utils.is_compiling
else:  # torch 2.0: dynamo says it in no way; torch 1: there is none

    def is_compiling() -> bool:
        return False

    is_dynamo_compiling = is_compiling

if hasattr(_compiler, "is_exporting"):  # torch 2.7
    is_exporting = _compiler.is_exporting
else:

    def is_exporting() -> bool:
        return bool(torch.onnx.is_in_onnx_export())


def uncompiled(function: Any) -> Any:
    """Return a function that runs outside of compiled graphs, with all that it calls; imports dynamo."""
    return getattr(_compiler, "disable", lambda same: same)(function)  # torch 2.1


def forget_compiled() -> None:
    """Let dynamo look at all modules again; before torch 2.7 it does not see that one has another class (2.1: seen)."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and RELEASE < (2, 7):
        dynamo.reset()


KEEPS_GRAPH = (
    "call checkpoint(..., use_reentrant=False)"
    if "use_reentrant" in inspect.signature(torch.utils.checkpoint.checkpoint).parameters  # torch 1.11
    else None
)
"""How torch checkpoints without losing the graph of what a block reads besides its arguments, if it can."""


def memory_of(tensor: Tensor) -> Any:
    """Return an object that lives as long as the memory of `tensor`."""
    # On torch 2.1 the finalizer of a storage never runs, and before it the object around a storage is made anew for
    # each call; the tensor lives on. 2.4.1 is right.
    return tensor.untyped_storage() if KEEPS_STORAGES else tensor


def address_of(tensor: Tensor) -> int:
    """Return a number that all views of one memory share."""
    held = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return int(held._cdata if KEEPS_STORAGES else held.data_ptr())


def bits_of(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Read the memory of a flat tensor as another type."""
    try:
        return flat.view(dtype)
    except RuntimeError:  # torch 1.10: types of one size alone
        alike = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        return torch.from_numpy(flat.view(alike).cpu().numpy().view(str(dtype).rpartition(".")[2]))


def in_graph_task() -> bool:
    """Tell whether this thread runs a backward pass."""
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


def refuse_old_trace() -> None:
    """Raise where `torch.jit.trace` gives other numbers than the model: a fused token under torch 1.10 (seen)."""
    if not TRACES and torch.jit.is_tracing():
        raise ValueError(f"torch.jit.trace of a selection needs torch 1.13 or newer, this is {torch.__version__}")


def baked_in(tensor: Tensor) -> bool:
    """Tell whether `torch.jit.trace`, if it is running, takes a tensor for a constant: made of none of its inputs."""
    if is_compiling() or not torch.jit.is_tracing():
        return False
    traced: Any = torch._C
    values: list[Any] = [traced._get_value_trace(tensor)]
    seen: set[str] = set()
    while values:
        node = values.pop().node()
        if node.kind() in ("prim::Param", "prim::GetAttr"):
            return False
        inputs = [value for value in node.inputs() if value.debugName() not in seen]
        seen.update(value.debugName() for value in inputs)
        values += inputs
    return True


def without_modes() -> Any:
    """Leave out of what runs inside whatever counts, fakes or watches the operations of this thread."""
    leave = getattr(torch.utils._python_dispatch, "_disable_current_modes", None)  # torch 2.1
    return nullcontext() if leave is None else leave()


def watched() -> bool:
    """Tell whether something counts, fakes or watches the operations of this thread."""
    count = getattr(torch._C, "_len_torch_dispatch_stack", None)  # torch 2.0
    if count is not None:
        return bool(count())
    mode = getattr(torch._C, "_get_torch_dispatch_mode", None)  # torch 1.13
    return mode is not None and mode() is not None


def load_tensors(path: Any) -> Any:
    """Load a file of tensors, without running code of the file where torch can (1.13)."""
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, weights_only=True)
    return torch.load(path)


def allow_in_files(*classes: type) -> None:
    """Name classes that `torch.load(weights_only=True)` may make."""
    allow = getattr(torch.serialization, "add_safe_globals", None)  # torch 2.4
    if allow is not None:
        allow(list(classes))


def fork_rng(devices: Any, device_type: str) -> Any:
    try:
        return torch.random.fork_rng(devices=devices, device_type=device_type)
    except TypeError:  # torch 2.0 and before: CUDA alone
        return torch.random.fork_rng(devices=devices)


if hasattr(F, "scaled_dot_product_attention"):  # torch 2.0
    SCALES = RELEASE >= (2, 1)

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
        """Return `softmax(q k^T * scale + mask) v` of `(B, H, N, E)`."""
        if SCALES:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        return F.scaled_dot_product_attention(query * (scale * query.shape[-1] ** 0.5), key, value, mask, dropout)

else:

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
        """Return `softmax(q k^T * scale + mask) v` of `(B, H, N, E)`, with the map: older releases fuse none."""
        logits = (query * scale) @ key.transpose(-1, -2)
        weights = (logits if mask is None else logits + mask).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value


def partial_average() -> Any:
    """Return the placement by which a gradient that each rank has a share of becomes one."""
    try:
        from torch.distributed.tensor import Partial  # torch 2.5
    except ImportError:
        from torch.distributed._tensor import Partial  # type: ignore[attr-defined, no-redef]
    return Partial("avg")


def _flops(name: str, shapes: Any) -> int:
    """Return what a matrix product of these shapes costs, and 0 for everything else."""
    if name not in ("mm", "bmm", "addmm", "baddbmm"):
        return 0
    left, right = shapes[1:3] if "add" in name else shapes[:2]
    return int(2 * math.prod(left) * right[-1])


try:
    from torch.utils.flop_counter import FlopCounterMode  # torch 2.1
except ImportError:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode  # torch 1.13

        class FlopCounterMode(TorchDispatchMode):  # type: ignore[no-redef]
            """Counts matrix products as they are dispatched."""

            def __init__(self, display: bool = False) -> None:
                super().__init__()
                self.total = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.total += _flops(func.__name__.split(".")[0], [getattr(arg, "shape", ()) for arg in args])
                return func(*args, **(kwargs or {}))

            def get_total_flops(self) -> int:
                return self.total

    except ImportError:

        class FlopCounterMode:  # type: ignore[no-redef]
            """Counts matrix products by the shapes that the profiler saw; it writes lines of its own from 1.13 on."""

            def __init__(self, display: bool = False) -> None:
                self.seen: Any = torch.autograd.profiler.profile(record_shapes=True)

            def __enter__(self) -> Any:
                self.seen.__enter__()
                return self

            def __exit__(self, *exception: Any) -> None:
                self.seen.__exit__(*exception)

            def get_total_flops(self) -> int:
                return sum(_flops(e.name.replace("aten::", ""), e.input_shapes) for e in self.seen.function_events)


class _NoModules:
    """Stands in for what tells torch's counter in which module an operation runs: all of them count as one."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


def flop_counter() -> Any:
    """Return torch's counter of FLOPs, for totals alone.

    By module it cannot count a module that is given a parameter (the latents of an attention pool) while no gradients
    are taken: it asks for the gradient function of what has none.
    """
    counter: Any = FlopCounterMode(display=False)
    if hasattr(counter, "mod_tracker"):
        counter.mod_tracker = _NoModules()
    return counter
