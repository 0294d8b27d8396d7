"""Positions and masks follow the tokens: what a host makes for all patches, each block gets for those that are left."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapter import Tower
from .journey import Part, for_rows, journey_of
from .packing import at_rows
from .padding import parts_for, places_in, real_tokens
from .plan import Plan
from .recomputation import SOURCES, in_backward
from .state import Layer


def follows(plan: Plan, tower: Tower, index: int) -> bool:
    """Tell whether a block is called with positions or masks of patches that an earlier block has removed."""
    return (
        (tower.rotary or tower.padded or tower.packed)
        and plan.selects
        and index > (0 if plan.merge else plan.layers[0])
    )


def at_places(
    layer: Layer, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block for the tokens that are left; as they are where nothing has been shortened.

    Raises:
        ValueError: nobody knows which these are, since the tower was not called as a whole.
    """
    if not follows(layer.plan, layer.tower, layer.index):
        return args, kwargs
    hidden = args[0] if args else next(iter(kwargs.values()))
    tower, parts = layer.tower, parts_for(layer, hidden)
    if tower.packed and parts is not None:
        return at_rows(layer, block, hidden, parts, args, kwargs)
    if parts is not None:
        real = real_tokens(parts, tower, hidden)
        args, kwargs = tower.adapter.fit_masks(tower, block, real, *args, **kwargs)  # type: ignore[assignment]
    if tower.rotary:
        args, kwargs = tower.adapter.at_places(tower, block, _places(layer, hidden, parts), *args, **kwargs)  # type: ignore[assignment]
    return args, dict(kwargs)


def _places(layer: Layer, hidden: Tensor, parts: list[Part] | None) -> Tensor:
    found = SOURCES.recall(hidden, layer) if in_backward() else None
    if found is None and parts is not None:
        found = places_in(parts, hidden[:, layer.tower.num_prefix_tokens :])
        SOURCES.note(hidden, layer, found)
    if found is None:
        journey = journey_of(layer)
        if journey is None or journey.sources is None:
            raise ValueError(
                f"block {layer.index} turns queries and keys by the places of their patches, which travel with a call "
                f"of the whole tower: call {type(layer.tower.module).__name__}, not its blocks"
            )
        found = for_rows(journey.sources, hidden.shape[0 if layer.tower.batch_first else 1])
        SOURCES.note(hidden, layer, found)
    return found  # type: ignore[no-any-return]
