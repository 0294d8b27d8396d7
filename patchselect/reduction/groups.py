"""Whole squares of patches stay or go: for hosts that join the patches of a square into one token."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Alike, Places, Reduced, Reduction


class Grouped(Reduction):
    """Let another reduction choose among squares of `side` x `side` patches instead of patches.

    A square counts the sum of the relevance of its patches. What the other squares become is a square too: its
    patches are made of the patches at the same place of their squares. After the first selection the tokens of a
    square follow each other.

    Args:
        inner: the reduction, which sees each square as one token.
        side: patches along an edge of a square.
        together: whether the tokens of a square follow each other from the beginning.

    Raises:
        ValueError: the other reduction reads the keys of patches.
    """

    def __init__(self, inner: Reduction, side: int, together: bool = False) -> None:
        if inner.reads_keys:
            raise ValueError(f"{inner.name!r} reads the keys of single patches, and here whole squares stay or go")
        self.inner, self.side, self.together = inner, side, together
        self.reads_places = not together
        self.name = inner.name

    @property
    def size(self) -> int:
        """Patches of a square."""
        return self.side**2

    def reduce(
        self,
        tokens: Tensor,
        relevance: Tensor,
        num_keep: int,
        num_prefix_tokens: int,
        places: Places | None = None,
        alike: Alike | None = None,
    ) -> Reduced:
        prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
        count = patches.shape[1]
        order = torch.arange(count, device=tokens.device)
        if places is not None and count == places.grid[0] * places.grid[1]:  # later the tokens of a square are together
            order = self.order(places.grid, tokens.device)
        squares, keep = count // self.size, -(-num_keep // self.size)
        copies = 1 if relevance.dim() == 2 else relevance.shape[1]
        if self._keeps_all(squares, keep):
            whole = tokens.repeat_interleave(copies, dim=0)
            into = torch.arange(whole.shape[1], device=tokens.device).expand(len(whole), -1)
            return Reduced(whole, into[:, :count], into)
        weights = relevance[..., order].unflatten(-1, (squares, self.size)).sum(dim=-1)
        found = self.inner.reduce(patches[:, order].reshape(len(patches), squares, -1), weights, keep, 0, None)
        rows = len(found.tokens)
        within = torch.arange(self.size, device=tokens.device)
        kept = (found.kept.unsqueeze(-1) * self.size + within).flatten(1)
        went = torch.where(found.into < 0, -1, found.into * self.size + num_prefix_tokens)
        into = torch.where(went.unsqueeze(-1) < 0, -1, went.unsqueeze(-1) + within).flatten(1)
        into = torch.empty_like(into).scatter(1, order.expand(rows, -1), into)
        front = torch.arange(num_prefix_tokens, device=tokens.device).expand(rows, -1)
        new = found.tokens.reshape(rows, -1, tokens.shape[-1])
        new = torch.cat([prefix.repeat_interleave(copies, dim=0), new], dim=1)
        return Reduced(new, order[kept], torch.cat([front, into], dim=1))

    def order(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the places of a grid `(h * w,)`, those of each square side by side."""
        height, width = grid
        if height % self.side or width % self.side:
            raise ValueError(
                f"images of {height} x {width} patches cannot be cut into squares of {self.side} x {self.side}: use "
                "images of another size"
            )
        places = torch.arange(height * width, device=device)
        return places.view(height // self.side, self.side, -1, self.side).transpose(1, 2).flatten()

    def _keeps_all(self, squares: int, keep: int) -> bool:
        """Tell whether nothing is gained: a square that is fused alone stays what it is."""
        return keep >= squares or keep + self.inner.num_fused(squares, keep) >= squares

    def num_fused(self, num_patches: int, num_keep: int) -> int:
        """Return how many tokens come besides `num_keep`: the rest of the last square that stays, and what is fused."""
        squares, keep = num_patches // self.size, -(-num_keep // self.size)
        if self._keeps_all(squares, keep):
            return num_patches - num_keep
        return (keep + self.inner.num_fused(squares, keep)) * self.size - num_keep

    def cost(self, num_patches: int, num_keep: int, width: int) -> int:
        squares = num_patches // self.size
        keep = -(-num_keep // self.size)
        return 0 if self._keeps_all(squares, keep) else self.inner.cost(squares, keep, width * self.size)

    def __repr__(self) -> str:
        return f"{self.inner!r} of {self.side} x {self.side} patches"
