"""What `apply` accepts, and what it says when it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

from .functional import FUSIONS, Fusion

GUIDANCES = ("text", "image", "random")
RELEVANCES = ("keys", "features", "values", "joint")
PAIRINGS = ("paired", "shared", "all")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def check_fusion(value: Any) -> Fusion:
    return cast(Fusion, check_choice("fusion", value, FUSIONS))


def check_rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"keep_rate must be a number in (0, 1], got {value!r}")
    rate = float(value)
    if not math.isfinite(rate) or not 0.0 < rate <= 1.0:
        raise ValueError(f"keep_rate must be in (0, 1] (the share of patches that stay), got {value!r}")
    return rate


def default_layers(depth: int) -> tuple[int, ...]:
    """The paper's 5th and 10th of 12 blocks, scaled to `depth` blocks; 0-based, without repeats."""
    layers = (round(5 * depth / 12) - 1, round(10 * depth / 12) - 1)
    return tuple(sorted({layer for layer in layers if layer >= 0}))


def check_layers(layers: Any, depth: int) -> tuple[int, ...]:
    if layers is None:
        return default_layers(depth)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of 0-based block indices or None, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"layers must be integers (0-based block indices), got {layer!r}")
        if not 0 <= int(layer) < depth:
            raise ValueError(f"layer {layer} is outside of this model's {depth} blocks: use 0 to {depth - 1}")
    chosen = tuple(int(layer) for layer in layers)
    if not chosen or any(a >= b for a, b in zip(chosen, chosen[1:])):
        raise ValueError(f"layers must be at least one index, ascending and without repeats, got {list(chosen)}")
    return chosen


def check_rates(keep_rate: Any, num_layers: int) -> tuple[float, ...]:
    if isinstance(keep_rate, Sequence) and not isinstance(keep_rate, (str, bytes)):
        if len(keep_rate) != num_layers:
            raise ValueError(
                f"keep_rate has {len(keep_rate)} values for {num_layers} selection layers: give one number, or one each"
            )
        return tuple(check_rate(rate) for rate in keep_rate)
    return (check_rate(keep_rate),) * num_layers
