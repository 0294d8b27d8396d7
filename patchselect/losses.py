"""Training objectives around the selection, as functions of features `(N, D)`; row i of both sides match.

`f(v, t) = exp(cos(v, t) / temperature)` throughout; features are normalised inside, in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(image_features: Tensor, text_features: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Image-text contrastive loss (InfoNCE), the mean of both directions.

    `L_v = -1/N sum_i log( f(v_i, t_i) / sum_j f(v_i, t_j) )`, and the same from text to image.

    Args:
        image_features: `(N, D)`.
        text_features: `(N, D)`.
        temperature: above 0; a tensor may be learned.

    Returns:
        A scalar.

    Raises:
        ValueError: features of different or wrong shape; a temperature that is not positive.
    """
    logits = _cosines(image_features, text_features) / _positive(temperature)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def srcl_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    teacher_image_features: Tensor | None = None,
    teacher_text_features: Tensor | None = None,
    alpha: float = 0.0,
    delta: float = 1.0,
) -> Tensor:
    """Similarity-regulated contrastive learning (Jiang et al., ACL 2023): negatives that look alike push less.

    `L_v = -1/N sum_i log( f(v_i, t_i) / ( f(v_i, t_i) + sum_{j != i} w_ij f(v_i, t_j) ) )`, and the same from text to
    image; their mean. `s_ij = alpha * teacher exp(cos) + (1 - alpha) * own exp(cos)`, without gradient, and
    `w_ij = s_ij ** -delta`, scaled so that the weights of an anchor's negatives have the mean 1.

    Args:
        image_features: `(N, D)`.
        text_features: `(N, D)`.
        temperature: above 0.
        teacher_image_features: `(N, E)`, of a frozen model of the same structure; needed where `alpha` is above 0.
        teacher_text_features: `(N, E)`.
        alpha: weight of the teacher, in [0, 1]; `progressive_alpha` lets it fall from 1 to 0.
        delta: how much likeness counts; 0 is InfoNCE, 1 the paper's `1 / s`.

    Raises:
        ValueError: features of different or wrong shape, `alpha` outside of [0, 1] or without a teacher.
    """
    cosines = _cosines(image_features, text_features)
    alpha = float(alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1] (the weight of the teacher), got {alpha}")
    similarity = (1 - alpha) * cosines.detach().exp()
    if alpha > 0:
        if teacher_image_features is None or teacher_text_features is None:
            raise ValueError(f"alpha={alpha} weighs a teacher: give teacher_image_features and teacher_text_features")
        taught = _cosines(teacher_image_features, teacher_text_features).detach()
        if taught.shape != cosines.shape:
            raise ValueError(f"the teacher has {len(taught)} pairs, the batch {len(cosines)}: give the same pairs")
        similarity = similarity + alpha * taught.exp()
    logits = cosines / _positive(temperature)
    return (_regulated(logits, similarity, delta) + _regulated(logits.T, similarity.T, delta)) / 2


def negative_weights(similarity: Tensor, delta: float = 1.0) -> Tensor:
    """The weights `w_ij` that `srcl_loss` gives to the negatives of each anchor (a row).

    `w_ij = s_ij ** -delta`, scaled so that those of a row have the mean 1: they fall with the similarity.

    Args:
        similarity: `(N, N)`, positive: `exp(cos)` of row i with column j, the matching pairs on the diagonal.
        delta: how much likeness counts; 0 gives every negative the weight 1.

    Returns:
        `(N, N)`, 0 on the diagonal.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    weights = similarity.pow(-delta).masked_fill(own, 0.0)
    mean = weights.sum(dim=1, keepdim=True) / max(1, len(similarity) - 1)
    return weights / mean.clamp_min(torch.finfo(weights.dtype).tiny)


def _regulated(logits: Tensor, similarity: Tensor, delta: float) -> Tensor:
    """One direction of `srcl_loss`: cross-entropy with the weights of the negatives as an offset of their logits."""
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    offset = negative_weights(similarity, delta).masked_fill(own, 1.0).log()
    return F.cross_entropy(logits + offset, torch.arange(len(logits), device=logits.device))


def cosine_alignment_loss(
    image_features: Tensor, text_features: Tensor, margin: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Cosine alignment in place of ITC: no softmax over the negatives.

    Per direction, the mean over N matching and N mismatched pairs of `1 - cos` and `max(0, cos - margin)` (as
    `torch.nn.CosineEmbeddingLoss`); the mismatched partner of row i is drawn uniformly from the other rows. The mean
    of both directions.

    Args:
        image_features: `(N, D)`, N of at least 2.
        text_features: `(N, D)`.
        margin: in [-1, 1]; mismatched pairs below it cost nothing.
        generator: draws the mismatched partners (image to text first); `None` is torch's own.

    Raises:
        ValueError: features of different or wrong shape, or a single pair, which has no mismatched partner.
    """
    cosines = _cosines(image_features, text_features)
    size = len(cosines)
    if size < 2:
        raise ValueError("cosine_alignment_loss needs at least 2 pairs: a single one has no mismatched partner")
    rows = torch.arange(size, device=cosines.device)
    matching = 1 - cosines.diagonal()
    total = cosines.new_zeros(())
    for direction in (cosines, cosines.T):
        shift = torch.randint(1, size, (size,), generator=generator, device=_home(generator, cosines)).to(rows.device)
        mismatched = (direction[rows, (rows + shift) % size] - margin).clamp_min(0)
        total = total + torch.cat([matching, mismatched]).mean()
    return total / 2


def selection_alignment_loss(
    pooled: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """ITC between what the selection pooled and the text: it teaches the relevance, which top-k alone cannot.

    Args:
        pooled: `(N, D)`, `trace[i].pooled` of `handle.record()`: the relevance-weighted mean of the patches.
        text_features: `(N, E)`.
        temperature: above 0.
        project: from D to E (the host's own projection); `None` where the widths are equal.

    Raises:
        ValueError: shapes that do not fit after `project`.
    """
    return itc_loss(pooled if project is None else project(pooled), text_features, temperature)


def progressive_alpha(step: int, total_steps: int) -> float:
    """The weight of the teacher in `srcl_loss` at this step: from 1 at step 0 in a line to 0 at `total_steps`.

    Raises:
        ValueError: a negative step or a total below 1.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step must be 0 or more and total_steps 1 or more, got {step} and {total_steps}")
    return max(0.0, 1.0 - step / total_steps)


def _cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    """`(N, N)` cosines of every image with every text."""
    if image_features.dim() != 2 or image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(
            "features must be (N, D) and (N, D) with row i of both a pair, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    wide = torch.promote_types(image_features.dtype, torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):
        return F.normalize(image_features.to(wide), dim=-1) @ F.normalize(text_features.to(wide), dim=-1).T


def _positive(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return temperature


def _home(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
