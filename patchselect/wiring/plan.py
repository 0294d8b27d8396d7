"""What was asked of `apply`: checked settings, data alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..functional import as_ratio
from ..reduction import Merge, Reduction, reduction_of
from ..relevance import Random, Relevance, relevance_of

GUIDANCES = ("text", "image", "random")
PAIRINGS = ("paired", "shared", "all")
REPEATS = ("each", "tile")
POSITIONS = ("original", "renumbered")


@dataclass(frozen=True)
class Plan:
    """One selection: where, how hard, by what, and what becomes of the rest."""

    layers: tuple[int, ...]
    """0-based block indices of the selection layers, ascending."""
    keep_rates: tuple[float, ...]
    """One for each of them, in (0, 1]."""
    guidance: str
    relevance: Relevance
    reduction: Reduction
    pairing: str | None = None
    """Which texts guide which images in a call that compares all of its images with all of its texts."""
    merge: float = 0.0
    """Share in [0, 1) of the removed patches that leaves by merging before the first selection layer."""
    sizes: bool = False
    """Whether attention counts how many patches a token stands for, from the first reduction on."""
    positions: str = "original"
    """Which positions the patches that stay have in a prompt: their own, or those of a prompt as long as is left."""

    @classmethod
    def of(
        cls, depth: int, keep_rate: Any, layers: Any, guidance: str, relevance: Any, fusion: Any, default: str,
        pairing: str | None = None, merge: Any = 0.0, sizes: Any = None, positions: Any = "original",
    ) -> Plan:  # fmt: skip
        """Check what `apply` was given for a tower of `depth` blocks whose adapter reads texts by `default`."""
        check_choice("guidance", guidance, GUIDANCES)
        check_choice("positions", positions, POSITIONS)
        check_pairing_of_calls(pairing)
        if relevance is None:
            relevance = default if guidance == "text" else "keys"
        found = relevance_of(relevance)
        share, counts = check_merge(merge), check_sizes(sizes)
        chosen = check_layers(layers, depth, share)
        rates = check_rates(keep_rate, len(chosen))
        ranked = Random() if guidance == "random" else found
        counts = share > 0 if counts is None else counts
        return cls(chosen, rates, guidance, ranked, reduction_of(fusion), pairing, share, counts, positions)

    @property
    def ratios(self) -> tuple[tuple[int, int], ...]:
        """The rates as fractions."""
        return tuple(as_ratio(rate) for rate in self.keep_rates)

    @property
    def selects(self) -> bool:
        """Whether any patch is removed at all."""
        return min(self.keep_rates) < 1

    @property
    def follows_sizes(self) -> bool:
        """Whether somebody wants to know how many patches a token stands for."""
        return self.selects and (self.sizes or self.merge > 0)

    @property
    def merging(self) -> Merge:
        """How the blocks before the first selection layer merge."""
        return Merge(self.merge, self.ratios[0], self.layers[0])

    def counts(self, index: int) -> bool:
        """Tell whether a block that does not select merges patches, or has an attention that counts sizes."""
        if not self.selects or index in self.layers:
            return False
        before = index < self.layers[0]
        return self.merge > 0 if before else self.sizes


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return `value` if it is one of `allowed`.

    Raises:
        ValueError: it is not; names the argument and what is allowed.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def check_pairing_of_calls(value: Any) -> None:
    """Raise unless this says what a call with several images and texts means.

    Raises:
        ValueError: another value; `"all"`, which gives rows that such a call cannot compare.
    """
    if value == "all":
        raise ValueError(
            'pairing="all" gives one row per image and text, which no call of a whole model can compare: use '
            'patchselect.score_pairs(model, images, texts) or guide(model, text_features, pairing="all"). For calls '
            'with image and text together, apply takes pairing="paired" or "shared"'
        )
    if value is not None:
        check_choice("pairing", value, ("paired", "shared"))


def check_rate(value: Any) -> float:
    """Return a keep rate as a float in (0, 1].

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside of this range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"keep_rate must be a number in (0, 1], got {value!r}")
    rate = float(value)
    if not math.isfinite(rate) or not 0.0 < rate <= 1.0:
        raise ValueError(f"keep_rate must be in (0, 1] (the share of patches that stay), got {value!r}")
    return rate


def check_merge(value: Any) -> float:
    """Return the share of the removed patches that leaves by merging, in [0, 1).

    Raises:
        TypeError: it is not a number.
        ValueError: it is outside of this range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"merge must be a number in [0, 1), got {value!r}")
    if not 0.0 <= float(value) < 1.0:
        raise ValueError(f"merge must be in [0, 1) (the share of the removed patches that is merged), got {value!r}")
    return float(value)


def check_sizes(value: Any) -> bool | None:
    """Return whether attention counts sizes; `None` where `merge` decides.

    Raises:
        TypeError: neither a bool nor `None`.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"sizes must be True, False or None (count them where merge > 0), got {value!r}")
    return value


def default_layers(depth: int, merge: float = 0.0) -> tuple[int, ...]:
    """Return the paper's 5th and 10th of 12 blocks, scaled to `depth` blocks; the first alone where patches merge.

    0-based, without repeats.
    """
    layers = (round(5 * depth / 12) - 1, *(() if merge else (round(10 * depth / 12) - 1,)))
    return tuple(sorted({layer for layer in layers if layer >= 0}))


def check_layers(layers: Any, depth: int, merge: float = 0.0) -> tuple[int, ...]:
    """Return the selection layers of a tower of `depth` blocks.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: outside of the tower, not ascending, or none; block 0 where patches are to merge before it.
    """
    if layers is None:
        layers = default_layers(depth, merge)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of 0-based block indices or None, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"layers must be integers (0-based block indices), got {layer!r}")
        if not 0 <= int(layer) < depth:
            raise ValueError(f"layer {layer} is outside of this model's {depth} blocks: use 0 to {depth - 1}")
    chosen = tuple(int(layer) for layer in layers)
    if merge and chosen[:1] in ((), (0,)):
        raise ValueError(
            f"merge={merge} merges patches in the blocks before the first selection layer, and there is none before "
            f"layers={list(chosen)} of {depth} blocks: select later, or use merge=0"
        )
    if not chosen or any(a >= b for a, b in zip(chosen, chosen[1:])):
        raise ValueError(f"layers must be at least one index, ascending and without repeats, got {list(chosen)}")
    return chosen


def check_rates(keep_rate: Any, num_layers: int) -> tuple[float, ...]:
    """Return one keep rate per selection layer.

    Raises:
        TypeError: not numbers.
        ValueError: outside of (0, 1], or not one for each layer.
    """
    if isinstance(keep_rate, Sequence) and not isinstance(keep_rate, (str, bytes)):
        if len(keep_rate) != num_layers:
            raise ValueError(
                f"keep_rate has {len(keep_rate)} values for {num_layers} selection layers: give one number, or one each"
            )
        return tuple(check_rate(rate) for rate in keep_rate)
    return (check_rate(keep_rate),) * num_layers
