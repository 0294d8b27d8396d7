"""Speed-ups that other work on the machine hardly changes, and how far to trust them.

What else runs slows a call down, for a tenth of a second to some seconds at a time, and never makes it faster. So the
time of a call is the sum, over its parts, of the least that each part took in any of the rounds (`lockstep` reads the
parts). A run then says how far to trust itself: what would half of its rounds have said?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import comb
from statistics import median
from typing import List

Parts = List[float]
"""Seconds of the parts of one call."""

FEWEST_ROUNDS = 4
"""Before these nothing counts as settled: two rounds, and two others."""
SETTLED = 0.025
"""How far the speed-up by any half of the rounds may lie from the median over the halves. With 0.03, one of the 15 that
settled in five runs beside two busy processes lay 5 % off the others."""
WAYS = 20
"""How many halves are asked, at most."""


def undisturbed(calls: Sequence[Parts]) -> float:
    """Return the seconds of a call whose parts all take the least that they took in any of these."""
    if len({len(parts) for parts in calls}) != 1:
        raise ValueError("calls of one case must have the same number of parts")
    return sum(map(min, zip(*calls)))


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
        undisturbed([base[one] for one in half]) / undisturbed([other[one] for one in half])
        for half in halves(len(base))
    ]


def farthest(found: Sequence[float]) -> float:
    """Return how far the farthest lies from the median, as a share of it."""
    middle = median(found)
    return max(abs(value / middle - 1) for value in found)


def settled(rounds: int, found: Sequence[float]) -> bool:
    """Tell whether a speed-up is known: after enough rounds, however they are halved, it is nearly the same."""
    return rounds >= FEWEST_ROUNDS and farthest(found) <= SETTLED
