"""`fusion="mean"`, `"sum"` and `"none"`: the rest becomes one token, or is dropped (TRIPS §3.2, EViT §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import Fusion, destinations, keep_and_fuse, num_fused
from .base import Alike, Places, Reduced, Reduction


class Fuse(Reduction):
    """Fuse the patches that do not stay into one token.

    Args:
        fusion: `"mean"`, weighted by the relevance; `"sum"`, the paper's weighted sum; `"none"`, they are dropped.
    """

    def __init__(self, fusion: Fusion = "mean") -> None:
        self.name: Fusion = fusion  # type: ignore[assignment]

    def reduce(
        self,
        tokens: Tensor,
        relevance: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        places: Places | None = None,
        alike: Alike | None = None,
    ) -> Reduced:
        found, kept = keep_and_fuse(tokens, relevance, num_keep, num_prefix_tokens, self.name)  # type: ignore[arg-type]
        patches = tokens.shape[1] - num_prefix_tokens
        rest = num_prefix_tokens + num_keep if self.num_fused(patches, num_keep) else -1
        return Reduced(found, kept, destinations(kept, patches, num_prefix_tokens, rest))

    def sizes(self, sizes: Tensor, reduced: Reduced) -> Tensor:
        fused = int(self.name != "none")
        prefix = reduced.tokens.shape[1] - reduced.kept.shape[1] - fused
        own = torch.cat([sizes[:, :prefix], sizes[:, prefix:].gather(1, reduced.kept)], dim=1)
        if not fused:
            return own
        rest = (sizes * (reduced.into == own.shape[1])).sum(dim=1, keepdim=True)
        return torch.cat([own, rest], dim=1)

    def num_fused(self, num_patches: int, num_keep: int) -> int:
        return num_fused(num_patches, num_keep, self.name)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return self.name
