"""Where the tokens of one call of a tower come from, layer by layer: what a record and some reductions want to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable, List

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..compat import is_dynamo_compiling
from ..reduction import Reduced
from .changes import check_unchanged
from .guidance import unlinked
from .recorder import active_recorder
from .state import Layer, Wiring


@dataclass(eq=False)
class Part:
    """Rows of a padded batch that hold images of one size, or such images of a packed one."""

    rows: list[int]
    count: int
    """How many patch tokens each of them has now; padding, or the next image, comes after them."""
    journey: Journey


@dataclass(eq=False)
class Journey:
    """The patches of the images of one call, on their way through one tower."""

    tower: Tower
    grid: tuple[int, int] | None = None
    """Height and width in patches; `None` where nobody asks, only blocks are called, or only the host knows."""
    order: Tensor | None = None
    """`(B, n)`: the place of each patch token in the grid, for hosts that shuffle or drop patches."""
    sources: Tensor | None = None
    """`(B, m)`: the place in the grid of each patch token of now (of a merged one the place of one of its patches); -1
    is a fused token. `None` before the first reduction."""
    within: Tensor | None = None
    """`(B, n)`: the patch token of now that each patch token of the image is in; -1 is in none."""
    sizes: Tensor | None = None
    """`(B, P + m)`: how many patches of the image each token of now stands for; `None` means one each."""
    stages: dict[int, Tensor] = field(default_factory=dict)
    """`within` after each block that shortened the sequence, by the index of the block."""
    parts: list[Part] | None = None
    """The images of a padded or packed batch, by their size; `None` in any other."""
    outer: Journey | None = None

    @property
    def num_patches(self) -> int | None:
        """The number of patch tokens of the image; `None` before the first reduction."""
        return None if self.within is None else self.within.shape[1]

    def holders(self) -> Tensor | None:
        """Return `(B, H * W)`: the patch token of now that each place of the grid is in; -1 is in none."""
        if self.grid is None or self.within is None:
            return None
        rows, count = self.within.shape
        places = torch.arange(count, device=self.within.device).expand(rows, -1)
        places = places if self.order is None else for_rows(self.order, rows)
        return self.within.new_full((rows, self.grid[0] * self.grid[1]), -1).scatter(1, places, self.within)

    def arrive(self, layer: Layer, rows: int, num_patches: int, device: torch.device) -> Tensor:
        """Return the places `(rows, n)` of the patches that a selection layer chooses from.

        Raises:
            ValueError: patches are missing from the grid, or an earlier selection was not seen.
        """
        if not layer.begins:
            if self.sources is None:
                raise ValueError(
                    f"block {layer.index} selects from what an earlier block left, which this record has not "
                    "seen: record a call of the whole tower, not of one of its blocks"
                )
            return for_rows(self.sources, rows)
        self.sizes = None
        if self.order is not None:
            self.sources = self.order = self.order.to(device)
        elif self.grid is not None and self.grid[0] * self.grid[1] != num_patches:
            raise ValueError(
                f"record() names patches by their place in the {self.grid[0]} x {self.grid[1]} grid, but {num_patches} "
                "patches reach the selection: patch dropout is on (call model.eval(), or turn it off while recording)"
            )
        else:
            self.sources = torch.arange(num_patches, device=device).expand(rows, -1)
        self.within = torch.arange(num_patches, device=device).expand(rows, -1)
        return self.sources

    def go_on(self, index: int, sources: Tensor, reduced: Reduced, num_prefix_tokens: int) -> None:
        """Follow the patches through the reduction of block `index`; `sources` `(R, n)` are their places before it."""
        rows = sources.shape[0]
        kept = sources.gather(1, reduced.kept)
        fused = reduced.tokens.shape[1] - num_prefix_tokens - kept.shape[1]
        lost = torch.full((rows, fused), -1, device=kept.device, dtype=kept.dtype)
        self.sources = torch.cat([kept, lost], dim=1) if fused else kept
        if self.within is not None:
            held = for_rows(self.within, rows)
            moved = (reduced.into[:, num_prefix_tokens:] - num_prefix_tokens).clamp(min=-1)
            self.within = moved.gather(1, held.clamp(min=0)).masked_fill(held < 0, -1)
            self.stages[index] = self.within


def for_rows(per_image: Tensor, rows: int) -> Tensor:
    """Repeat `(B, m)` for the `B * T` rows of `pairing="all"`."""
    return per_image if per_image.shape[0] == rows else per_image.repeat_interleave(rows // per_image.shape[0], dim=0)


_journey: ContextVar[Journey | None] = ContextVar("patchselect_journey", default=None)


def journey_of(layer: Layer) -> Journey | None:
    """Return the journey that this call of the layer is part of; `None` where nobody wants to know."""
    wiring = layer.wiring
    found = wiring.traced_journey if is_dynamo_compiling() and wiring.traced_journey is not None else _journey.get()
    while found is not None and found.tower is not layer.tower:
        found = found.outer
    if found is not None:
        return found  # type: ignore[no-any-return]
    recorder = active_recorder(wiring)
    if recorder is None:
        return None
    return recorder.loose.setdefault(id(layer.tower), Journey(layer.tower))  # type: ignore[no-any-return]


_followed: ContextVar[Followed | None] = ContextVar("patchselect_followed", default=None)


class Followed(List[Journey]):
    """The journeys of the calls of the towers of one selection, as they begin."""

    def __init__(self, owner: Wiring, outer: Followed | None) -> None:
        super().__init__()
        self.owner, self.outer = owner, outer


@contextmanager
def followed(owner: Wiring) -> Iterator[Followed]:
    """Collect the journeys of the calls of the towers of `owner` until the end of the `with` block."""
    found = Followed(owner, _followed.get())
    token = _followed.set(found)
    try:
        yield found
    finally:
        _followed.reset(token)


def _followers(wiring: Wiring) -> list[Followed]:
    found, mine = _followed.get(), []
    while found is not None:
        mine += [found] if found.owner is wiring else []
        found = found.outer
    return mine


def asks(wiring: Wiring) -> bool:
    """Tell whether somebody wants to know where in the image the tokens come from."""
    watched = active_recorder(wiring) is not None or bool(_followers(wiring))
    return watched or wiring.plan.reduction.reads_places


def call_tower(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Check that the tower is what it was, and remember the grid of what it is called with where somebody asks."""
    wiring: Wiring = module._patchselect  # type: ignore[assignment]
    for tower, place in zip(wiring.towers, wiring.places):
        if tower.module is module:
            check_unchanged(wiring.plan, tower, place)
    tower = next(tower for tower in wiring.towers if tower.module is module)
    several = tower.packed or (tower.padded and wiring.plan.selects)
    images = tower.adapter.images(tower, *args, **kwargs) if several else None
    if images is not None and not images.padding and not tower.packed and not asks(wiring):
        images = None  # all of one length: only a record asks for their grids
    follows = (tower.rotary and wiring.plan.selects) or images is not None
    if not asks(wiring) and not wiring.plan.follows_sizes and not follows:
        return original(*args, **kwargs)
    journey = Journey(tower)
    if images is not None:
        journey.parts = by_size(tower, images.sizes)
    elif asks(wiring):
        journey.grid = tower.adapter.grid(tower, *args, **kwargs)
    if is_dynamo_compiling():
        outer, wiring.traced_journey = wiring.traced_journey, journey
        found = original(*args, **kwargs)
        wiring.traced_journey = outer
        return found
    for follower in _followers(wiring):
        follower.append(journey)
    journey.outer = _journey.get()
    _journey.set(journey)
    try:
        return original(*args, **kwargs)
    finally:
        _journey.set(unlinked(_journey.get(), lambda link: link is journey))


