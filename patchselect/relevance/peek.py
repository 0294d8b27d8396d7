"""`Peek`: `values`, and what a look of [CLS] through the later layers would change of a text's reading (ours).

Only [CLS] runs on through the later blocks `l > j`, over the tokens of the selection layer, which stay as they are:
`a_lh(i) = softmax over all tokens of q_l . k_i / sqrt(d_h) + log s_i`. With `u_lh(i) = LN_l(x_i) . w_lh`, what head `h`
would carry of patch `i` to the text (`w_lh` as of `values`, head by head), and `m_lh` the mean of `u_lh` under `a_lh`
over the patches: `P(i) = sum over l and h of a_lh(i) (u_lh(i) - m_lh)`: how the text's reading changes if patch `i` is
looked at more. `r = z(V) + P_share z(P)` with `V` the scores of `values` and `z` standardising over the patches.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter import Tower
from ..weights import gathered, norm_eps, norm_scale, normalised
from .base import Candidates
from .directions import head_directions
from .kernels import in_tiles, linear_scores, normalised_scores, standardise, wide
from .values import Values


class Peek(Values):
    """`values`, and what [CLS] will look at: for towers with a [CLS] that is read at the end.

    With D the width, H heads, n patches, each later block costs `3 n D H + 13 D^2` an image (its MLP counted as 8 D^2)
    and `n D H + 2 D^2` a text.

    Args:
        share: of the peek against the values, at least 0.
    """

    name = "peek"

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        tower, rows = seen.tower, seen.all_tokens.shape[0]
        goal = tower.read_back(text)
        values = linear_scores(head_directions(tower, seen.index, goal).sum(dim=2), seen.normed)
        if seen.index + 1 == len(tower.blocks):
            return standardise(values)
        peeked: Tensor | None = None
        folded: Tensor | None = None
        glance = Glance(seen)
        for index in range(seen.index + 1, len(tower.blocks)):
            directions = head_directions(tower, index, goal)  # (B', T, H, D)
            weights, normed = glance.look(index)  # (B, H, N), (B, N, D)
            ours = wide(normed[:, seen.num_prefix_tokens :])
            carried = wide(in_tiles(directions.flatten(1, 2), rows)) @ ours.transpose(1, 2)
            carried = carried.unflatten(1, (-1, weights.shape[1]))  # (B, T, H, n)
            looked = weights[:, None, :, seen.num_prefix_tokens :]  # (B, 1, H, n)
            mean = (looked * carried).sum(-1, keepdim=True) / looked.sum(-1, keepdim=True)
            change = (looked * (carried - mean)).sum(dim=2)
            peeked = change if peeked is None else peeked + change
            gamma = norm_scale(tower.adapter.projections(tower.blocks[index]).norm)
            term = directions.sum(dim=2) if gamma is None else directions.sum(dim=2) * gathered(gamma)
            folded = term if folded is None else folded + term
        assert peeked is not None and folded is not None
        eps = norm_eps(tower.adapter.projections(tower.blocks[-1]).norm)
        values = values + normalised_scores(folded, seen.patches, eps)
        return standardise(values) + self.share * standardise(peeked)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        """Refuse a tower without a [CLS] of its own, or whose keys are normalised per head."""
        name = type(tower.module).__name__
        if tower.single_stream or not tower.has_class_token:
            raise ValueError(
                f'relevance "peek" lets the image [CLS] run ahead, which {name} does not have: use relevance="values"'
            )
        if any(tower.adapter.projections(block).key_norm is not None for block in tower.blocks):
            raise ValueError(f'relevance "peek" does not know the norms of keys in {name}: use relevance="values"')
        super().check(tower, layers, guidance)

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return super(Values, self).cost(tower, index, first, guidance)  # counted


class Glance:
    """[CLS] on its way through the later blocks, over tokens that stay as they are."""

    def __init__(self, seen: Candidates) -> None:
        self.seen, self.tower = seen, seen.tower
        self.bias = 0.0 if seen.sizes is None else wide(seen.sizes).log().unsqueeze(1)  # (B, 1, N)
        self.cls = self._finished(seen.index, seen.all_tokens[:, :1])

    def look(self, index: int) -> tuple[Tensor, Tensor]:
        """Run [CLS] through the next block; return what it looked at, `(B, H, N)`, and the tokens in its norm."""
        block, tokens = self.tower.blocks[index], self.seen.all_tokens
        weights = self.tower.adapter.projections(block)
        if weights.qkv is None or weights.out is None:
            raise TypeError(f"{type(block).__name__} does not show its attention, which [CLS] is to run through")
        heads = weights.num_heads
        own = normalised(weights.norm, self.cls)
        normed = torch.cat([own, normalised(weights.norm, tokens[:, 1:])], dim=1)
        query, _, value = weights.qkv(own)
        key_weight = gathered(weights.key).unflatten(0, (heads, -1))
        value_weight = gathered(weights.value)
        # q . k_i = (q W_k) . x_i but for what is the same for all tokens: no key is computed (as in `keys`).
        probe = torch.einsum("bhe,hed->bhd", query[:, 0].unflatten(-1, (heads, -1)), key_weight)
        logits = wide(probe) @ wide(normed).transpose(1, 2) * weights.scale
        attention = (logits + self.bias).softmax(dim=-1)
        mixed = attention.to(normed.dtype) @ normed  # (B, H, D)
        bias = value - F.linear(own, value_weight)  # of the values: what the host's own layer adds
        read = torch.einsum("bhd,hed->bhe", mixed, value_weight.unflatten(0, (heads, -1))).flatten(1).unsqueeze(1)
        branch = weights.out(read + bias)
        hidden = self.tower.adapter.residual(self.tower, block, self._in_layout(self.cls), self._in_layout(branch))
        self.cls = self._finished(index, self._in_layout(hidden))
        return attention, normed

    def _finished(self, index: int, tokens: Tensor) -> Tensor:
        """Run tokens `(B, m, D)` through the MLP of a block."""
        found: Any = self.tower.adapter.finish(self.tower, self.tower.blocks[index], self._in_layout(tokens), None)
        return self._in_layout(found if isinstance(found, Tensor) else found[0])

    def _in_layout(self, tokens: Tensor) -> Tensor:
        """Turn tokens from batch first to the layout of the host, or back."""
        return tokens if self.tower.batch_first else tokens.transpose(0, 1)
