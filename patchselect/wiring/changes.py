"""What became of the parts of a tower since `apply`: looked at in each call of the tower, by identity alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Tuple

from torch import nn

from ..adapter import Tower
from ..hooked import hooks_of_users
from ..weights import runs_own_class
from .plan import Plan
from .swapping import own_class

Path = Tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """Where a tower held its parts when the selection was put in."""

    blocks: Path | None
    final_norm: Path | None
    unheard: tuple[tuple[int, Path, Any], ...] = ()
    """Block, place in it and class of each part that the host calls where attention that counts sizes does not."""


def places_of(tower: Tower, apart: Mapping[int, tuple[str, ...]]) -> Places:
    """Note where the parts of a tower are; `apart` are the names of those that only one way of attention calls."""
    norm = next((path for path, part in tower.module.named_modules() if part is tower.final_norm), None)
    unheard = [
        (index, tuple(path.split(".")), own_class(type(tower.blocks[index].get_submodule(path))))
        for index, paths in apart.items()
        for path in paths
    ]
    return Places(_place_of_blocks(tower), tuple(norm.split(".")) if norm else None, tuple(unheard))


def _place_of_blocks(tower: Tower) -> Path | None:
    """Return the names that lead from a tower to the module that holds its blocks; `None` if no single one does."""
    for path, part in tower.module.named_modules():
        if _change(tower, part) is None:
            return tuple(path.split(".")) if path else ()
    return None


def check_unchanged(plan: Plan, tower: Tower, places: Places) -> None:
    """Raise a ValueError if blocks were exchanged or deleted since `apply`, or a selecting one has another class.

    Wrappers around a block, subclasses on top of its own and exchanged parts inside of it are fine, but for parts that
    attention which counts sizes does not call: those may be exchanged for their like alone, and have no hooks. An
    exchanged final norm is read from now on.
    """
    changed = None
    if places.blocks is not None:
        holder: Any = tower.module
        for name in places.blocks:
            while name not in holder._modules and len(holder._modules) == 1:  # a wrapper
                holder = next(iter(holder._modules.values()))
            holder = holder._modules.get(name)
            if holder is None:
                changed = f"its {name} is gone"
                break
        else:
            changed = _change(tower, holder)
    if changed is None:
        for index, block in enumerate(tower.blocks):
            kind = type(block)
            if (index in plan.layers or plan.counts(index)) and not hasattr(kind, "_patchselect_base"):
                changed = f"block {index} was given another class, {kind.__module__}.{kind.__qualname__}"
                break
    if changed is None:
        changed = _unheard(tower, places)
    if changed is None and places.final_norm is not None:
        norm = _at(tower.module, places.final_norm)
        if norm is None:
            changed = f"its {'.'.join(places.final_norm)} is gone"
        elif norm is not tower.final_norm:
            tower.final_norm = norm
    if changed is not None:
        raise ValueError(
            f"the blocks of {type(tower.module).__name__} were changed after patchselect.apply: {changed}. Call "
            "patchselect.remove(model), and patchselect.apply again when the model is as it shall be; methods that "
            "replace the blocks themselves (token merging) cannot be combined with selection"
        )


def check_heard(tower: Tower, places: Places) -> None:
    """Raise a ValueError if something hangs on a part that attention which counts sizes does not call."""
    found = _unheard(tower, places)
    if found is not None:
        raise ValueError(f"attention of {type(tower.module).__name__} cannot count sizes: {found}")


def _unheard(tower: Tower, places: Places) -> str | None:
    kind: Any
    for index, path, kind in places.unheard:
        part: Any = _at(tower.blocks[index], path)
        what = f"the {'.'.join(path)} of block {index}"
        instead = "and attention that counts sizes computes without it: use sizes=False, or take that away"
        if part is None or (type(part).forward is not kind.forward and own_class(type(part)) is not kind):
            return f"{what} is another one ({type(part).__name__}), {instead}"
        if hooks_of_users(part) or not runs_own_class(part):
            return f"{what} has hooks or a forward of its own, {instead}"
    return None


def _at(module: nn.Module, path: Path) -> nn.Module | None:
    found: Any = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found  # type: ignore[no-any-return]


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
