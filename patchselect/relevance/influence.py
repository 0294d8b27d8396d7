"""`Influence`: how strongly a patch speaks for OR against a text, `|z(s)|` of another relevance's signed scores (ours).

A patch that speaks strongly against a text is evidence too: a wrong caption must not lose it. Goes with the reduction
`Protect`, which merges the patches that say little.
"""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from ..adapter import Tower
from .base import Candidates, Relevance
from .kernels import standardise
from .values import Values


class Influence(Relevance):
    """`r = max over texts of |z(s)|`, where `z` standardises over the patches.

    Args:
        of: the relevance whose scores `s` are taken; those must have a sign (`values`, `joint`, `Peek`), not be
            weights.
    """

    name = "influence"
    takes_tiles = True

    def __init__(self, of: Relevance | None = None) -> None:
        self.of = Values() if of is None else of
        if self.of.scores_are_weights:
            raise ValueError(
                f"influence wants signed scores, and those of {self.of!r} are weights: use values or joint"
            )

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        return standardise(self.of.scores(seen, text)).abs()

    def combine(self, scores: Tensor) -> Tensor:
        return standardise(scores.amax(dim=1)).softmax(dim=-1)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        self.of.check(tower, layers, guidance)

    def reads(self, tower: Tower, layers: Sequence[int]) -> Sequence[int]:
        return self.of.reads(tower, layers)

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return self.of.cost(tower, index, first, guidance)
