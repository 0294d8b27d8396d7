"""A relevance with its sign turned: the patches that it calls least relevant stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from patchselect import Relevance
from patchselect.adapter import Tower
from patchselect.relevance import relevance_of
from patchselect.relevance.base import Candidates


class Opposite(Relevance):
    """The scores of another relevance times -1.

    Contrastive models may mark with a low similarity what they look at, so both signs are worth a measurement.
    """

    def __init__(self, of: Any) -> None:
        self.of = relevance_of(of)
        self.name = f"-{self.of.name}"
        self.takes_tiles = self.of.takes_tiles

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        return -self.of.scores(seen, text)

    def scores_by_image(self, seen: Candidates) -> Tensor:
        return -self.of.scores_by_image(seen)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        self.of.check(tower, layers, guidance)

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return self.of.cost(tower, index, first, guidance)
