"""Packed batches: images one behind the other in one sequence `(N, D)`, each selected from as if it had come alone.

Images of one size are selected from together. What a host makes for all tokens of the sequence (positions, where an
image begins and ends) is cut to those that are left.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..relevance import Candidates
from ..relevance.kernels import in_tiles
from .guidance import Guidance
from .journey import Part, within
from .padding import entries_of, follow_parts
from .recomputation import SOURCES, in_backward
from .state import Layer
from .texts import texts_for

Choose = Callable[[Candidates, "Tensor | None", int], Tensor]
"""Select from images of one size: their candidates and texts, and where the first begins, to what is left."""


def select_packed(
    layer: Layer, block: nn.Module, seen: Candidates, guidance: Guidance | None, parts: list[Part], choose: Choose,
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Shorten a packed sequence `(N, D)`; `args` and `kwargs` are those of the block. Return what is left `(N', D)`.

    Raises:
        ValueError: every image is to meet every text, or the texts do not fit the images.
    """
    if guidance is not None and guidance.pairing == "all":
        raise ValueError(
            f'pairing="all" makes rows of every image with every text, and {type(layer.tower.module).__name__} packs '
            "images into one sequence: repeat the images, one for each of its texts"
        )
    tokens, images = seen.all_tokens, sum(len(part.rows) for part in parts)
    texts = None
    if guidance is not None:
        texts = in_tiles(texts_for(layer, guidance, tokens[:0].expand(images, 0, -1)), images)
    begins, start, left = begins_of(parts), entries_of(layer), []
    for part in parts:
        index = (begins[part.rows].unsqueeze(1) + torch.arange(part.count)).to(tokens.device)
        turn = layer.tower.adapter.turn_of_rows(layer.tower, block, index, *args, **kwargs)
        found = dataclasses.replace(
            seen, all_normed=seen.all_normed[index], all_tokens=tokens[index], stash=None, turn=turn
        )
        rows = torch.tensor(part.rows, device=tokens.device)
        with within(part):
            own = texts if texts is None or len(texts) == 1 else texts[rows]
            left.append(choose(found, own, int(begins[part.rows[0]])))
    follow_parts(layer, parts, left, 0, start)
    return in_order(parts, left)


def begins_of(parts: list[Part]) -> Tensor:
    """Return where each image begins `(I,)` in the sequence of now."""
    return _cumulated({row: part.count for part in parts for row in part.rows})


def _cumulated(counts: dict[int, int]) -> Tensor:
    lengths = torch.tensor([counts[row] for row in sorted(counts)])
    return lengths.cumsum(0) - lengths


def in_order(parts: list[Part], of_parts: list[Tensor]) -> Tensor:
    """Put what belongs to the images of each part, `(R, m, …)`, one image behind the other, as the images came."""
    together = torch.cat([some.flatten(0, 1) for some in of_parts])
    if len(parts) == 1:
        return together
    rows = [torch.tensor(part.rows).repeat_interleave(some.shape[1]) for part, some in zip(parts, of_parts)]
    return together[torch.cat(rows).argsort(stable=True).to(together.device)]


def at_rows(
    layer: Layer, block: nn.Module, hidden: Tensor, parts: list[Part], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block for the tokens of a packed sequence that are left."""
    found = SOURCES.recall(hidden, layer) if in_backward() else None
    if found is None:
        counts = {row: part.count for part in parts for row in part.rows}
        found = rows_left(layer.tower, parts), [counts[row] for row in sorted(counts)]
        SOURCES.note(hidden, layer, found)
    args, kwargs = layer.tower.adapter.at_rows(layer.tower, block, *found, *args, **kwargs)  # type: ignore[assignment]
    return args, dict(kwargs)


def rows_left(tower: Tower, parts: list[Part]) -> Tensor:
    """Return which token of the whole sequence each token of now is, `(N',)`; -1 is a fused one."""
    sizes = {row: part.journey.order.shape[1] for part in parts for row in part.rows}  # type: ignore[union-attr]
    begins, found = _cumulated(sizes), []
    for part in parts:
        order, sources = part.journey.order, part.journey.sources
        assert order is not None and sources is not None
        place = order.argsort(dim=1).gather(1, sources.clamp(min=0)) + begins[part.rows].unsqueeze(1).to(sources.device)
        found.append(place.masked_fill(sources < 0, -1))
    return in_order(parts, found)
