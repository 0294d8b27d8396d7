"""Parts of messages that several adapters say: the place of a part of a model, and masks over patches."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import nn

from ..adapter import Tower


def as_code(model: nn.Module, path: str) -> str:
    """Return how a user writes the part of `model` at `path`: `model.clip.vision_model`, `model[0].auto_model`."""
    code, part = "model", model
    for name in path.split(".") if path else ():
        if name.isdigit() and isinstance(part, (nn.Sequential, nn.ModuleList)):
            code += f"[{name}]"
        else:
            code += f".{name}" if name.isidentifier() else f".get_submodule({name!r})"
        part = part.get_submodule(name)
    return code


def instead_of_whole(model: nn.Module, path: str) -> str:
    """Return what to say of a model that cannot be patched, around a tower at `path` that can."""
    name, call = type(model).__name__, f"patchselect.apply({as_code(model, path)})"
    if _only_wraps(model, path):
        return (
            f"{name} only wraps the vision tower {path!r}: call {call}. {name} goes on calling it, and must take any "
            "number of tokens from it"
        )
    return (
        f"{name} cannot be patched as a whole: what reads the tokens of its vision tower {path!r} may need a fixed "
        f"number of patches. If it takes any number, call {call}"
    )


def _only_wraps(model: nn.Module, path: str) -> bool:
    """Tell whether each module on the way to `path` has no other child."""
    part = model
    for name in path.split("."):
        if [child for child, _ in part.named_children()] != [name]:
            return False
        part = part.get_submodule(name)
    return True


def refuse_masks(tower: Tower, given: dict[str, Any]) -> None:
    """Raise if a call of a tower, or of one of its blocks, got arguments that hide some patches from others.

    Args:
        tower: whose call it is.
        given: the arguments that would do so, by name; `None` and `False` hide nothing.

    Raises:
        ValueError: one of them does; names it, and the ways out.
    """
    masks = {name: value for name, value in given.items() if value is not None and value is not False}
    if not masks:
        return
    raise ValueError(
        f"{type(tower.module).__name__} was called with {' and '.join(masks)}, which hides patches by their place and "
        "would hide others after a selection: call it without (batch images of one size, crop regions), or take the "
        "selection out with patchselect.remove(model)"
    )


def refuse_symbols(tower: Tower, hidden: Any) -> None:
    """Raise a TypeError if a block is called with a stand-in of `torch.fx.symbolic_trace`."""
    if not isinstance(hidden, torch.fx.Proxy):
        return
    raise TypeError(
        f"torch.fx.symbolic_trace calls {type(tower.module).__name__} with stand-ins that have no shape, and which "
        "patches stay depends on how many there are: use torch.export, or trace before patchselect.apply or after "
        "patchselect.remove(model)"
    )
