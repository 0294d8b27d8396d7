"""`Protect`: the most relevant patches stay as they are, the others merge among themselves by likeness (ours).

Where the usual fused token is the mean of everything that goes, this keeps apart what differs: rounds of bipartite
matching (ToMe §3, as `functional.merge_similar`) over the patches that are not protected, until few are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import merge_pairs, most_relevant
from .base import Alike, Places, Reduced, Reduction


class Protect(Reduction):
    """Keep `k` patches and merge the others into `round(share * k)` tokens, at least one, weighted by size.

    Nothing passes a gradient to the relevance, since sizes weigh what merges: for frozen models.

    Args:
        share: tokens that the others become, per patch that stays; above 0. A third makes a quarter of what is left.
    """

    name = "protect"
    reads_keys = True

    def __init__(self, share: float = 1 / 3) -> None:
        self.share = share

    def num_fused(self, num_patches: int, num_keep: int) -> int:
        return min(num_patches - num_keep, max(1, round(self.share * num_keep)))

    def rounds(self, num_patches: int, num_keep: int) -> list[int]:
        """Return how many of the other patches each round of matching merges away: half at most."""
        left, counts = num_patches - num_keep, []
        goal = self.num_fused(num_patches, num_keep)
        while left > goal:
            counts.append(min(left - goal, left // 2))
            left -= counts[-1]
        return counts

    def reduce(
        self,
        tokens: Tensor,
        relevance: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        places: Places | None = None,
        alike: Alike | None = None,
    ) -> Reduced:
        if alike is None:
            raise ValueError("this reduction merges by likeness: give reduce(…, alike=Alike(keys, sizes))")
        keys, sizes, prefix = alike.keys, alike.sizes, num_prefix_tokens
        if relevance.dim() == 3:  # (B, T, n): every image with every text
            copies = relevance.shape[1]
            tokens, keys, sizes = (part.repeat_interleave(copies, dim=0) for part in (tokens, keys, sizes))
            relevance = relevance.flatten(0, 1)
        rows, patches, width = relevance.shape[0], relevance.shape[1], tokens.shape[-1]
        kept = most_relevant(relevance, num_keep)
        others = most_relevant(torch.ones_like(relevance).scatter(1, kept, 0.0), patches - num_keep)

        def take(part: Tensor, which: Tensor) -> Tensor:
            return part[:, prefix:].gather(1, which.unsqueeze(-1).expand(-1, -1, part.shape[-1]))

        merged = torch.cat([take(tokens, others), take(keys, others).to(tokens.dtype)], dim=-1)
        weights = sizes[:, prefix:].gather(1, others)
        went = torch.arange(others.shape[1], device=tokens.device).expand(rows, -1)
        for count in self.rounds(patches, num_keep):
            merged, weights, step, _ = merge_pairs(merged, weights, merged[..., width:], count, 0)
            went = step.gather(1, went)
        # A NaN among the weights ranks arbitrarily, and must not go unseen.
        unknown = relevance.isnan().any(dim=1).view(-1, 1, 1)
        fused = merged[..., :width].masked_fill(unknown, float("nan"))
        ahead = torch.arange(prefix + num_keep, device=tokens.device).expand(rows, -1)
        into = went.new_empty(rows, patches).scatter(1, others, went + prefix + num_keep)
        into = into.scatter(1, kept, ahead[:, prefix:])
        found = torch.cat([tokens[:, :prefix], take(tokens, kept), fused], dim=1)
        return Reduced(found, kept, torch.cat([ahead[:, :prefix], into], dim=1))

    def cost(self, num_patches: int, num_keep: int, width: int) -> int:
        total, left = 0, num_patches - num_keep
        for count in self.rounds(num_patches, num_keep):
            total += left // 2 * count * width
            left -= count
        return total
