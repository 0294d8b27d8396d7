"""Finding the vision towers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Tuple

import torch
from torch import nn

from .adapter import Adapter, Tower

CHECKPOINTED = "_checkpoint_wrapped_module"
"""Where `checkpoint_wrapper` and `offload_wrapper` of torch hold the module that they wrap."""
Place = Tuple[nn.Module, str]
"""A parent and the name of one of its children."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that `apply` works on.

    Raises:
        TypeError: not a module, or wrapped in something that would hide the selection or break it.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError("a TorchScript model cannot be patched: apply to the Python model that it was made from")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "nn.DataParallel is not supported (its threads do not see the text): apply to model.module and use "
            "DistributedDataParallel"
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError("this model is already compiled: call patchselect.apply first, torch.compile after it")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if CHECKPOINTED in model._modules:
        return unwrapped(model.get_submodule(CHECKPOINTED))
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise TypeError(f"{scripted[0]!r} of this model is TorchScript, which cannot be patched")
    return model


def known_adapters() -> tuple[Adapter, ...]:
    """The registry, in the order in which adapters are asked."""
    from patchselect.adapters import ADAPTERS

    return ADAPTERS


def find_towers(model: nn.Module, adapter: str | Adapter | None = None) -> list[Tower]:
    """The vision towers of `model`, from the first adapter that knows it, or from the one that is named.

    Blocks in torch's `checkpoint_wrapper` are found inside of it, as if it had come after `apply`.

    Raises:
        ValueError: no adapter of that name; blocks in a wrapper of another kind.
        TypeError: no adapter knows this model, or one does and cannot support it.
    """
    adapters = known_adapters()
    names = ", ".join(repr(known.name) for known in adapters)
    if isinstance(adapter, Adapter):
        adapters = (adapter,)
    elif adapter is not None:
        adapters = tuple(known for known in adapters if known.name == adapter)
        if not adapters:
            raise ValueError(f"there is no adapter {adapter!r}; there are {names}")
    with _replaced(_checkpointed(model)):
        _refuse_wrapped_blocks(model, adapters)
        for candidate in adapters:
            towers = candidate.towers(model)
            if towers:
                return towers
    asked = "no adapter knows" if adapter is None else f"adapter {adapters[0].name!r} does not know"
    raise TypeError(
        f"{asked} {type(model).__module__}.{type(model).__qualname__}: nothing was changed. Supported are plain "
        f"pre-norm ViT towers of the adapters {names}; pass the model that holds one, or the tower itself"
    )


@contextmanager
def _replaced(children: Mapping[Place, nn.Module]) -> Iterator[None]:
    """Other modules in the places of some, until the end of the `with` block."""
    before = {(parent, name): parent._modules[name] for parent, name in children}
    try:
        for (parent, name), child in children.items():
            parent._modules[name] = child
        yield
    finally:
        for (parent, name), child in before.items():  # type: ignore[assignment]
            parent._modules[name] = child


def _checkpointed(model: nn.Module) -> dict[Place, nn.Module]:
    """What torch's activation wrappers in `model` hold, by the places of the outermost ones."""
    found = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and CHECKPOINTED in child._modules and CHECKPOINTED not in parent._modules:
                while CHECKPOINTED in child._modules:
                    child = child.get_submodule(CHECKPOINTED)
                found[parent, name] = child
    return found


def _refuse_wrapped_blocks(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raise if a tower is there that no adapter sees, or an adapter overlooks, because its blocks are wrapped."""
    inside: dict[Place, Any] = {}
    for parent in model.modules():
        for name, child in parent._modules.items() if isinstance(parent, (nn.ModuleList, nn.Sequential)) else ():
            held = [] if child is None else list(child.children())
            if len(held) == 1 and len(list(held[0].children())) > 1:
                inside[parent, name] = held[0]
    if not inside:
        return
    seen = _count_towers(model, adapters)
    with _replaced(inside):
        hidden = _count_towers(model, adapters) - seen
    if hidden > 0:
        names = {f"{type(child).__module__}.{type(child).__qualname__}" for child in map(_child, inside)}
        raise ValueError(
            f"the blocks of a vision tower in {type(model).__name__} are wrapped in {', '.join(sorted(names))}, which "
            "hides them: call patchselect.apply first and wrap after it; to apply again, take the wrapper off before"
        )


def _child(place: Place) -> nn.Module:
    return place[0].get_submodule(place[1])


def _count_towers(model: nn.Module, adapters: Sequence[Adapter]) -> int:
    for candidate in adapters:
        try:
            towers = candidate.towers(model)
        except (AttributeError, TypeError, ValueError):
            return 0
        if towers:
            return len(towers)
    return 0