def by_size(tower: Tower, sizes: list[tuple[int, int]]) -> list[Part]:
    """Gather the images of a batch that have one height and width in patches, padded or packed."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault((int(size[0]), int(size[1])), []).append(row)
    parts = [Part(found, size[0] * size[1], Journey(tower, size)) for size, found in rows.items()]
    for part in parts if tower.packed else ():
        part.journey.order = tower.adapter.order(tower, part.journey.grid).expand(len(part.rows), -1)
    return parts


@contextmanager
def within(part: Part) -> Iterator[None]:
    """Let one part of a padded or packed batch be what travels."""
    part.journey.outer = _journey.get()
    _journey.set(part.journey)
    try:
        yield
    finally:
        _journey.set(unlinked(_journey.get(), lambda link: link is part.journey))


def parts_of_call(tower: Tower) -> list[Part] | None:
    """Return the images of the padded or packed batch that this call of the tower is about, by their size."""
    found = _journey.get()
    while found is not None and (found.tower is not tower or found.parts is None):
        found = found.outer
    return None if found is None else found.parts


@contextmanager
def travelling(tower: Tower) -> Iterator[None]:
    """Let blocks that are called one after the other be parts of one call of their tower."""
    journey = Journey(tower, outer=_journey.get())
    _journey.set(journey)
    try:
        yield
    finally:
        _journey.set(unlinked(_journey.get(), lambda link: link is journey))


def note_grid(tower: Tower, grid: tuple[int, int], order: Tensor | None = None) -> None:
    """Note the grid, and the place `(B, n)` of each patch token in it, for hosts that shuffle or drop patches."""
    found = _journey.get()
    while found is not None and found.tower is not tower:
        found = found.outer
    if found is not None:
        found.grid, found.order = grid, order
