"""What was kept: `handle.record()`, and `restore`, which puts surviving tokens back on the grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, List, NoReturn

import torch
from torch import Tensor

from .guidance import unlinked

if TYPE_CHECKING:
    from .adapter import Tower
    from .patching import Handle


@dataclass
class Selected:
    """What one selection layer did in one call."""

    kept: Tensor
    """`(B, k)`: kept patches as indices into the ORIGINAL grid, in the order of the tokens; -1 is a fused token."""
    relevance: Tensor
    """`(B, n)`: weights over the tokens that this layer chose from; >= 0, each row sums to 1."""
    places: Tensor
    """`(B, n)`: where those tokens stand in the original grid (a host may shuffle them); -1 is a fused token."""
    removed_share: Tensor
    """`(B,)`: how much of the relevance the tokens had that did not stay, in [0, 1]."""
    num_tokens: int
    """Length of the sequence after the selection, prefix and fused token included."""
    pooled: Tensor
    """`(B, D)`: relevance-weighted mean of the patches after attention; differentiable.

    Reentrant gradient checkpointing keeps no graph of it: there its backward pass is an error.
    """
    layer: int
    """0-based index of the block."""
    num_prefix_tokens: int
    grid: tuple[int, int] | None
    """Height and width of the original grid, in patches; `None` where the tower was not called as a whole."""
    fused: bool
    """Whether the last token is a fused one."""
    holders: Tensor | None = None
    """`(B, H * W)`: the token after the prefix that each place of the grid is in: its own, or the fused one that it
    went into; -1 is in none (`fusion="none"`, or dropped by the host); `None` where `grid` is."""


class Trace(List[Selected]):
    """One entry per selection layer and call, in order."""


@dataclass
class _Recorder:
    owner: Handle
    trace: Trace
    outer: _Recorder | None
    grids: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    sources: dict[int, Tensor] = field(default_factory=dict)
    orders: dict[int, Tensor] = field(default_factory=dict)
    holders: dict[int, Tensor | None] = field(default_factory=dict)


_recorder: ContextVar[_Recorder | None] = ContextVar("patchselect_recorder", default=None)


def active_recorder(owner: Handle) -> _Recorder | None:
    found = _recorder.get()
    while found is not None and found.owner is not owner:
        found = found.outer
    return found


@contextmanager
def recording(owner: Handle) -> Iterator[Trace]:
    recorder = _Recorder(owner, Trace(), _recorder.get())
    _recorder.set(recorder)
    try:
        yield recorder.trace
    finally:
        _recorder.set(unlinked(_recorder.get(), lambda found: found.trace is recorder.trace))


def note_grid(recorder: _Recorder, tower: Tower, grid: tuple[int, int] | None) -> None:
    recorder.grids[id(tower)] = grid


def forget(recorder: _Recorder, tower: Tower) -> None:
    """What is known of the images of one call of the tower ends with that call."""
    for table in (recorder.grids, recorder.sources, recorder.orders, recorder.holders):
        table.pop(id(tower), None)  # type: ignore[attr-defined]


def note_order(recorder: _Recorder, tower: Tower, order: Tensor) -> None:
    """For hosts that shuffle or drop patches: the place `(B, n)` of each patch token in the grid."""
    recorder.orders[id(tower)] = order


def pool(relevance: Tensor, patches: Tensor) -> Tensor:
    """Relevance-weighted mean of the patches: `(B * T, n)` and `(B, n, D)` to `(B * T, D)`."""
    weights = relevance.view(patches.shape[0], -1, patches.shape[1]).to(patches.dtype)
    return (weights @ patches).flatten(0, 1)


class _WithoutGraph(torch.autograd.Function):
    """A tensor to look at; a loss that reads it must not come out without a gradient unseen."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, instead: str) -> Tensor:
        ctx.instead = instead
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "a loss reads `pooled` of record(), but reentrant gradient checkpointing keeps no graph of it: "
            f"{ctx.instead}, or read pooled.detach() if no gradient is meant"
        )


@torch.enable_grad()
def without_graph(value: Tensor, instead: str) -> Tensor:
    """`value`, which was computed without a graph; a backward pass through it says what to do instead."""
    found: Tensor = _WithoutGraph.apply(value.detach().requires_grad_(), instead)
    return found


