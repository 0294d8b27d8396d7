"""Merging of similar patches in the blocks before the first selection: no text is read (ToMe §3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..functional import merge_pairs, merge_schedule
from .base import Reduced


@dataclass(frozen=True)
class Merge:
    """How the blocks before the first selection layer merge."""

    share: float
    """Of the patches that are removed, those that leave by merging; in [0, 1)."""
    ratio: tuple[int, int]
    """Keep rate of the first selection, as `as_ratio` gives it."""
    num_blocks: int
    """How many blocks merge."""

    def schedule(self, num_patches: int) -> tuple[int, ...]:
        """Return how many patches each block merges, of images of `num_patches` patches."""
        return merge_schedule(num_patches, self.ratio, self.share, self.num_blocks)

    def reduce(
        self, tokens: Tensor, sizes: Tensor, keys: Tensor, num_merge: int, num_prefix_tokens: int
    ) -> tuple[Reduced, Tensor]:
        """Merge `num_merge` patches; return the shortened sequence and the sizes of its tokens.

        Args:
            tokens: `(B, P + n, D)`.
            sizes: `(B, P + n)`.
            keys: `(B, P + n, E)`, averaged over the heads.
            num_merge: from 1 to half of the n.
            num_prefix_tokens: `P`.
        """
        found, sizes, into, kept = merge_pairs(tokens, sizes, keys, num_merge, num_prefix_tokens)
        return Reduced(found, kept, into), sizes

    def cost(self, num_patches: int, num_merge: int, width: int, key_width: int) -> int:
        """Return the multiply-adds of one block: the cosines, and the sums over the patches that go."""
        if not num_merge:
            return 0
        odd = num_patches // 2
        return (num_patches - odd) * odd * key_width + odd * num_merge * width
