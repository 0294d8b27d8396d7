"""Which columns of a batch of prompts stay, and at which positions: pure functions of tensors.

A prompt holds one placeholder per token of each of its images; a batch is `(B, L)`, and its images follow each other
row by row. After a selection an image has fewer tokens, so it keeps as many of its placeholders.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor


def rows_of_images(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the row of the batch that each image stands in.

    Args:
        counts: how many placeholders each row has.
        sizes: how many placeholders each image needs, in the order of the rows.

    Raises:
        ValueError: the placeholders of a row are not those of whole images; names the first such row. Hosts compare
            the two sums alone, and would put patches of one row into another.
    """
    rows: list[int] = []
    for row, count in enumerate(counts):
        held = 0
        while held < count and len(rows) < len(sizes):
            held += sizes[len(rows)]
            rows.append(row)
        if held != count:
            image = (
                f"image {len(rows) - 1} needs {sizes[len(rows) - 1]}" if rows and held > count else "no image is left"
            )
            raise ValueError(
                f"row {row} of the prompts has {count} image placeholders, which are not those of whole images ({image}"
                f"; {len(sizes)} images came, of {_few(sizes)} placeholders each, for rows of {_few(counts)}): give "
                "the prompts as the processor makes them, with the images in the order of the rows"
            )
    if len(rows) < len(sizes):
        raise ValueError(
            f"{len(sizes)} images came, and the {len(counts)} rows of the prompts have placeholders for {len(rows)} of "
            f"them ({_few(counts)}, at {_few(sizes)} each): leave the other images out, or add their placeholders"
        )
    return rows


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def offsets_of(sources: Tensor, size: int, extra: int) -> Tensor:
    """Return which placeholders of its image `(I, m)` the tokens that an image has now stand for.

    Args:
        sources: `(I, m - extra)`: the place in the image of each patch token of now; -1 is a fused token, which gets
            one of the places that are free, the last ones.
        size: how many placeholders an image had.
        extra: tokens in front of the patches that have placeholders too (an image [CLS]).
    """
    rows = len(sources)
    fused = sources < 0
    taken = torch.zeros(rows, size - extra + 1, dtype=torch.bool, device=sources.device)
    taken.scatter_(1, torch.where(fused, size - extra, sources), True)
    taken = taken[:, :-1]
    free = taken.to(torch.int8).argsort(dim=1, stable=True)  # the free places first, ascending
    place = (~taken).sum(dim=1, keepdim=True) - fused.sum(dim=1, keepdim=True) + fused.cumsum(dim=1) - 1
    found = torch.where(fused, free.gather(1, place.clamp(0, free.shape[1] - 1)), sources) + extra
    front = torch.arange(extra, device=sources.device).expand(rows, -1)
    return torch.cat([front, found], dim=1)


class Stay(NamedTuple):
    """What stays of a batch of prompts `(B, L)`."""

    columns: Tensor
    """`(B, L)`, bool: the columns that stay. Of each image these are its first ones; they are all alike."""
    positions: Tensor
    """`(…, B, L)`: the position of every column that stays."""


def shortened(
    placeholders: Tensor, sizes: Sequence[int], offsets: Sequence[Tensor], positions: Tensor, renumber: bool = False
) -> Stay:
    """Return which columns stay, and their positions.

    Args:
        placeholders: `(B, L)`, bool.
        sizes: how many placeholders each image has.
        offsets: for each image `(m_i,)`: which of its placeholders its tokens stand for now, in their order.
        positions: `(…, B, L)`: the positions in the whole prompt.
        renumber: whether positions are counted anew over what stays; else each patch has the position that it had.
    """
    device = placeholders.device
    if not len(sizes):
        return Stay(torch.ones_like(placeholders), positions)
    starts = torch.tensor([0, *sizes[:-1]], device=device).cumsum(0)
    left = torch.tensor([len(each) for each in offsets], device=device)
    image = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
    rank = torch.arange(len(image), device=device) - starts[image]
    columns = ~placeholders
    columns[placeholders] = rank < left[image]
    if renumber:
        return Stay(columns, (positions - (~columns).cumsum(dim=-1)).clamp(min=0))
    chosen = torch.cat([start + each.to(device) for start, each in zip(starts, offsets)])
    found = positions.clone()
    found[..., columns & placeholders] = positions[..., placeholders][..., chosen]
    return Stay(columns, found)


class Cut(NamedTuple):
    """How tensors of a batch of prompts are cut to the columns that stay: rows of one length again."""

    source: Tensor
    """`(B, L')`: the column that each column of now was."""
    filled: Tensor | None
    """`(B, L')`, bool: where a column of now is none of the prompt, but padding; `None` is nowhere."""

    def __call__(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Cut `(B, L, …)` to `(B, L', …)`."""
        more = (1,) * (tensor.dim() - 2)
        index = self.source.view(*self.source.shape, *more).expand(-1, -1, *tensor.shape[2:])
        found = tensor.expand(len(self.source), *tensor.shape[1:]).gather(1, index)
        return found if self.filled is None else found.masked_fill(self.filled.view(*self.filled.shape, *more), fill)

    def last(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Cut `(…, B, L)` to `(…, B, L')`."""
        index = self.source.expand(*tensor.shape[:-2], -1, -1)
        found = tensor.gather(-1, index)
        return found if self.filled is None else found.masked_fill(self.filled, fill)

    @classmethod
    def of(cls, columns: Tensor, mask: Tensor | None = None) -> Cut:
        """Return the cut to these columns `(B, L)`.

        Rows from which as many columns go keep their padding. Else all padding goes, and each row is padded again, on
        the side on which `mask` `(B, L)` has its zeros; on the left where it has none, so that the last column is the
        last token of every row.
        """
        rows, length = columns.shape
        left = columns.sum(dim=1)
        if bool((left == left[0]).all()):
            return cls(columns.nonzero()[:, 1].view(rows, -1), None)
        real = columns if mask is None else columns & (mask != 0)
        width = int(real.sum(dim=1).max())
        behind = mask is not None and not bool((mask[:, 0] == 0).any()) and bool((mask[:, -1] == 0).any())
        order = (~real if behind else real).to(torch.int8).argsort(dim=1, stable=True)
        index = order[:, :width] if behind else order[:, length - width :]
        return cls(index, ~real.gather(1, index))
