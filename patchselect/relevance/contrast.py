"""`Contrast`: `values` of what sets a text apart from texts in general; heads that answer clearly count more (ours).

With `t` a normalised text, `m` the mean of normalised generic prompts (names of everyday things), `g` the read-back of
`t - m / 2` into the residual stream (as of `values`) and `d_lh = (g W_o^l)_h W_v^lh * gamma_l` what head `h` of layer
`l` reads patches with: `s_i = sum over l >= j and h of ||d_lh||^(1/2) LN(x_i) . d_lh`, without the norm's own scale,
and `r = max over texts of log softmax over patches of 2 z(s)`, where `z` standardises over the patches.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..weights import gathered, norm_eps, norm_scale
from .base import Candidates
from .directions import head_directions
from .kernels import linear_scores, normalised_scores, standardise, wide
from .values import Values


class Contrast(Values):
    """What each patch would add to what sets a text apart; costs what `values` costs.

    Args:
        background: features `(K, D_text)` of K generic prompts that are nobody's question (`"a photo of a dog"`, …),
            by the model's own text encoder; `None` takes nothing away. A sequence of numbers is fine, too.
        share: how much of their mean is taken away from each text, at least 0.
        sharpness: of the softmax over the patches that makes texts comparable, above 0.
    """

    name = "contrast"

    def __init__(self, background: Any = None, share: float = 0.5, sharpness: float = 2.0) -> None:
        self.share, self.sharpness = share, sharpness
        self.background = None if background is None else background_of(background)

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        """Score `s_i` as above, `(B, T, n)`."""
        tower = seen.tower
        text = F.normalize(wide(text), dim=-1)
        if self.background is not None:
            text = text - self.share * text.new_tensor(self.background)
        goal = tower.read_back(text)
        total, later = None, None
        for index in range(seen.index, len(tower.blocks)):
            gamma = norm_scale(tower.adapter.projections(tower.blocks[index]).norm)
            directions = head_directions(tower, index, goal)
            scaled = directions if gamma is None else directions * gathered(gamma)
            loudness = scaled.norm(dim=-1, keepdim=True).sqrt()
            if total is None:  # the selection layer's own term reads its normed input
                total = linear_scores((directions * loudness).sum(dim=2), seen.normed)
            else:
                term = (scaled * loudness).sum(dim=2)
                later = term if later is None else later + term
        assert total is not None
        if later is None:
            return total
        eps = norm_eps(tower.adapter.projections(tower.blocks[-1]).norm)
        return total + normalised_scores(later, seen.patches, eps)

    def combine(self, scores: Tensor) -> Tensor:
        """Give each patch its highest share over all texts, `(B, T, n)` to weights `(B, n)`."""
        shares = (self.sharpness * standardise(scores)).log_softmax(dim=-1)
        return standardise(shares.amax(dim=1)).softmax(dim=-1)

    def cost(self, tower: Any, index: int, first: bool, guidance: str) -> tuple[int, int]:
        return super().cost(tower, index, True, guidance)  # every selection layer computes its own directions

    def __repr__(self) -> str:
        return f"contrast(background={self.background is not None}, share={self.share}, sharpness={self.sharpness})"


def background_of(features: Any) -> list[float]:
    """Return the mean of K normalised features `(K, D)` as numbers: a setting, which belongs to no device.

    Raises:
        ValueError: another shape, or no feature.
    """
    found = features.detach().double() if isinstance(features, Tensor) else Tensor(features).double()
    if found.dim() != 2 or 0 in found.shape:
        raise ValueError(f"background must be features of generic prompts, (prompts, width); got {tuple(found.shape)}")
    return F.normalize(found, dim=-1).mean(dim=0).tolist()  # type: ignore[no-any-return]
