"""Ask a block what it computes, without touching it: a copy that shares its weights runs on a few random tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..compat import fork_rng, without_modes
from .state import STATE
from .swapping import own_class

PATCHES = 3
"""How many patches a block is asked with, besides the prefix tokens."""
SMALL = 1 << 14
"""Up to how many numbers a parameter is a norm, a bias, a scale or a table of positions, which may start as zeros."""
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


@contextmanager
def asked(tower: Tower, block: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Give a copy of a block and one row of random tokens; no mode, gradient or random state is touched meanwhile."""
    generator, device = torch.Generator().manual_seed(0), next(block.parameters()).device
    with without_modes():
        twin = make_twin(block, generator, {})
        tokens = torch.randn(1, tower.num_prefix_tokens + PATCHES, tower.width, generator=generator, device="cpu")
        tokens = tokens if tower.batch_first else tokens.transpose(0, 1)
    here = [] if device.type in ("cpu", "meta") else [device]
    kind = "cuda" if device.type in ("cpu", "meta") else device.type
    autocast = torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
    with without_modes(), torch.no_grad(), fork_rng(devices=here, device_type=kind), autocast:
        yield twin, tokens.to(device)


def has_no_kernels(error: Exception, tokens: Tensor) -> bool:
    """Tell whether an error is about the device alone."""
    return isinstance(error, RuntimeError) and (tokens.is_meta or "not implemented" in str(error))


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_elsewhere(block: nn.Module) -> bool:
    """Tell whether weights are not here to compute with: shards, empty until gathered (ZeRO-3), offloaded, fake."""
    tensors = [*block.parameters(), *block.buffers()]
    away = any(hasattr(tensor, "full_tensor") or hasattr(tensor, "fake_mode") for tensor in tensors)
    empty = any(isinstance(tensor, nn.Parameter) and tensor.numel() == 0 for tensor in tensors)
    lazy = any(nn.parameter.is_lazy(tensor) for tensor in tensors)
    mixed = len({tensor.device for tensor in block.parameters()}) != 1
    hooked = any(hasattr(part, "_hf_hook") for part in block.modules()) and any(tensor.is_meta for tensor in tensors)
    return away or lazy or empty or mixed or hooked


def bare_twin(module: nn.Module) -> Any:
    """Copy a module without its weights and the hooks of its users, in evaluation mode; vectors get some noise."""
    return make_twin(module, torch.Generator().manual_seed(0), {})


def make_twin(module: nn.Module, generator: torch.Generator | None, seen: dict[int, nn.Module]) -> Any:
    """Copy a block without its weights: in evaluation mode, without selection and without the hooks of its users.

    Hooks of torch itself that make a weight (weight norm, spectral norm, pruning) stay. A forward that was set on a
    part and cannot be told to run its copy (a closure, fairscale's `checkpoint_wrapper`) runs the part itself, so the
    copy of that part gets no noise.
    """
    if id(module) in seen:
        return seen[id(module)]
    kind: Any = own_class(type(module))
    twin = seen[id(module)] = kind.__new__(kind)
    state = {name: value.copy() if type(value) in (dict, list, set) else value for name, value in vars(module).items()}
    state.pop(STATE, None)
    of_block = not seen.keys() - {id(module)}
    if not of_block and "forward" in state and _rebound(state["forward"], module, twin) is state["forward"]:
        generator = None
    for name in HOOKS:
        state[name] = type(state[name])((k, hook) for k, hook in state[name].items() if _makes_weights(hook))
    state["training"] = False
    state["_parameters"] = type(state["_parameters"])(
        (name, _shaken(tensor, of_block, generator)) for name, tensor in state["_parameters"].items()
    )
    state["_buffers"] = state["_buffers"].copy()
    state["_modules"] = type(state["_modules"])(
        (name, None if part is None else make_twin(part, generator, seen)) for name, part in state["_modules"].items()
    )
    vars(twin).update({name: _rebound(value, module, twin) for name, value in state.items()})
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """Return a method that was set on a module (`module.forward = …`, accelerate's partial ones) for its copy."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and any(given is module for given in value.args):
        given = (twin if part is module else part for part in value.args)
        return functools.partial(value.func, *given, **value.keywords)
    return value


def _makes_weights(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def _shaken(tensor: Any, of_block: bool, generator: torch.Generator | None) -> Any:
    """Return a parameter as it is; a vector, a small one (table) or one of the block itself with noise on it."""
    small = type(tensor) is nn.Parameter and (of_block or tensor.dim() < 2 or tensor.numel() <= SMALL)
    if generator is None or not small or not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype)
    return nn.Parameter(tensor.detach() + 0.1 * noise, requires_grad=False)


def call_of(tower: Tower, twin: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the adapter calls a block with, and `None` for whatever else its forward cannot do without."""
    args, kwargs = tower.adapter.sample_call(tower, twin, tokens)
    asked = list(inspect.signature(type(twin).forward).parameters.values())[1 + len(args) :]
    named = (p for p in asked if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty)
    return args, {**{parameter.name: None for parameter in named}, **kwargs}


def own_output(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Any, Tensor, Exception | None]:
    """Run the forward of a block; its tokens are of whichever dtype among its weights it takes."""
    first: Exception | None = None
    for dtype in _dtypes(twin):
        given = tokens.to(dtype)
        args, kwargs = call_of(tower, twin, given)
        torch.manual_seed(0)
        try:
            return type(twin).forward(twin, *args, **kwargs), given, None
        except Exception as error:
            first = first or error
    return None, tokens, first


def _dtypes(block: nn.Module) -> Iterator[torch.dtype]:
    found = [tensor.dtype for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()]
    return iter(dict.fromkeys(found) or [torch.float32])


def difference_of(own: Any, found: Any, tokens: Tensor, share: float = 1e-3) -> str | None:
    """Say how two outputs of a block differ; `None` if they do not, to rounding."""
    if _shape(own) != _shape(found):
        return f"returns {_shape(own)}, where they return {_shape(found)}"
    for left, right in zip(tensors_of(own), tensors_of(found)):
        if left.is_meta or right.is_meta or not left.is_floating_point():
            continue
        left, right = left.double() if left.device.type == "cpu" else left.float(), right.to(left.device)
        right = right.to(left.dtype)
        added = left - tokens.to(left.dtype) if left.shape == tokens.shape else left
        allowed = share * largest(added) + 32 * torch.finfo(tokens.dtype).eps * largest(left)
        differs = largest(left - right)
        if differs > allowed:
            return f"gives other numbers: they differ by {differs:.2g} where it adds up to {largest(added):.2g}"
    return None


def largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude; where both compute alike, what is no number in one is none in the other."""
    return float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max()) if tensor.numel() else 0.0


def _shape(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, (list, tuple)):
        return [_shape(item) for item in output]
    return {name: _shape(item) for name, item in output.items()} if isinstance(output, Mapping) else type(output)


def tensors_of(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(item)
