"""Speed-ups that other work on the machine hardly changes, and how far to trust them.

What else runs slows a call down, for a tenth of a second to some seconds at a time, and never makes it faster. So the
time of a call is the sum, over its parts (`lockstep` reads them), of the mean of the faster half of what each part took
in the rounds: the least alone depends on luck, the mean of all on what else runs. A run then says how far to trust
itself: what would half of its rounds have said?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import comb
from statistics import fmean, median
from typing import Any, List

from benchmarks.common.show import spread

Parts = List[float]
"""Seconds of the parts of one call."""

FEWEST_ROUNDS = 6
"""Before these nothing counts as settled."""
SETTLED = 0.025
"""How far the speed-up by any half of the rounds may lie from the median over the halves."""
WAYS = 20
"""How many halves are asked, at most."""


def faster_half(seconds: Sequence[float]) -> float:
    """Return the mean of the faster half, rounded up."""
    return fmean(sorted(seconds)[: -(-len(seconds) // 2)])


def middle_half(seconds: Sequence[float]) -> float:
    """Return the mean without a quarter at either end, rounded down."""
    quarter = len(seconds) // 4
    return fmean(sorted(seconds)[quarter : len(seconds) - quarter])


Estimate = Callable[[Sequence[float]], float]
ESTIMATES: dict[str, Estimate] = {
    "the least": min,
    "mean of the faster half": faster_half,
    "median": median,
    "mean of the middle half": middle_half,
    "mean of all": fmean,
}
"""Of what a part took in the rounds; the second is what `benchmarks.speed` goes by (`benchmarks.speed.steadiness`)."""


def seconds_of(calls: Sequence[Parts], estimate: Estimate = faster_half) -> float:
    """Return the seconds of a call, by what its parts took in each of these calls of one case."""
    if len({len(parts) for parts in calls}) != 1:
        raise ValueError("calls of one case must have the same number of parts")
    return sum(map(estimate, zip(*calls)))


def halves(rounds: int) -> list[tuple[int, ...]]:
    """List which rounds make half of them, rounded up: all ways, or `WAYS` that chance has drawn, always the same."""
    size = -(-rounds // 2)
    if comb(rounds, size) <= WAYS:
        return list(combinations(range(rounds), size))
    draw, found = random.Random(0), set()
    while len(found) < WAYS:
        found.add(tuple(sorted(draw.sample(range(rounds), size))))
    return sorted(found)


def speed_ups(base: Sequence[Parts], other: Sequence[Parts]) -> list[float]:
    """Return the speed-up that each half of the rounds would have found.

    Args:
        base: parts of the unpatched calls, round by round.
        other: those of the calls whose speed-up it is.
    """
    return [
        seconds_of([base[one] for one in half]) / seconds_of([other[one] for one in half]) for half in halves(len(base))
    ]


def farthest(found: Sequence[float]) -> float:
    """Return how far the farthest lies from the median, as a share of it."""
    middle = median(found)
    return max(abs(value / middle - 1) for value in found)


def settled(rounds: int, found: Sequence[float]) -> bool:
    """Tell whether a speed-up is known: after enough rounds, however they are halved, it is nearly the same."""
    return rounds >= FEWEST_ROUNDS and farthest(found) <= SETTLED


def trust(rounds: int, found: Sequence[float]) -> dict[str, Any]:
    """Return how far to trust what halves of the rounds have found: `rounds`, `farthest_half`, `settled`."""
    return {"rounds": rounds, "farthest_half": farthest(found), "settled": settled(rounds, found)}


def compared(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Return what halves of the rounds say of seconds `over` by seconds `under`, whole calls; and whether it is known.

    It is a `spread`, and what `trust` says.
    """
    found = speed_ups([[call] for call in over], [[call] for call in under])
    return {**spread(found), **trust(len(over), found)}


def known(base: Sequence[float], others: Iterable[Sequence[float]]) -> bool:
    """Tell whether more rounds would change the ratio of none of the others to whole calls of the base."""
    return len(base) >= FEWEST_ROUNDS and all(compared(base, other)["settled"] for other in others)