def note_selection(
    recorder: _Recorder, tower: Tower, layer: int, first: bool, chosen: Tensor, relevance: Tensor, after: Tensor,
    patches: Tensor, num_prefix_tokens: int, instead: str | None = None,
) -> None:  # fmt: skip
    """Add an entry; `chosen` `(B, k)` counts the n tokens of `relevance` `(B, n)`, `patches` is `(B, n, D)`.

    Where checkpointing keeps no graph of it, `instead` says what would.
    """
    rows, num_patches = relevance.shape
    grid = recorder.grids.get(id(tower))
    order = recorder.orders.pop(id(tower), None)
    if first and order is not None:
        sources = order
    elif first:
        if grid is not None and grid[0] * grid[1] != num_patches:
            raise ValueError(
                f"record() names patches by their place in the {grid[0]} x {grid[1]} grid, but {num_patches} patches "
                "reach the selection: patch dropout is on (call model.eval(), or turn it off while recording)"
            )
        sources = torch.arange(num_patches, device=chosen.device).expand(rows, -1)
    elif id(tower) not in recorder.sources:
        raise ValueError(
            f"block {layer} selects from what an earlier selection layer kept, which this record has not seen: record "
            "a call of the whole tower, not of one of its blocks"
        )
    else:
        sources = _for_rows(recorder.sources[id(tower)], rows)
    kept = sources.gather(1, chosen)
    fused = after.shape[1] > num_prefix_tokens + chosen.shape[1]
    if first:
        held = None if grid is None else _inverse(sources, grid[0] * grid[1])
    else:
        found = recorder.holders[id(tower)]
        held = None if found is None else _for_rows(found, rows)
    if held is not None:
        count = torch.arange(chosen.shape[1], device=chosen.device).expand(rows, -1)
        moved = torch.full_like(sources, chosen.shape[1] if fused else -1).scatter(1, chosen, count)
        held = moved.gather(1, held.clamp(min=0)).masked_fill(held < 0, -1)
    recorder.holders[id(tower)] = held
    lost = torch.full((rows, 1), -1, device=kept.device, dtype=kept.dtype)
    recorder.sources[id(tower)] = torch.cat([kept, lost], dim=1) if fused else kept
    pooled = pool(relevance, patches)
    entry = Selected(
        kept=kept,
        relevance=relevance,
        places=sources,
        removed_share=(1 - relevance.detach().gather(1, chosen).sum(dim=1)).clamp(0, 1),
        num_tokens=after.shape[1],
        pooled=pooled if instead is None else without_graph(pooled, instead),
        layer=layer,
        num_prefix_tokens=num_prefix_tokens,
        grid=grid,
        fused=fused,
        holders=held,
    )
    recorder.trace.append(entry)


def _for_rows(per_image: Tensor, rows: int) -> Tensor:
    """`(B, m)` for the `B * T` rows of `pairing="all"`."""
    return per_image if per_image.shape[0] == rows else per_image.repeat_interleave(rows // per_image.shape[0], dim=0)


def _inverse(places: Tensor, size: int) -> Tensor:
    """`(B, n)` places of tokens to `(B, size)` tokens of places; -1 where there is none."""
    count = torch.arange(places.shape[1], device=places.device).expand(places.shape[0], -1)
    return places.new_full((places.shape[0], size), -1).scatter(1, places, count)


def restore(tokens: Tensor, trace: list[Selected] | Selected, fill: float | Tensor | str = 0.0) -> Tensor:
    """Put the surviving patches back on the grid, for heads that read a dense map.

    Args:
        tokens: `(B, N', D)`: what the tower returned for the call that `trace` recorded (all tokens, or without the
            prefix).
        trace: the `record()` of that call (its last entry counts), or one entry.
        fill: what stands where a patch was removed: a number, a tensor that broadcasts to `(B, H, W, D)`, or
            `"fused"` for the fused token that the patch went into.

    Returns:
        `(B, H, W, D)`.

    Raises:
        ValueError: the trace is empty or of another call, or `fill="fused"` and there is no fused token.
    """
    entry = trace if isinstance(trace, Selected) else (trace[-1] if trace else None)
    if entry is None:
        raise ValueError("the trace is empty: run the model inside of `with handle.record() as trace:`")
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
