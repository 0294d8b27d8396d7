"""Find the vision towers of a model: what stands around them, and which adapter knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Tuple

import torch
from torch import nn

from ..adapter import Adapter, Tower
from ..adapters import ADAPTERS
from .advice import unsupported

CHECKPOINTED = "_checkpoint_wrapped_module"
"""Where `checkpoint_wrapper` and `offload_wrapper` of torch hold the module that they wrap."""
Place = Tuple[nn.Module, str]
"""A parent and the name of one of its children."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that `apply` works on.

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
    if hasattr(type(model), "get_base_model"):  # PeftModel
        return unwrapped(model.get_base_model())  # type: ignore[operator]
    if type(model).__module__.startswith("peft.") and isinstance(getattr(model, "model", None), nn.Module):
        return unwrapped(model.model)  # type: ignore[arg-type] # LoraModel and its like, in a PeftModel
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        raise TypeError(f"{scripted[0]!r} of this model is TorchScript, which cannot be patched")
    return model


def find_towers(model: nn.Module, adapter: str | Adapter | None = None) -> list[Tower]:
    """Return the vision towers of `model`, from the first adapter that supports it, or from the one that is given.

    Blocks in torch's `checkpoint_wrapper` are found inside of it, as if it had come after `apply`. An adapter that
    knows a model and cannot support it is heard only when no other supports it.

    Raises:
        ValueError: no adapter of that name; blocks in a wrapper of another kind.
        TypeError: no adapter knows this model, or one does and cannot support it.
    """
    adapters = _chosen(adapter)
    with _replaced(_checkpointed(model)):
        _refuse_wrapped_blocks(model, adapters)
        towers, refusal = _asked(model, adapters)
        if towers:
            return towers
        asked = "no adapter knows" if adapter is None else f"adapter {adapters[0].name!r} does not know"
        raise unsupported(model, asked, _names(), lambda part: _towers_of(part, adapters), refusal)


def _chosen(adapter: str | Adapter | None) -> tuple[Adapter, ...]:
    if adapter is None:
        return ADAPTERS
    if isinstance(adapter, Adapter):
        return (adapter,)
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        raise TypeError(f"adapter must be an instance: write {adapter.__name__}(), not {adapter.__name__}")
    found = tuple(known for known in ADAPTERS if known.name == adapter)
    if not found:
        raise ValueError(f"there is no adapter {adapter!r}; there are {_names()}")
    return found


def _names() -> str:
    return ", ".join(repr(known.name) for known in ADAPTERS)


def _asked(model: nn.Module, adapters: Sequence[Adapter]) -> tuple[list[Tower], TypeError | None]:
    """Ask each adapter in turn; return the towers of the first that supports the model, and the first refusal."""
    refusal: TypeError | None = None
    for candidate in adapters:
        try:
            towers = candidate.towers(model)
        except TypeError as error:
            refusal = refusal or error
            continue
        except AttributeError as error:
            refusal = refusal or _lost(model, candidate, error)
            continue
        if towers:
            return towers, refusal
    return [], refusal


def _lost(model: nn.Module, adapter: Adapter, cause: AttributeError) -> TypeError:
    error = TypeError(
        f"{type(model).__name__} looks like a host of the adapter {adapter.name!r}, which does not find its way in it: "
        f"{cause}"
    )
    error.__cause__ = cause
    return error


@contextmanager
def _replaced(children: Mapping[Place, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of some, until the end of the `with` block."""
    before = {(parent, name): parent._modules[name] for parent, name in children}
    try:
        for (parent, name), child in children.items():
            parent._modules[name] = child
        yield
    finally:
        for (parent, name), child in before.items():  # type: ignore[assignment]
            parent._modules[name] = child


def _checkpointed(model: nn.Module) -> dict[Place, nn.Module]:
    """Return what torch's activation wrappers in `model` hold, by the places of the outermost ones."""
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
    seen = len(_towers_of(model, adapters))
    with _replaced(inside):
        hidden = len(_towers_of(model, adapters)) - seen
    if hidden > 0:
        names = {f"{type(child).__module__}.{type(child).__qualname__}" for child in map(_child, inside)}
        raise ValueError(
            f"the blocks of a vision tower in {type(model).__name__} are wrapped in {', '.join(sorted(names))}, which "
            "hides them: call patchselect.apply first and wrap after it; to apply again, take the wrapper off before"
        )


def _child(place: Place) -> nn.Module:
    return place[0].get_submodule(place[1])


def _towers_of(part: nn.Module, adapters: Sequence[Adapter]) -> list[Tower]:
    """Return the towers of a part of a model; parts are asked that no user would give, so anything may be missing."""
    try:
        return _asked(part, adapters)[0]
    except (AttributeError, ValueError):
        return []
