"""What was kept: `Selected` and `Trace`, and `restore`, which puts surviving tokens back on the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .wiring.recorder import Selected, Trace

__all__ = ["Selected", "Trace", "restore"]


def restore(tokens: Tensor, trace: list[Selected] | Selected, fill: float | Tensor | str = 0.0) -> Tensor:
    """Put the surviving patches back on the grid, for heads that read a dense map.

    Args:
        tokens: `(B, N', D)`: what the tower returned for the call that `trace` recorded (all tokens, or without the
            prefix); of a tower that packs images into one sequence all of that, `(N', D)`.
        trace: the `record()` of that call (its last entry counts), or one entry.
        fill: what stands where a patch was removed: a number, a tensor that broadcasts to `(B, H, W, D)`, or
            `"fused"` for the fused token that the patch went into.

    Returns:
        `(B, H, W, D)`; of images of several sizes a list, `(H, W, D)` of each.

    Raises:
        ValueError: the trace is empty or of another call, or `fill="fused"` and there is no fused token.
    """
    entry = trace if isinstance(trace, Selected) else (trace[-1] if trace else None)
    if entry is None:
        raise ValueError("the trace is empty: run the model inside of `with handle.record() as trace:`")
    if tokens.dim() == 2 and entry.images is not None:
        pieces = zip(tokens.split([image.num_tokens for image in entry.images]), entry.images)
        return [restore(piece, image, fill)[0] for piece, image in pieces]  # type: ignore[return-value]
    if tokens.dim() == 2 and len(tokens) == len(entry.kept) * entry.num_tokens:
        tokens = tokens.view(len(entry.kept), entry.num_tokens, -1)
    if entry.images is not None:
        cut = enumerate(image.num_tokens + tokens.shape[1] - entry.num_tokens for image in entry.images)
        return [restore(tokens[i : i + 1, :n], entry.images[i], fill)[0] for i, n in cut]  # type: ignore[return-value]
    if entry.grid is None or entry.holders is None:
        raise ValueError("the trace does not know its grid: record a call of the whole tower, not of its blocks")
    rows, width = tokens.shape[0], tokens.shape[-1]
    patches = entry.num_tokens - entry.num_prefix_tokens
    if tokens.dim() != 3 or rows != entry.kept.shape[0] or tokens.shape[1] not in (patches, entry.num_tokens):
        raise ValueError(
            f"tokens must be the ({entry.kept.shape[0]}, {entry.num_tokens}, D) that this call returned, or without "
            f"its {entry.num_prefix_tokens} prefix tokens; got {tuple(tokens.shape)}"
        )
    tokens = tokens[:, tokens.shape[1] - patches :]
    height, breadth = entry.grid
    survived = entry.kept.shape[1]
    own = (entry.holders >= 0) & (entry.holders < survived)
    own &= entry.kept.gather(1, entry.holders.clamp(0, survived - 1)) >= 0
    if isinstance(fill, str):
        if fill != "fused" or not (entry.fused or bool((entry.kept < 0).any())):
            raise ValueError(f'fill must be a number, a tensor or "fused" where a fused token exists, got {fill!r}')
        own, fill = entry.holders >= 0, 0.0
    value = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
    base = value.expand(rows, height, breadth, width).flatten(1, 2)
    found = tokens.gather(1, entry.holders.clamp(min=0).unsqueeze(-1).expand(-1, -1, width))
    return torch.where(own.unsqueeze(-1), found, base).unflatten(1, (height, breadth))
