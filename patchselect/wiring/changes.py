"""What became of the blocks of a tower since `apply`: looked at in each call of the tower, by identity alone."""

from __future__ import annotations

from typing import Any, Tuple

from torch import nn

from ..adapter import Tower
from .plan import Plan

Path = Tuple[str, ...]


def place_of_blocks(tower: Tower) -> Path | None:
    """Return the names that lead from a tower to the module that holds its blocks; `None` if no single one does."""
    for path, part in tower.module.named_modules():
        if _change(tower, part) is None:
            return tuple(path.split(".")) if path else ()
    return None


def check_unchanged(plan: Plan, tower: Tower, place: Path | None) -> None:
    """Raise a ValueError if blocks were exchanged or deleted since `apply`, or a selecting one has another class.

    Wrappers around a block, subclasses on top of its own and exchanged parts inside of it are fine.
    """
    changed = None
    if place is not None:
        holder: Any = tower.module
        for name in place:
            while name not in holder._modules and len(holder._modules) == 1:  # a wrapper
                holder = next(iter(holder._modules.values()))
            holder = holder._modules.get(name)
            if holder is None:
                changed = f"its {name} is gone"
                break
        else:
            changed = _change(tower, holder)
    if changed is None:
        for index in plan.layers:
            kind = type(tower.blocks[index])
            if not hasattr(kind, "_patchselect_base"):
                changed = f"block {index} was given another class, {kind.__module__}.{kind.__qualname__}"
                break
    if changed is not None:
        raise ValueError(
            f"the blocks of {type(tower.module).__name__} were changed after patchselect.apply: {changed}. Call "
            "patchselect.remove(model), and patchselect.apply again when the model is as it shall be; methods that "
            "replace the blocks themselves (token merging) cannot be combined with selection"
        )


def _change(tower: Tower, holder: nn.Module) -> str | None:
    held = list(holder._modules.values())
    if len(held) != len(tower.blocks):
        return f"there were {len(tower.blocks)}, there are {len(held)}"
    for index, block in enumerate(tower.blocks):
        found: Any = held[index]
        while found is not block:
            if found is None or len(found._modules) != 1:  # no wrapper around it
                return f"block {index} is another one ({type(held[index]).__name__})"
            found = next(iter(found._modules.values()))
    return None
