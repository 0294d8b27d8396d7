"""What all objectives ask of features `(N, D)`: pairs of one shape, their cosines in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.dim() != 2 or image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(
            "features must be (N, D) and (N, D) with row i of both a pair, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def cosines_of(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return `(N, M)` cosines of every anchor with every candidate."""
    if candidates.dim() != 2 or candidates.shape[1] != anchors.shape[1] or len(candidates) < len(anchors):
        raise ValueError(
            f"candidates must be (M, {anchors.shape[1]}) with M of at least {len(anchors)}, the first {len(anchors)} "
            f"rows matching the features of the other side; got {tuple(candidates.shape)}"
        )
    wide = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.to(wide), dim=-1) @ F.normalize(candidates.to(wide), dim=-1).T


def positive(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return temperature


def home_of(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
