"""Candidate captions of a question, one right and the others wrong, and whether they give the answer away.

`grid` asks so that no text alone can answer: of the words in a place, each is in equally many captions, and only the
picture tells which of them the scene has. `leaky` is how this benchmark asked before: fifteen captions that are the
right one with one object swapped, so that the right one shares the most words with the others. It is kept to show that
what looks for a leak finds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Callable, Tuple

import numpy as np

from .captions import EMOJI, swap_one

CHOICES = 16
Caption = Tuple[int, ...]
"""The concepts that it names."""


def grid(right: Caption, objects: Sequence[int], random: np.random.Generator) -> tuple[Caption, ...]:
    """Return the right caption and fifteen wrong ones: all combinations of right and absent objects, place by place.

    One object: itself and fifteen absent ones. Two: each place has the right object and three absent ones, no concept
    in two places. Four: each has one absent one beside it.

    Args:
        right: what the right caption names.
        objects: what the scene has.
        random: draws the absent ones.

    Raises:
        ValueError: so many objects do not make `CHOICES` combinations.
    """
    side = round(CHOICES ** (1 / len(right)))
    if side ** len(right) != CHOICES:
        raise ValueError(f"a grid of {CHOICES} captions names 1, 2 or 4 objects each, not {len(right)}")
    absent = random.permutation([concept for concept in range(len(EMOJI)) if concept not in objects]).tolist()
    wrong = [absent[(side - 1) * place : (side - 1) * (place + 1)] for place in range(len(right))]
    return tuple(product(*([name, *others] for name, others in zip(right, wrong))))


def leaky(right: Caption, objects: Sequence[int], random: np.random.Generator) -> tuple[Caption, ...]:
    """Return the right caption and fifteen that are it with one object swapped for an absent one."""
    captions = {frozenset(right): right}
    while len(captions) < CHOICES:
        wrong = swap_one(right, objects, random)
        captions.setdefault(frozenset(wrong), wrong)
    return tuple(captions.values())


Ask = Callable[[Caption, Sequence[int], np.random.Generator], Tuple[Caption, ...]]
GRID, LEAKY = "grid", "leaky"
KINDS: dict[str, Ask] = {
    GRID: grid,
    LEAKY: leaky,
}
"""Each returns `CHOICES` captions, the right one in front."""
