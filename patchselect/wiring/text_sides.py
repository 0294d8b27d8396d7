"""The dual encoder that a vision tower came from: read for the way between text and tower, and changed in nothing."""

from __future__ import annotations

from typing import Any, Sequence

from torch import nn

from ..adapter import Tower
from .towers import find_towers, unwrapped


def join_text_side(towers: Sequence[Tower], text_side: Any) -> None:
    """Let texts of the dual encoder `text_side` guide these towers; `None` leaves them as they are.

    Raises:
        TypeError: it is no supported dual encoder.
        ValueError: a tower has a text half of its own, or it is of another width or on another device.
    """
    if text_side is None:
        return
    if not isinstance(text_side, nn.Module):
        raise TypeError(f"text_side must be a model with a text and an image half, got {type(text_side).__name__}")
    whole = unwrapped(text_side)
    side = find_towers(whole)[0]
    name = type(whole).__name__
    if side.module is whole or side.single_stream:
        raise TypeError(f"text_side must be a whole dual encoder (CLIP, SigLIP, …), text half and all; got {name}")
    for tower in towers:
        kind = type(tower.module).__name__
        if tower.head is not None or tower.single_stream:
            raise ValueError(f"{kind} has a text half beside it already, and needs no text_side: leave it out")
        if side.width != tower.width:
            raise ValueError(
                f"text_side={name} has a vision tower of width {side.width}, and {kind} one of width {tower.width}: "
                "give the dual encoder that this tower came from"
            )
        here, there = (next(part.blocks[0].parameters()).device for part in (tower, side))
        if here != there:
            raise ValueError(f"text_side={name} is on {there}, and {kind} on {here}: move one of them")
        tower.text_side = side
