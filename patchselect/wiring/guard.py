"""Is a block what its adapter takes it for? Its own `forward` is compared once with the two halves that replace it."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..compat import fork_rng, without_modes
from .alike import likeness
from .plan import Plan
from .state import STATE
from .swapping import own_class

PATCHES = 3
"""How many patches the comparison runs on, besides the prefix tokens."""
COUNTED = 1e-2
"""How far attention that counts sizes may be from the host's, of what it adds: kernels and TF32 round otherwise."""
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def check_blocks(plan: Plan, tower: Tower) -> dict[int, tuple[str, ...]]:
    """Check every block that selects, merges or counts sizes; blocks that are alike but for their weights once.

    Returns:
        Of each, the parts that its own attention calls and attention that counts sizes does not, or the other way.

    Raises:
        TypeError: as `check_halves`.
        ValueError: as `check_halves`, with sizes.
    """
    seen: dict[Any, tuple[str, ...]] = {}
    found = {}
    for index, block in enumerate(tower.blocks):
        if index in plan.layers or plan.counts(index):
            kind = likeness(block)
            if kind not in seen:
                seen[kind] = check_halves(tower, index, plan)
                _check_weights(tower, index)
            found[index] = seen[kind]
    return found


def check_halves(tower: Tower, index: int, plan: Plan | None = None) -> tuple[str, ...]:
    """Raise a TypeError unless `attend` and `finish` of the adapter are the forward of block `index`.

    Where attention is to count sizes, raise a ValueError unless `attend_sized` with sizes of 1 is `attend`; return the
    names of the parts that one of the two calls and the other does not.

    Both run on a few random tokens, in the dtype and on the device of the block, in evaluation mode, on a copy that
    shares its weights; norms, biases and scales are random there, so that nothing is hidden by ones and zeros. Neither
    the block nor any random state changes. Nothing is compared where nothing can be computed: weights in shards
    (FSDP2, tensor parallelism, ZeRO), offloaded ones, and types that this device has no kernels for. On the meta
    device the shapes are compared.
    """
    block = tower.blocks[index]
    if _is_elsewhere(block):
        return ()
    generator, device = torch.Generator().manual_seed(0), next(block.parameters()).device
    with without_modes():
        twin = _twin(block, generator, {})
        tokens = torch.randn(1, tower.num_prefix_tokens + PATCHES, tower.width, generator=generator, device="cpu")
        tokens = tokens if tower.batch_first else tokens.transpose(0, 1)
    here = [] if device.type in ("cpu", "meta") else [device]
    kind = "cuda" if device.type in ("cpu", "meta") else device.type
    autocast = torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
    with without_modes(), torch.no_grad(), fork_rng(devices=here, device_type=kind), autocast:
        own, tokens, error = _own(tower, twin, tokens.to(device))
        if error is not None:
            if isinstance(error, RuntimeError) and (device.type == "meta" or "not implemented" in str(error)):
                return ()
            raise TypeError(_refusal(tower, index, f"cannot be compared with them, as it raised {_said(error)}"))
        try:
            attended, called, found = _halves(tower, twin, tokens)
        except Exception as raised:
            raise TypeError(_refusal(tower, index, f"ran where they raised {_said(raised)}")) from raised
        difference = _difference(own, found, tokens)
        if difference is not None:
            raise TypeError(_refusal(tower, index, difference))
        if plan is None or not (plan.follows_sizes and plan.sizes):
            return ()
        try:
            counted, by_us = _counted(tower, twin, tokens)
        except Exception as raised:
            raise ValueError(cannot_count(plan, tower, index, f"raised {_said(raised)}")) from raised
        if _difference(attended, counted, tokens, COUNTED) is not None:
            raise ValueError(cannot_count(plan, tower, index, "computes it otherwise than the block does"))
    return tuple(sorted(called ^ by_us))


def _check_weights(tower: Tower, index: int) -> None:
    try:
        tower.adapter.projections(tower.blocks[index])
    except AttributeError as error:
        raise TypeError(
            f"block {index} of {type(tower.module).__name__} computes as the adapter {tower.adapter.name!r} says, but "
            f"its weights are not where it looks for them: {error}"
        ) from error


def cannot_count(plan: Plan, tower: Tower, index: int, why: str) -> str:
    """Say that the attention of a block cannot count sizes, and what to do."""
    return (
        f"the attention of block {index} of {type(tower.module).__name__} cannot count how many patches a token stands "
        f"for: the {tower.adapter.name} adapter {why}"
        + (". Use sizes=False (merge alone), or merge=0" if plan.merge else ". Leave sizes out")
    )


