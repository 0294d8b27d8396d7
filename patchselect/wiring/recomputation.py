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


def _key(hidden: Tensor, reader: object) -> _Key:
    return address_of(hidden), int(hidden.storage_offset()), id(reader)


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


class FirstRuns:
    """What blocks noted in their first runs, each for as long as the memory of its input lives."""

    def __init__(self) -> None:
        self._found: dict[_Key, Any] = {}

    def __len__(self) -> int:
        return len(self._found)

    def note(self, hidden: Tensor, reader: object, value: Any) -> None:
        """Note what a block was told in its first run on `hidden`, if it may run again."""
        if may_be_recomputed(hidden):
            self.keep(hidden, reader, value)

    def keep(self, hidden: Tensor, reader: object, value: Any) -> None:
        """Note `value` for as long as the memory of `hidden` lives."""
        key = _key(hidden, reader)
        if key not in self._found:
            weakref.finalize(memory_of(hidden), self._found.pop, key, None)
        self._found[key] = value

    def recall(self, hidden: Tensor, reader: object) -> Any:
        """Return what was noted in the first run on this input; `None` if nothing was."""
        return self._found.get(_key(hidden, reader))


TEXTS = FirstRuns()
"""Guidance, and whether gradients were on."""
RECORDED = FirstRuns()
"""`True` where a run was recorded: what is recorded is part of the graph, and a recomputation computes it again."""
GRIDS = FirstRuns()
"""Where the patches stood in the image, for reductions that ask."""
SIZES = FirstRuns()
"""What the tokens stood for."""
SOURCES = FirstRuns()
"""Which patches the tokens were, for rotary towers."""
PARTS = FirstRuns()
"""Which rows had how many patches, in padded batches."""
CARRIED = FirstRuns()
"""What the adapter carries to the block."""
TABLES = (TEXTS, RECORDED, GRIDS, SIZES, SOURCES, PARTS, CARRIED)


def note_text(hidden: Tensor, reader: object, guidance: Guidance) -> None:
    """Note the text of a block's first run."""
    if not may_be_recomputed(hidden, guidance.text):
        return
    kept = dataclasses.replace(guidance, outer=None, memo=(), opened_by=None, stashes={}, memories={})
    earlier = TEXTS.recall(hidden, reader)
    if earlier is not None and earlier[0].text is not guidance.text:
        kept = dataclasses.replace(kept, pairing="ambiguous")
    TEXTS.keep(hidden, reader, (kept, torch.is_grad_enabled()))


def carried_over(hidden: Tensor, reader: object, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` says of this call of a block; in a recomputation, what it said of the first run."""
    if in_backward():
        again = CARRIED.recall(hidden, reader)
        if again is not None:
            return again
    found = find()
    if found:
        CARRIED.note(hidden, reader, found)
    return found


def recalled_text(hidden: Tensor, reader: object, instead: Callable[[], str]) -> Guidance | None:
    """Return the guidance that was current when this block first ran on this input.

    Raises:
        RuntimeError: there were two, or its text needs a gradient that reentrant checkpointing cannot carry; `instead`
            says what would.
    """
    found = TEXTS.recall(hidden, reader)
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
