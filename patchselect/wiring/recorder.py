"""Who records, and what a selection layer leaves with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, List, NoReturn

import torch
from torch import Tensor

from .guidance import unlinked
from .state import Wiring


@dataclass
class Selected:
    """What one selection layer did in one call."""

    kept: Tensor
    """`(B, k)`: kept patches as indices into the ORIGINAL grid, in the order of the tokens; -1 is a fused token.

    A token that similar patches have merged into goes by the index of one of them; `holders` has them all.
    """
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
    """Whether the sequence ends in one or more fused tokens."""
    holders: Tensor | None = None
    """`(B, H * W)`: the token after the prefix that each place of the grid is in: its own, or the fused one that it
    went into; -1 is in none (`fusion="none"`, or dropped by the host); `None` where `grid` is."""
    images: tuple[Selected, ...] | None = None
    """Of a padded batch, the entry of each image alone; the fields of the batch are padded with -2 and 0."""
    members: Tensor | None = None
    """`(B, H * W)`: the same before the selection: the one of the n tokens to choose from that holds each place."""


class Trace(List[Selected]):
    """One entry per selection layer and call, in order."""

    def of_image(self, row: int) -> Trace:
        """Return what was recorded of one image of a padded batch, as if it had been called alone."""
        return Trace(entry if entry.images is None else entry.images[row] for entry in self)


@dataclass(eq=False)
class Recorder:
    """One `with handle.record()` block."""

    owner: Wiring
    trace: Trace
    outer: Recorder | None
    loose: dict[int, Any] = field(default_factory=dict)
    """Journeys of towers of which blocks are called one by one."""


_recorder: ContextVar[Recorder | None] = ContextVar("patchselect_recorder", default=None)


def active_recorder(owner: Wiring) -> Recorder | None:
    """Return the innermost recorder of this thread (or task) for a selection."""
    found = _recorder.get()
    while found is not None and found.owner is not owner:
        found = found.outer
    return found


@contextmanager
def recording(owner: Wiring) -> Iterator[Trace]:
    """Record the calls of this thread (or task) until the end of the `with` block."""
    recorder = Recorder(owner, Trace(), _recorder.get())
    _recorder.set(recorder)
    try:
        yield recorder.trace
    finally:
        _recorder.set(unlinked(_recorder.get(), lambda found: found.trace is recorder.trace))


def pool(relevance: Tensor, patches: Tensor) -> Tensor:
    """Return the relevance-weighted mean of the patches: `(B * T, n)` and `(B, n, D)` to `(B * T, D)`."""
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
    """Return `value`, which was computed without a graph; a backward pass through it says what to do instead."""
    found: Tensor = _WithoutGraph.apply(value.detach().requires_grad_(), instead)
    return found