def _refusal(tower: Tower, index: int, what: str) -> str:
    kind = own_class(type(tower.blocks[index]))
    return (
        f"block {index} of {type(tower.module).__name__} cannot select: the adapter {tower.adapter.name!r} runs its "
        f"attention and its MLP one by one, and the forward of {kind.__module__}.{kind.__qualname__} {what}. Leave "
        "this block out of layers (without merge and sizes, if it does not select), or say how it computes: "
        "apply(model, adapter=…) with a patchselect.Adapter of your own, whose attend and finish are its two halves "
        "(and sample_call what it is called with)"
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_elsewhere(block: nn.Module) -> bool:
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
    return _twin(module, torch.Generator().manual_seed(0), {})


def _twin(module: nn.Module, generator: torch.Generator, seen: dict[int, nn.Module]) -> Any:
    """Copy a block without its weights: in evaluation mode, without selection and without the hooks of its users.

    Hooks of torch itself that make a weight (weight norm, spectral norm, pruning) stay.
    """
    if id(module) in seen:
        return seen[id(module)]
    kind: Any = own_class(type(module))
    twin = seen[id(module)] = kind.__new__(kind)
    state = {name: value.copy() if type(value) in (dict, list, set) else value for name, value in vars(module).items()}
    state.pop(STATE, None)
    for name in HOOKS:
        state[name] = type(state[name])((k, hook) for k, hook in state[name].items() if _makes_weights(hook))
    state["training"] = False
    of_block = not seen.keys() - {id(module)}
    state["_parameters"] = type(state["_parameters"])(
        (name, _shaken(tensor, of_block, generator)) for name, tensor in state["_parameters"].items()
    )
    state["_buffers"] = state["_buffers"].copy()
    state["_modules"] = type(state["_modules"])(
        (name, None if child is None else _twin(child, generator, seen)) for name, child in state["_modules"].items()
    )
    vars(twin).update(state)
    return twin


def _makes_weights(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def _shaken(tensor: Any, of_block: bool, generator: torch.Generator) -> Any:
    """Return a parameter as it is; a vector (norm, bias, scale) or one of the block itself with noise on it."""
    if type(tensor) is not nn.Parameter or not tensor.is_floating_point() or not (of_block or tensor.dim() < 2):
        return tensor
    noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype)
    return nn.Parameter(tensor.detach() + 0.1 * noise, requires_grad=False)


def _call(tower: Tower, twin: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the adapter calls a block with, and `None` for whatever else its forward cannot do without."""
    args, kwargs = tower.adapter.sample_call(tower, twin, tokens)
    asked = list(inspect.signature(type(twin).forward).parameters.values())[1 + len(args) :]
    named = (p for p in asked if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty)
    return args, {**{parameter.name: None for parameter in named}, **kwargs}


def _own(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Any, Tensor, Exception | None]:
    """Run the forward of a block; its tokens are of whichever dtype among its weights it takes."""
    first: Exception | None = None
    for dtype in _dtypes(twin):
        given = tokens.to(dtype)
        args, kwargs = _call(tower, twin, given)
        torch.manual_seed(0)
        try:
            return type(twin).forward(twin, *args, **kwargs), given, None
        except Exception as error:
            first = first or error
    return None, tokens, first


def _dtypes(block: nn.Module) -> Iterator[torch.dtype]:
    found = [tensor.dtype for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()]
    return iter(dict.fromkeys(found) or [torch.float32])


def _halves(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Tensor, set[str], Any]:
    """Return the tokens after the first half, the names of the parts that it called, and the output of the second."""
    args, kwargs = _call(tower, twin, tokens)
    torch.manual_seed(0)
    with _heard(twin) as called:
        attended = tower.adapter.attend(tower, twin, *args, **kwargs)
    return attended.tokens, called, tower.adapter.finish(tower, twin, attended.tokens, attended.rest)


def _counted(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Tensor, set[str]]:
    """Run attention that counts sizes of 1; return the tokens after it, and the names of the parts that it called."""
    args, kwargs = _call(tower, twin, tokens)
    rows = tokens if tower.batch_first else tokens.transpose(0, 1)
    ones = torch.ones(rows.shape[:2], device=tokens.device)
    with _heard(twin) as called:
        found = tower.adapter.attend_sized(tower, twin, ones, *args, **kwargs).tokens
    return found, called


@contextmanager
def _heard(twin: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the parts that are called."""
    called: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs, path=path: called.add(path))  # type: ignore[misc]
        for path, part in twin.named_modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _difference(own: Any, found: Any, tokens: Tensor, share: float = 1e-3) -> str | None:
    """Say how two outputs of a block differ; `None` if they do not, to rounding."""
    if _shape(own) != _shape(found):
        return f"returns {_shape(own)}, where they return {_shape(found)}"
    for left, right in zip(_tensors(own), _tensors(found)):
        if left.is_meta or right.is_meta or not left.is_floating_point():
            continue
        left, right = left.double() if left.device.type == "cpu" else left.float(), right.to(left.device)
        right = right.to(left.dtype)
        added = left - tokens.to(left.dtype) if left.shape == tokens.shape else left
        allowed = share * _largest(added) + 32 * torch.finfo(tokens.dtype).eps * _largest(left)
        differs = _largest(left - right)
        if differs > allowed:
            return f"gives other numbers: they differ by {differs:.2g} where it adds up to {_largest(added):.2g}"
    return None


def _largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude; where both compute alike, what is no number in one is none in the other."""
    return float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max()) if tensor.numel() else 0.0


def _shape(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, (list, tuple)):
        return [_shape(item) for item in output]
    return {name: _shape(item) for name, item in output.items()} if isinstance(output, Mapping) else type(output)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
