"""Training objectives around the selection, as functions of features `(N, D)`; row i of both sides match.

`f(v, t) = exp(cos(v, t) / temperature)` throughout; features are normalised inside, in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    image_candidates: Tensor | None = None,
    text_candidates: Tensor | None = None,
) -> Tensor:
    """Image-text contrastive loss (InfoNCE), the mean of both directions.

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
    _matching(image_features, text_features)
    logits = (
        _cosines(image_features, text_features if text_candidates is None else text_candidates),
        _cosines(text_features, image_features if image_candidates is None else image_candidates),
    )
    target = torch.arange(len(image_features), device=image_features.device)
    return sum(F.cross_entropy(one / _positive(temperature), target) for one in logits) / 2  # type: ignore[return-value]


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
    """Similarity-regulated contrastive learning (Jiang et al., ACL 2023): negatives that look alike push less.

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
    _matching(image_features, text_features)

    def direction(
        anchors: Tensor, candidates: Tensor, taught_anchors: Tensor | None, taught_candidates: Tensor | None
    ) -> Tensor:
        cosines = _cosines(anchors, candidates)
        similarity = (1 - alpha) * cosines.detach().exp()
        if alpha > 0:
            taught = _cosines(taught_anchors, taught_candidates).detach()  # type: ignore[arg-type]
            if taught.shape != cosines.shape:
                raise ValueError(
                    f"the teacher compares {taught.shape[0]} with {taught.shape[1]} rows, the model {cosines.shape[0]} "
                    f"with {cosines.shape[1]}: give the teacher's features of the same pairs and candidates"
                )
            similarity = similarity + alpha * taught.exp()
        return _regulated(cosines / _positive(temperature), similarity, delta)

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
    """The weights `w_ij` that `srcl_loss` gives to the negatives of each anchor (a row).

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
    """One direction of `srcl_loss`: cross-entropy with the weights of the negatives as an offset of their logits."""
    offset = negative_weights(similarity, delta).masked_fill(_own(similarity), 1.0).log()
    return F.cross_entropy(logits + offset, torch.arange(len(logits), device=logits.device))


def _own(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)


def gather_features(features: Tensor) -> Tensor:
    """The rows of all processes of the initialised `torch.distributed` group, those of this one in front.

    Candidates for `itc_loss` and `srcl_loss` in distributed training: with a mean loss per process and the averaging of
    `DistributedDataParallel`, the gradients are those of one process with the whole batch (they flow back to the
    processes that the rows came from). Every process must have the same number of rows. Without a group the features
    come back as they are.

    Args:
        features: `(N, D)`.

    Returns:
        `(N * processes, D)`.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    rows, rank = _AllRows.apply(features), dist.get_rank()
    return torch.cat([rows[rank], *rows[:rank], *rows[rank + 1 :]])


class _AllRows(torch.autograd.Function):
    """`(N, D)` of this process to `(processes, N, D)`; backward sums what all processes want of these rows.

    In place of `torch.distributed.nn.functional.all_gather`, whose backward over gloo, a scatter per process, now and
    then takes the process down with it.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        rows = [torch.empty_like(features, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, features.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


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
    _matching(image_features, text_features)
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


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Partners for image-text matching that look alike but do not belong together (Li et al., ALBEF, NeurIPS 2021).

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
    _matching(image_features, text_features)
    cosines = _cosines(image_features, text_features).detach()
    names = torch.arange(len(cosines), device=cosines.device) if groups is None else groups
    if names.shape != cosines.shape[:1]:
        raise ValueError(f"groups must be ({len(cosines)},), one for each pair, got {tuple(names.shape)}")
    same = names[:, None] == names
    if same.all(dim=1).any():
        raise ValueError("a pair has no negative: there must be a row of another group for each")
    logits = (cosines / _positive(temperature)).masked_fill(same, float("-inf"))

    def draw(scores: Tensor) -> Tensor:
        chances = scores.softmax(dim=1).to(_home(generator, scores))
        return torch.multinomial(chances, 1, generator=generator).squeeze(1).to(scores.device)

    return draw(logits.T), draw(logits)


def itm_loss(matching: Tensor, mismatched: Tensor) -> Tensor:
    """Image-text matching: cross-entropy of "fits" (class 1) against "fits not" (class 0), over all pairs alike.

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


def progressive_alpha(step: int, total_steps: int) -> float:
    """The weight of the teacher in `srcl_loss` at this step: from 1 at step 0 in a line to 0 at `total_steps`.

    Raises:
        ValueError: a negative step or a total below 1.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step must be 0 or more and total_steps 1 or more, got {step} and {total_steps}")
    return max(0.0, 1.0 - step / total_steps)


def _matching(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.dim() != 2 or image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(
            "features must be (N, D) and (N, D) with row i of both a pair, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def _cosines(anchors: Tensor, candidates: Tensor) -> Tensor:
    """`(N, M)` cosines of every anchor with every candidate."""
    if candidates.dim() != 2 or candidates.shape[1] != anchors.shape[1] or len(candidates) < len(anchors):
        raise ValueError(
            f"candidates must be (M, {anchors.shape[1]}) with M of at least {len(anchors)}, the first {len(anchors)} "
            f"rows matching the features of the other side; got {tuple(candidates.shape)}"
        )
    wide = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.to(wide), dim=-1) @ F.normalize(candidates.to(wide), dim=-1).T


def _positive(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return temperature


def _home(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
