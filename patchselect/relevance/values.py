"""`relevance="values"`: the text read backwards through the value-output path of this and the later layers (ours).

A contrastive dual encoder trains what its [CLS] RECEIVES from the patches, not what a text query would look at. With
`t` in the joint space, `P` the visual projection and `gamma_post` the scale of the final norm:
`g = gamma_post * (P t)`,
minus its mean; `w_l = g W_o^l W_v^l`; `s_i = sum over l >= j of LN_l(x_i) . w_l`.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Tower
from ..compat import is_compiling
from ..weights import gathered, norm_eps, norm_scale
from .base import Candidates, Relevance, check_projects, lift_cost, probe
from .directions import pulled_back
from .kernels import combine_scores, linear_scores, normalised_scores


class Values(Relevance):
    """What each patch would add, if attended to, to what the head reads of a text."""

    name = "values"
    takes_tiles = True

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        """Score `s_i = sum over l >= j of LN_l(x_i) . w_l` with `w_l = g W_o^l W_v^l`, up to a constant.

        The selection layer's own term reads its normed input, the later ones the tokens after its attention. Those all
        normalise the same tokens, so their terms fold into one vector: `sum of gamma_l * w_l` against the plain
        normalised tokens. Where there are more texts than patches, the patches go forward through the same weights.
        """
        tower, stash, patches = seen.tower, seen.stash, seen.patches
        found = stash.pop(0) if stash and stash[0].layer == seen.index else None
        if found is None:
            goal = tower.read_back(text)
            if not is_compiling() and patches.shape[:2].numel() < goal.shape[:2].numel():
                values = _through_values(tower, seen.index, seen.normed, patches)
                return linear_scores(goal.to(values.dtype), values)
            later = () if stash is None else tuple(index for index in seen.selecting if index > seen.index)
            found, left = pulled_back(tower, seen.index, later, goal, seen.memory)
            if stash is not None:
                stash[:] = left
        # What the first layer of pairing="all" left for (1, T) or (B, T) texts is for (T, 1) or (B * T, 1) texts here.
        own, folded = (
            x if x is None or x.shape[:2] == text.shape[:2] else x.flatten(0, 1).unsqueeze(1)
            for x in (found.own, found.folded)
        )
        assert own is not None
        scores = linear_scores(own, seen.normed)
        if folded is None:
            return scores
        return scores + normalised_scores(folded, patches, found.eps)

    def combine(self, scores: Tensor) -> Tensor:
        return combine_scores(scores)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        """Refuse a tower in which the value-output path of a block cannot be read backwards."""
        eps = set()
        for index, block in enumerate(tower.blocks):
            weights = tower.adapter.projections(block)
            reason = weights.nonlinear_values
            if reason is None and not isinstance(weights.norm, (nn.LayerNorm, nn.Identity)):
                reason = f"its pre-attention norm is {type(weights.norm).__name__}, not a LayerNorm"
            if reason is not None:
                raise ValueError(
                    f'relevance="values" cannot read block {index} backwards: {reason}; use relevance="keys"'
                )
            eps.add(norm_eps(weights.norm))
        if len(eps) > 1:
            raise ValueError(f'relevance="values" needs one LayerNorm eps in all blocks, found {sorted(eps)}')
        with torch.no_grad():
            if guidance == "text":
                tower.lift(probe(tower))
            tower.read_back(probe(tower))
        if guidance == "image":
            check_projects(tower, self.name, guidance)

    def reads(self, tower: Tower, layers: Sequence[int]) -> Sequence[int]:
        return range(layers[0], len(tower.blocks))

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        once = 2 * tower.width**2 * (len(tower.blocks) - index) + lift_cost(tower, guidance, read_back=True)
        return once * first, 3 * tower.width


def _through_values(tower: Tower, first: int, normed: Tensor, patches: Tensor) -> Tensor:
    """Return what each patch adds to a token that attends to it alone, summed over the layers from `first` on.

    `(B, n, D)`.

    Without the biases and minus the mean over the patches: what is the same for all of them ranks none, and in half
    precision it would drown what is not.
    """
    total: Tensor | None = None
    eps = norm_eps(tower.adapter.projections(tower.blocks[-1]).norm)
    wide = torch.promote_types(patches.dtype, torch.float32)
    plain = F.layer_norm(patches.to(wide), patches.shape[-1:], eps=eps)
    for index in range(first, len(tower.blocks)):
        weights = tower.adapter.projections(tower.blocks[index])
        gamma = norm_scale(weights.norm)
        value, output = gathered(weights.value), gathered(weights.output)
        read = normed if index == first else plain if gamma is None else plain * gamma
        read = (read - read.mean(dim=1, keepdim=True)).to(value.dtype)
        added = F.linear(F.linear(read, value), output).to(wide)
        added = added if weights.output_scale is None else added * gathered(weights.output_scale)
        total = added if total is None else total + added
    assert total is not None
    return total
