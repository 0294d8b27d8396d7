"""How many patches each token stands for: it travels with the call, and attention counts it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Attended
from .journey import for_rows, journey_of
from .recomputation import SIZES, in_backward
from .state import Layer


class Counted(NamedTuple):
    """What a block is told of the tokens that come to it."""

    sizes: Tensor | None = None
    """`(B, P + n)`: how many patches of the image each stands for; `None` means one each."""
    num_patches: int | None = None
    """Of the image; `None` where nothing has shortened it."""

    def or_ones(self, tokens: Tensor) -> Tensor:
        """Return the sizes of tokens `(B, N, D)`."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return torch.ones(tokens.shape[:2], device=tokens.device, dtype=wide) if self.sizes is None else self.sizes


def counted_for(layer: Layer, hidden: Tensor) -> Counted:
    """Return what the tokens of this run of a block stand for; if this is a recomputation, those of the first run.

    Raises:
        ValueError: nobody knows, since the tower was not called as a whole.
    """
    if not layer.plan.follows_sizes:
        return Counted()
    if in_backward():
        return SIZES.recall(hidden, layer) or Counted()
    journey = journey_of(layer)
    if journey is None:
        raise ValueError(
            f"block {layer.index} counts how many patches a token stands for, which travels with a call of the whole "
            f"tower: call {type(layer.tower.module).__name__}, not its blocks"
        )
    if layer.begins:
        return Counted()
    rows = hidden.shape[0 if layer.tower.batch_first else 1]
    sizes = None if journey.sizes is None else for_rows(journey.sizes, rows)
    found = Counted(sizes, journey.num_patches)
    SIZES.note(hidden, layer, found)
    return found


def attend(layer: Layer, block: nn.Module, counted: Counted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended:
    """Run the block's attention, by the host's own code as long as every token stands for one patch."""
    tower = layer.tower
    if counted.sizes is None or not layer.plan.sizes:
        return tower.adapter.attend(tower, block, *args, **kwargs)
    return tower.adapter.attend_sized(tower, block, counted.sizes, *args, **kwargs)
