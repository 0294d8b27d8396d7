"""`guidance="random"`: the honest baseline."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from ..adapter import Tower
from .base import Candidates, Relevance
from .kernels import random_relevance


class Random(Relevance):
    """Uniform noise that sums to 1 over the patches, from torch's global generator."""

    name = "random"
    scores_are_weights = True

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        return self.scores_by_image(seen)

    def scores_by_image(self, seen: Candidates) -> Tensor:
        return random_relevance(seen.patches).unsqueeze(1)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        pass

    def reads(self, tower: Tower, layers: Sequence[int]) -> Sequence[int]:
        return ()

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return 0, 0
