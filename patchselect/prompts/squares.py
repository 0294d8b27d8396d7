"""Hosts that join squares of patches: the squares that stay are laid out as a smaller image, which the host then joins.

Such hosts take the square root of the number of tokens for the height of the image. The tokens of the squares that a
selection left are put side by side in a square image of squares, the last of which are empty; what the host makes of
the empty ones is cut off again.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wiring.journey import Journey, call_tower, followed
from ..wiring.state import Wiring

_laid_out: ContextVar[int] = ContextVar("patchselect_laid_out", default=0)


@contextmanager
def laying_out(side: int) -> Iterator[None]:
    """Let the tower return its squares of `side` x `side` patches as a square image, until the end of the block."""
    token = _laid_out.set(side)
    try:
        yield
    finally:
        _laid_out.reset(token)


def call_tower_in_squares(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a tower whose tokens will be joined square by square."""
    wiring: Wiring = module._patchselect  # type: ignore[assignment]
    side = _laid_out.get()
    if not side or not wiring.plan.selects:
        return call_tower(module, name, original, *args, **kwargs)
    with followed(wiring) as journeys:
        output = call_tower(module, name, original, *args, **kwargs)
    journey = journeys[-1]
    if squares_of(journey, side) is None:
        return output
    prefix, states = journey.tower.num_prefix_tokens, getattr(output, "hidden_states", None)
    if states is not None:
        output.hidden_states = tuple(state if state is None else lay_out(state, prefix, side) for state in states)
    output.last_hidden_state = lay_out(output.last_hidden_state, prefix, side)
    return output


def squares_of(journey: Journey, side: int) -> Tensor | None:
    """Return which square of the image `(I, m)` each square of now is, -1 for a fused one; `None` where all stayed."""
    if journey.sources is None or journey.grid is None or journey.sources.shape[1] == math.prod(journey.grid):
        return None
    first, width = journey.sources[:, :: side**2], journey.grid[1]
    square = first // width // side * (width // side) + first % width // side
    return square.masked_fill(first < 0, -1)


def lay_out(tokens: Tensor, prefix: int, side: int) -> Tensor:
    """Lay out squares, `(B, P + m * side**2, D)` with the tokens of each side by side, as a square image by rows."""
    patches = tokens[:, prefix:]
    count = patches.shape[1] // side**2
    edge = math.isqrt(count - 1) + 1
    full = F.pad(patches, (0, 0, 0, (edge**2 - count) * side**2))
    image = full.view(len(full), edge, edge, side, side, -1).transpose(2, 3).reshape(len(full), -1, full.shape[-1])
    return torch.cat([tokens[:, :prefix], image], dim=1)
