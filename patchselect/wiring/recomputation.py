"""Gradient checkpointing: a block that runs a second time finds the text, and the places, of its first run.

It runs again in the backward pass, when its text is long out of scope (and, on an accelerator, in another thread). What
both runs share is the memory of the block's input: the checkpoint keeps it alive for exactly as long as it may be
recomputed. So the text is noted under that memory, and dies with it.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Callable, Tuple

import torch
from torch import Tensor

from ..compat import address_of, in_functorch, in_graph_task, is_compiling, memory_of
from .guidance import Guidance

_Key = Tuple[int, int, int]
_noted: dict[_Key, tuple[Guidance, bool]] = {}
_recorded: dict[_Key, bool] = {}
_placed: dict[_Key, Any] = {}
_sized: dict[_Key, Any] = {}
_followed: dict[_Key, Any] = {}
_parted: dict[_Key, Any] = {}
_carried: dict[_Key, dict[str, Any]] = {}


def _key(hidden: Tensor, reader: object) -> _Key:
    return address_of(hidden), int(hidden.storage_offset()), id(reader)


def _keep(table: dict[_Key, Any], hidden: Tensor, reader: object, value: Any) -> None:
    """Note `value` for as long as the memory of `hidden` lives."""
    key = _key(hidden, reader)
    if key not in table:
        weakref.finalize(memory_of(hidden), table.pop, key, None)
    table[key] = value


def in_backward() -> bool:
    """Tell whether this thread is inside of a backward pass: a block that runs there is being recomputed."""
    return not is_compiling() and in_graph_task()


def may_be_recomputed(hidden: Tensor, *others: Tensor) -> bool:
    """Tell whether a block may run again on this input."""
    if is_compiling() or torch.is_inference_mode_enabled():
        return False
    if in_functorch():  # their tensors have no memory of their own
        return False
    # The weights of the block itself may be the first that train, so the input need not ask for a gradient.
    return torch.is_grad_enabled() or any(tensor.requires_grad for tensor in (hidden, *others))


def without_grad_in_training(hidden: Tensor) -> bool:
    """Tell whether a block runs without gradients on an input that has one: reentrant checkpointing's first run."""
    return may_be_recomputed(hidden) and not torch.is_grad_enabled()


def note_text(hidden: Tensor, reader: object, guidance: Guidance) -> None:
    """Note the text of a block's first run."""
    if not may_be_recomputed(hidden, guidance.text):
        return
    kept = dataclasses.replace(guidance, outer=None, memo=(), opened_by=None, stashes={}, memories={})
    earlier = _noted.get(_key(hidden, reader))
    if earlier is not None and earlier[0].text is not guidance.text:
        kept = dataclasses.replace(kept, pairing="ambiguous")
    _keep(_noted, hidden, reader, (kept, torch.is_grad_enabled()))


def note_recording(hidden: Tensor, reader: object) -> None:
    """Note that a run was recorded: what is recorded is part of the graph, and a recomputation computes it again."""
    if may_be_recomputed(hidden):
        _keep(_recorded, hidden, reader, True)


def was_recorded(hidden: Tensor, reader: object) -> bool:
    """Tell whether the first run on this input was recorded."""
    return _key(hidden, reader) in _recorded


def note_places(hidden: Tensor, reader: object, places: Any) -> None:
    """Note where the patches of a block's first run stood in the image."""
    if may_be_recomputed(hidden):
        _keep(_placed, hidden, reader, places)


def recalled_places(hidden: Tensor, reader: object) -> Any:
    """Return where the patches of the first run on this input stood; `None` if nobody noted it."""
    return _placed.get(_key(hidden, reader))


def note_sizes(hidden: Tensor, reader: object, counted: Any) -> None:
    """Note what the tokens of a block's first run stood for."""
    if may_be_recomputed(hidden):
        _keep(_sized, hidden, reader, counted)


def recalled_sizes(hidden: Tensor, reader: object) -> Any:
    """Return what the tokens of the first run on this input stood for; `None` if nobody noted it."""
    return _sized.get(_key(hidden, reader))


def note_followed(hidden: Tensor, reader: object, places: Tensor) -> None:
    """Note which patches the tokens of a block's first run were."""
    if may_be_recomputed(hidden):
        _keep(_followed, hidden, reader, places)


def recalled_followed(hidden: Tensor, reader: object) -> Any:
    """Return which patches the tokens of the first run on this input were; `None` if nobody noted it."""
    return _followed.get(_key(hidden, reader))


def note_parts(hidden: Tensor, reader: object, parts: Any) -> None:
    """Note which rows of a block's first run had how many patches."""
    if may_be_recomputed(hidden):
        _keep(_parted, hidden, reader, parts)


def recalled_parts(hidden: Tensor, reader: object) -> Any:
    """Return which rows of the first run on this input had how many patches; `None` if nobody noted it."""
    return _parted.get(_key(hidden, reader))


def carried_over(hidden: Tensor, reader: object, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` says of this call of a block; in a recomputation, what it said of the first run."""
    if in_backward():
        again = _carried.get(_key(hidden, reader))
        if again is not None:
            return again
    found = find()
    if found and may_be_recomputed(hidden):
        _keep(_carried, hidden, reader, found)
    return found


def recalled_text(hidden: Tensor, reader: object, instead: Callable[[], str]) -> Guidance | None:
    """Return the guidance that was current when this block first ran on this input.

    Raises:
        RuntimeError: there were two, or its text needs a gradient that reentrant checkpointing cannot carry; `instead`
            says what would.
    """
    found = _noted.get(_key(hidden, reader))
    if found is None:
        return None
    guidance, had_grad = found
    if guidance.pairing == "ambiguous":
        raise RuntimeError(
            "one block input was guided by two texts under gradient checkpointing, so its recomputation cannot tell "
            "them apart: clone the tokens before each guided run, or turn checkpointing off for them"
        )
    if not had_grad and guidance.text.requires_grad:
        raise RuntimeError(
            "reentrant gradient checkpointing cannot carry a gradient to the text that guides the selection: "
            f"{instead()}, or give guide() detached text features"
        )
    return guidance
