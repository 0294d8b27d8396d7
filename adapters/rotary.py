"""What rotary hosts share: tables of sines and cosines for the patches that are left, and turning by them."""

from __future__ import annotations

import torch
from torch import Tensor

from patchselect.adapter import Turn
from patchselect.wiring.journey import for_rows


def at(table: Tensor, places: Tensor, nowhere: Tensor) -> Tensor:
    """Return the rows of a table for the patches that are left.

    Args:
        table: `(n, E)`, `(H, n, E)`, or `(B, 1 | H, n, E)` where each image has its own.
        places: `(R, m)`: the row of each patch; -1 is a token without a place. R is a multiple of B.
        nowhere: `(E,)`, the row of such a token.

    Returns:
        `(R, 1 | H, m, E)`.
    """
    table = table.unsqueeze(0) if table.dim() == 2 else table
    table = torch.cat([table, nowhere.to(table).expand(*table.shape[:-2], 1, -1)], dim=-2)
    places = torch.where(places < 0, torch.full_like(places, table.shape[-2] - 1), places)
    if table.dim() == 3:
        return table[:, places].transpose(0, 1)
    index = places[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1])
    return for_rows(table, len(places)).gather(2, index)


def turning(sine: Tensor, cosine: Tensor, half: bool) -> Turn:
    """Return how tables `(n, E)`, `(H, n, E)` or `(B, 1 | H, n, E)` turn the last n of queries or keys `(B, N, H, E)`.

    Args:
        sine: the first table.
        cosine: the second one, of the same shape.
        half: whether entry i turns with entry i + E / 2, or neighbours with each other.
    """
    sine, cosine = (table.unsqueeze(0) if table.dim() == 2 else table for table in (sine, cosine))

    def turn(heads: Tensor) -> Tensor:
        before, patches = heads[:, : heads.shape[1] - sine.shape[-2]], heads[:, heads.shape[1] - sine.shape[-2] :]
        x = patches.transpose(1, 2)
        if half:
            first, second = x.chunk(2, dim=-1)
            other = torch.cat([-second, first], dim=-1)
        else:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        turned = (x * cosine + other * sine).transpose(1, 2)
        return torch.cat([before, turned.to(heads.dtype)], dim=1)

    return turn
