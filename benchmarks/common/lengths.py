"""Tokens that each block sees under each way to spend less: what they cost, and which settings cost the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

from patchselect.functional import as_ratio, merge_schedule, num_kept
from patchselect.reduction import Protect

from .tome import schedule

Lengths = List[Tuple[int, int]]
"""Tokens that the attention and the MLP of each block see, [CLS] and fused token included."""


@dataclass(frozen=True)
class Lengthwise:
    """A tower as its lengths are reckoned: prefix tokens, patches, and blocks whose MLP is four times as wide."""

    patches: int
    depth: int
    width: int
    layers: tuple[int, ...]
    """Of the paper's two selections; one selection takes place in the first of them."""
    heads: int
    prefix: int = 1
    """A [CLS], and registers where there are any."""

    def whole(self) -> Lengths:
        """Return lengths of which nothing leaves."""
        return [(self.prefix + self.patches,) * 2] * self.depth

    def selected(self, rate: float) -> Lengths:
        """Return lengths under the paper's selections at this rate each."""
        seen, now = [], self.patches
        for block in range(self.depth):
            before = now
            if block in self.layers and rate < 1:
                now = min(now, num_kept(now, as_ratio(rate)) + 1)
            seen.append((self.prefix + before, self.prefix + now))
        return seen

    def merged(self, removed: int, first: int | None = None) -> Lengths:
        """Return lengths under token merging over all blocks, or the `first` alone; a block merges at most half."""
        seen, now = [], self.patches
        for step in schedule(removed, self.depth, first):
            before = now
            now -= min(step, now // 2)
            seen.append((self.prefix + before, self.prefix + now))
        return seen

    def once(self, rate: float, merge: float, protect: float | None = None) -> Lengths:
        """Return lengths under one selection, before which the share `merge` of what is removed merges.

        The others become one token, or with `protect` what `Protect(protect)` makes of them.
        """
        layer, ratio, now = self.layers[0], as_ratio(rate), self.patches
        merges = merge_schedule(now, ratio, merge, layer) if merge else ()
        seen = []
        for block in range(self.depth):
            before = now
            if block < layer and merge:
                now -= merges[block]
            elif block == layer:
                kept = num_kept(self.patches, ratio)
                now = min(now, kept + (1 if protect is None else Protect(protect).num_fused(now, kept)))
            seen.append((self.prefix + before, self.prefix + now))
        return seen

    def products(self, lengths: Lengths) -> int:
        """Count multiplications of the matrix products of all blocks, over the width."""
        return sum(4 * a * self.width + 2 * a * a + 8 * m * self.width for a, m in lengths)

    def merging(self, lengths: Lengths) -> float:
        """Count the same of what `patchselect` merges by in the blocks before the selection: keys, cosines and sums."""
        head, total = self.width // self.heads, 0
        for block, (attention, mlp) in enumerate(lengths[: self.layers[0]]):
            patches, removed = attention - self.prefix, attention - mlp
            if removed:
                odd = patches // 2
                total += (patches - odd) * odd * head + odd * removed * self.width
                # Later blocks count sizes and have the keys at hand.
                total += attention * head * self.width if block == 0 else 0
        return total / self.width

    def share(self, lengths: Lengths, merges: bool = False) -> float:
        """Return the whole share, 1 being the image unreduced; without ranking, fusing, ToMe's cosines: below 1 %."""
        return (self.products(lengths) + (self.merging(lengths) if merges else 0)) / self.products(self.whole())

    def merged_like(self, share: float, first: int | None = None) -> int:
        """Return how many patches token merging removes in all to come closest to this share; the fewest of several."""
        return min(
            range(self.patches), key=lambda removed: (abs(self.share(self.merged(removed, first)) - share), removed)
        )

    def protecting(self, rate: float, lengths: Lengths, protect: float) -> float:
        """Count the same of what `Protect` merges by in the selecting block: cosines, and sums of tokens and keys."""
        head, total = self.width // self.heads, 0
        patches, kept = lengths[self.layers[0]][0] - self.prefix, num_kept(self.patches, as_ratio(rate))
        left = patches - kept
        for count in Protect(protect).rounds(patches, kept):
            odd = left // 2
            total += (left - odd) * odd * head + odd * count * (self.width + head)
            left -= count
        return total / self.width

    def once_share(self, rate: float, merge: float, protect: float | None = None) -> float:
        """Return the whole share of `once`, with what it merges by."""
        lengths = self.once(rate, merge, protect)
        more = 0 if protect is None else self.protecting(rate, lengths, protect) / self.products(self.whole())
        return self.share(lengths, merge > 0) + more

    def rate_like(self, share: float, merge: float, protect: float | None = None) -> float:
        """Return the keep rate of one selection that comes closest to this share; the highest of several."""
        rates = [kept / self.patches for kept in range(self.patches, 0, -1)]
        return min(rates, key=lambda rate: abs(self.once_share(rate, merge, protect) - share))
