"""Finding the vision towers of a model."""

from __future__ import annotations

import torch
from torch import nn

from .adapter import Adapter, Tower


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
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise TypeError("this model is already compiled: call patchselect.apply first, torch.compile after it")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
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

    Raises:
        ValueError: no adapter of that name.
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
    for candidate in adapters:
        towers = candidate.towers(model)
        if towers:
            return towers
    asked = "no adapter knows" if adapter is None else f"adapter {adapters[0].name!r} does not know"
    raise TypeError(
        f"{asked} {type(model).__module__}.{type(model).__qualname__}: nothing was changed. Supported are plain "
        f"pre-norm ViT towers of the adapters {names}; pass the model that holds one, or the tower itself"
    )
