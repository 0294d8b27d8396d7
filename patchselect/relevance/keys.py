"""`relevance="keys"`: the layer's own attention, asked by the text (TRIPS §3.2)."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..adapter import Tower
from ..weights import Projections, normalised
from .base import Candidates, Relevance, lift_cost, probe
from .kernels import key_relevance, real_key_relevance


class Keys(Relevance):
    """`a = softmax(q . k / sqrt(d_h))` with `q = W_q t` and the layer's own `W_q` and `W_k`, mean over the heads.

    In a rotary tower the keys are turned by their places, as in the layer, and the text is not: it has no place, and is
    read as the layer reads its class token, which has none either.
    """

    name = "keys"
    takes_tiles = True
    scores_are_weights = True

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        weights = seen.weights
        return self.attention(seen, weights, normalised(weights.norm, seen.tower.lift(text)))

    def scores_by_image(self, seen: Candidates) -> Tensor:
        return self.attention(seen, seen.weights, seen.guiding(seen.all_normed))

    def attention(self, seen: Candidates, weights: Projections, guide: Tensor) -> Tensor:
        """Return the attention `(B, T, n)` of normed tokens `(B', T, D)` to the patches."""
        query, normed = projected_query(weights, guide), seen.normed.to(weights.query.dtype)
        if weights.key_norm is None and seen.turn is None:
            return key_relevance(query, normed, weights.key, weights.num_heads, weights.scale)
        keys = F.linear(normed, weights.key, weights.key_bias)
        query, keys = (rearrange(x, "b n (h e) -> b n h e", h=weights.num_heads) for x in (query, keys))
        query = query if weights.query_norm is None else weights.query_norm(query)
        keys = keys if weights.key_norm is None else weights.key_norm(keys)
        return real_key_relevance(query, keys if seen.turn is None else seen.turn(keys), weights.scale)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        for index in layers:
            tower.adapter.projections(tower.blocks[index])
        if guidance == "text" and not tower.single_stream:
            with torch.no_grad():
                tower.lift(probe(tower))

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        weights = tower.adapter.projections(tower.blocks[index])
        folds = weights.key_norm is None and not tower.rotary
        each = weights.num_heads * tower.width if folds else tower.width**2
        return 2 * tower.width**2 + lift_cost(tower, guidance), each


def projected_query(weights: Projections, guide: Tensor) -> Tensor:
    """Return `W_q` of normed tokens `(B', T, D)`, in the dtype of the weights."""
    return F.linear(guide.to(weights.query.dtype), weights.query, weights.query_bias)
