"""Alignment without a softmax over negatives, and alignment of what the selection pools."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from .contrastive import itc_loss
from .features import check_pairs, cosines_of, home_of


def cosine_alignment_loss(
    image_features: Tensor, text_features: Tensor, margin: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Compute cosine alignment in place of ITC: no softmax over the negatives.

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
    check_pairs(image_features, text_features)
    cosines = cosines_of(image_features, text_features)
    size = len(cosines)
    if size < 2:
        raise ValueError("cosine_alignment_loss needs at least 2 pairs: a single one has no mismatched partner")
    rows = torch.arange(size, device=cosines.device)
    matching = 1 - cosines.diagonal()
    total = cosines.new_zeros(())
    for direction in (cosines, cosines.T):
        shift = torch.randint(1, size, (size,), generator=generator, device=home_of(generator, cosines)).to(rows.device)
        mismatched = (direction[rows, (rows + shift) % size] - margin).clamp_min(0)
        total = total + torch.cat([matching, mismatched]).mean()
    return total / 2


def selection_alignment_loss(
    pooled: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute ITC between what the selection pooled and the text: it teaches the relevance, which top-k alone cannot.

    Args:
        pooled: `(N, D)`, `trace[i].pooled` of `handle.record()`: the relevance-weighted mean of the patches.
        text_features: `(N, E)`.
        temperature: above 0.
        project: from D to E (the host's own projection); `None` where the widths are equal.

    Raises:
        ValueError: shapes that do not fit after `project`.
    """
    return itc_loss(pooled if project is None else project(pooled), text_features, temperature)
