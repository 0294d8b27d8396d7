"""Contrastive objectives: ITC, SRCL and what they compare with; `f(v, t) = exp(cos(v, t) / temperature)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_pairs, cosines_of, positive


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    image_candidates: Tensor | None = None,
    text_candidates: Tensor | None = None,
) -> Tensor:
    """Compute the image-text contrastive loss (InfoNCE), the mean of both directions.

    `L_v = -1/N sum_i log( f(v_i, t_i) / sum_j f(v_i, t_j) )`, and the same from text to image.

    Args:
        image_features: `(N, D)`.
        text_features: `(N, D)`.
        temperature: above 0; a tensor may be learned.
        image_candidates: `(M, D)`, M of at least N, what texts are compared with in place of `image_features`: row i
            matches text i, the rows behind N match none. ALBEF's momentum features and queue,
            `torch.cat([image_feat_m, image_queue.T])`, or the rows of all processes, `gather_features(image_features)`.
        text_candidates: `(M', D)`, likewise what images are compared with.

    Returns:
        A scalar.

    Raises:
        ValueError: features of different or wrong shape; a temperature that is not positive.
    """
    check_pairs(image_features, text_features)
    logits = (
        cosines_of(image_features, text_features if text_candidates is None else text_candidates),
        cosines_of(text_features, image_features if image_candidates is None else image_candidates),
    )
    target = torch.arange(len(image_features), device=image_features.device)
    return sum(F.cross_entropy(one / positive(temperature), target) for one in logits) / 2  # type: ignore[return-value]


def srcl_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    teacher_image_features: Tensor | None = None,
    teacher_text_features: Tensor | None = None,
    alpha: float = 0.0,
    delta: float = 1.0,
    *,
    image_candidates: Tensor | None = None,
    text_candidates: Tensor | None = None,
    teacher_image_candidates: Tensor | None = None,
    teacher_text_candidates: Tensor | None = None,
) -> Tensor:
    """Compute the similarity-regulated contrastive loss (Jiang et al., ACL 2023): negatives that look alike push less.

    `L_v = -1/N sum_i log( f(v_i, t_i) / ( f(v_i, t_i) + sum_{j != i} w_ij f(v_i, t_j) ) )`, and the same from text to
    image; their mean. `s_ij = alpha * teacher exp(cos) + (1 - alpha) * own exp(cos)`, without gradient, and
    `w_ij = s_ij ** -delta`, scaled so that the weights of an anchor's negatives have the mean 1 (`negative_weights`).

    Args:
        image_features: `(N, D)`.
        text_features: `(N, D)`.
        temperature: above 0.
        teacher_image_features: `(N, E)`, of a frozen model of the same structure; needed where `alpha` is above 0.
        teacher_text_features: `(N, E)`.
        alpha: weight of the teacher, in [0, 1]; `progressive_alpha` lets it fall from 1 to 0.
        delta: how much likeness counts; 0 is InfoNCE, 1 the paper's `1 / s`.
        image_candidates: `(M, D)`, as for `itc_loss`.
        text_candidates: `(M', D)`.
        teacher_image_candidates: `(M, E)`, the teacher's features of the same rows.
        teacher_text_candidates: `(M', E)`.

    Raises:
        ValueError: features of different or wrong shape, `alpha` outside of [0, 1] or without a teacher.
    """
    alpha = float(alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1] (the weight of the teacher), got {alpha}")
    if alpha > 0 and (teacher_image_features is None or teacher_text_features is None):
        raise ValueError(f"alpha={alpha} weighs a teacher: give teacher_image_features and teacher_text_features")
    check_pairs(image_features, text_features)

    def direction(
        anchors: Tensor, candidates: Tensor, taught_anchors: Tensor | None, taught_candidates: Tensor | None
    ) -> Tensor:
        cosines = cosines_of(anchors, candidates)
        similarity = (1 - alpha) * cosines.detach().exp()
        if alpha > 0:
            taught = cosines_of(taught_anchors, taught_candidates).detach()  # type: ignore[arg-type]
            if taught.shape != cosines.shape:
                raise ValueError(
                    f"the teacher compares {taught.shape[0]} with {taught.shape[1]} rows, the model {cosines.shape[0]} "
                    f"with {cosines.shape[1]}: give the teacher's features of the same pairs and candidates"
                )
            similarity = similarity + alpha * taught.exp()
        return _regulated(cosines / positive(temperature), similarity, delta)

    def first(candidates: Tensor | None, features: Tensor | None) -> Tensor:
        return features if candidates is None else candidates  # type: ignore[return-value]

    to_text = direction(
        image_features,
        first(text_candidates, text_features),
        teacher_image_features,
        first(teacher_text_candidates, teacher_text_features),
    )
    to_image = direction(
        text_features,
        first(image_candidates, image_features),
        teacher_text_features,
        first(teacher_image_candidates, teacher_image_features),
    )
    return (to_text + to_image) / 2


def negative_weights(similarity: Tensor, delta: float = 1.0) -> Tensor:
    """Return the weights `w_ij` that `srcl_loss` gives to the negatives of each anchor (a row).

    `w_ij = s_ij ** -delta`, scaled so that those of a row have the mean 1: they fall with the similarity.

    Args:
        similarity: `(N, M)`, positive: `exp(cos)` of anchor i with candidate j; the pairs (i, i) match.
        delta: how much likeness counts; 0 gives every negative the weight 1.

    Returns:
        `(N, M)`, 0 where i = j.
    """
    weights = similarity.pow(-delta).masked_fill(_own(similarity), 0.0)
    mean = weights.sum(dim=1, keepdim=True) / max(1, similarity.shape[1] - 1)
    return weights / mean.clamp_min(torch.finfo(weights.dtype).tiny)


def _regulated(logits: Tensor, similarity: Tensor, delta: float) -> Tensor:
    """Compute one direction of `srcl_loss`: cross-entropy whose logits are offset by the weights of the negatives."""
    offset = negative_weights(similarity, delta).masked_fill(_own(similarity), 1.0).log()
    return F.cross_entropy(logits + offset, torch.arange(len(logits), device=logits.device))


def _own(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)


def progressive_alpha(step: int, total_steps: int) -> float:
    """Return the weight of the teacher in `srcl_loss` at this step: a line from 1 at step 0 to 0 at `total_steps`.

    Raises:
        ValueError: a negative step or a total below 1.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step must be 0 or more and total_steps 1 or more, got {step} and {total_steps}")
    return max(0.0, 1.0 - step / total_steps)
