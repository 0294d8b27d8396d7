"""`relevance="features"`: the paper's literal text, query against features after self-attention (TRIPS §3.2)."""

from __future__ import annotations

from torch import Tensor

from ..adapter import Tower
from ..weights import Projections
from .base import Candidates, lift_cost
from .kernels import feature_relevance
from .keys import Keys, projected_query


class Features(Keys):
    """`a = softmax(q . x / sqrt(d))` with `q = W_q t` and the patches `x` after attention."""

    name = "features"

    def attention(self, seen: Candidates, weights: Projections, guide: Tensor) -> Tensor:
        return feature_relevance(projected_query(weights, guide).to(seen.patches.dtype), seen.patches)

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return tower.width**2 + lift_cost(tower, guidance), tower.width
