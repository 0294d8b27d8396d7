"""Image-text matching and its hard negatives (Li et al., ALBEF, NeurIPS 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_pairs, cosines_of, home_of, positive


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw partners for image-text matching that look alike but do not belong together (ALBEF, NeurIPS 2021).

    Row i of both sides is a pair. The negative of anchor i is drawn from the other rows with the probabilities that the
    contrastive similarity gives them, `f(v_i, t_j) / sum_k f(v_i, t_k)`, without gradient.

    Args:
        image_features: `(N, D)`.
        text_features: `(N, D)`.
        temperature: above 0; larger draws easier negatives.
        groups: `(N,)`, rows of the same number are never each other's negatives: captions of one image (ALBEF's `idx`).
        generator: draws them (images for the texts first); `None` is torch's own.

    Returns:
        `(N,)` twice, of indices: the image that is the negative of each text, the text that is that of each image.

    Raises:
        ValueError: features of different or wrong shape; a row that all others share the group of.
    """
    check_pairs(image_features, text_features)
    cosines = cosines_of(image_features, text_features).detach()
    names = torch.arange(len(cosines), device=cosines.device) if groups is None else groups
    if names.shape != cosines.shape[:1]:
        raise ValueError(f"groups must be ({len(cosines)},), one for each pair, got {tuple(names.shape)}")
    same = names[:, None] == names
    if same.all(dim=1).any():
        raise ValueError("a pair has no negative: there must be a row of another group for each")
    logits = (cosines / positive(temperature)).masked_fill(same, float("-inf"))

    def draw(scores: Tensor) -> Tensor:
        chances = scores.softmax(dim=1).to(home_of(generator, scores))
        return torch.multinomial(chances, 1, generator=generator).squeeze(1).to(scores.device)

    return draw(logits.T), draw(logits)


def itm_loss(matching: Tensor, mismatched: Tensor) -> Tensor:
    """Compute image-text matching: cross-entropy of "fits" (class 1) against "does not fit" (class 0), all pairs alike.

    The image tokens of a mismatched pair must have been selected with that pair's OWN text, or the selection tells the
    label (docs/training.md).

    Args:
        matching: `(N, 2)` logits of pairs that fit.
        mismatched: `(M, 2)` logits of pairs that do not, for example of both kinds of `hard_negatives`.

    Raises:
        ValueError: logits of another shape.
    """
    for logits in (matching, mismatched):
        if logits.dim() != 2 or logits.shape[1] != 2:
            raise ValueError(f"logits must be (pairs, 2), not fitting and fitting, got {tuple(logits.shape)}")
    target = torch.arange(len(matching) + len(mismatched), device=matching.device) < len(matching)
    logits = torch.cat([matching, mismatched])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target.long())
