"""What a reduction answers: subclass `Reduction` for a new way to shorten a sequence.

A subclass must answer `reduce` and `num_fused`. CONTRIBUTING.md has a worked example of about 40 lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """A shortened sequence, and where everything in it came from."""

    tokens: Tensor
    """`(R, P + k + f, D)`: prefix tokens, kept patches, fused tokens."""
    kept: Tensor
    """`(R, k)`: the kept patches as indices among the n that came, in the order of their tokens."""
    into: Tensor
    """`(R, P + n)`: where each token that came went, as a place in the new sequence; -1 if it was dropped."""


@dataclass
class Places:
    """Where the patches that came stand in the image; for reductions that ask for it (`reads_places`)."""

    indices: Tensor
    """`(B, n)`: index in the original grid, row by row; -1 is a fused token of an earlier selection."""
    grid: tuple[int, int]
    """Height and width of that grid, in patches."""


@dataclass
class Alike:
    """How much alike the tokens that came are; for reductions that ask for it (`reads_keys`)."""

    keys: Tensor
    """`(B, P + n, E)`: the keys of the block's attention, averaged over the heads: what tokens are compared by."""
    sizes: Tensor
    """`(B, P + n)`: how many patches of the image each token stands for."""


class Reduction:
    """What becomes of the patches that do not stay. Instances hold settings, never tensors of one call."""

    name: str = ""
    """What error messages, records and tables call it."""
    reads_places: bool = False
    """Whether `reduce` wants to know where each patch stands in the image."""
    reads_keys: bool = False
    """Whether `reduce` takes a sixth argument, `alike`, and wants to know how much alike the tokens are."""

    def reduce(
        self,
        tokens: Tensor,
        relevance: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        places: Places | None = None,
        alike: Alike | None = None,
    ) -> Reduced:
        """Keep `num_keep` patches of each image and do something with the others. Shapes must be static.

        Args:
            tokens: `(B, P + n, D)`.
            relevance: `(B, n)`, or `(B, T, n)` to select T times from each image (R is B or B * T, image-major);
                at least 0, the sum is 1.
            num_keep: `k`, at least 1 and less than n.
            num_prefix_tokens: `P`.
            places: where the patches stand; `None` unless `reads_places`.
            alike: how much alike the tokens are; passed with `reads_keys` alone.
        """
        raise NotImplementedError

    def num_fused(self, num_patches: int, num_keep: int) -> int:
        """Return `f`, how many tokens the patches that do not stay become."""
        raise NotImplementedError

    def sizes(self, sizes: Tensor, reduced: Reduced) -> Tensor:
        """Return how many patches of the image each token that came out stands for, `(R, P + k + f)`.

        Here the sum of the sizes of what went into it, `sizes` `(R, P + n)`; prefix tokens have size 1.
        """
        places = torch.arange(reduced.tokens.shape[1], device=sizes.device).view(1, -1, 1)
        return ((reduced.into.unsqueeze(1) == places) * sizes.unsqueeze(1)).sum(dim=-1)

    def cost(self, num_patches: int, num_keep: int, width: int) -> int:
        """Return the multiply-adds of one image: here those of one weighted sum over all patches per fused token."""
        return self.num_fused(num_patches, num_keep) * num_patches * width

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{self.name}({settings})" if settings else self.name
