"""The ways to spend less on the small CLIP, and how much each of them spends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.accuracy.world.candidates import CHOICES
from benchmarks.accuracy.world.captions import EMOJI
from benchmarks.common.lengths import Lengths, Lengthwise
from benchmarks.common.tome import front, token_merging

from .model import DEPTH, HEADS, LAYERS, PATCH, SIZE, WIDTH, size_of, tokenize
from .questions import encode

GRID = SIZE // PATCH
"""Patches of the committed models, each way."""


@dataclass(frozen=True)
class Arm:
    """One way to spend less."""

    name: str
    guidance: str = "text"
    """`text`, `image`, `random`, `grid`, `tome`, `tome front`, `words` (no image at all) or `none`."""
    relevance: str | None = None
    texts: str = ""
    """`paired`: each caption guides its own pass; `candidates`: the 16 of a scene share one; `nouns`: all concepts."""
    merge: float | None = None
    """ONE selection that counts sizes, before which this share of the removed patches merges; `None`: two of them."""


ARMS = (
    Arm("text alone, trained", "words", texts="trained"),
    Arm("text alone, counting words", "words", texts="counting"),
    Arm("no selection", "none"),
    Arm("values, shared by the candidates", "text", "values", "candidates"),
    Arm("values, shared by all nouns", "text", "values", "nouns"),
    Arm("values, per caption", "text", "values", "paired"),
    Arm("merge-then-select, shared by the candidates", "text", "values", "candidates", 0.5),
    Arm("merge-then-select, shared by all nouns", "text", "values", "nouns", 0.5),
    Arm("merge-then-select, per caption", "text", "values", "paired", 0.5),
    Arm("one selection with sizes, shared by the candidates", "text", "values", "candidates", 0.0),
    Arm("joint, shared by the candidates", "text", "joint", "candidates"),
    Arm("joint, per caption", "text", "joint", "paired"),
    Arm("keys, shared by the candidates", "text", "keys", "candidates"),
    Arm("keys, per caption (TRIPS)", "text", "keys", "paired"),
    Arm("keys, shared by all nouns", "text", "keys", "nouns"),
    Arm("features, shared by all nouns", "text", "features", "nouns"),
    Arm("image [CLS] (EViT)", "image"),
    Arm("random", "random"),
    Arm("smaller grid, equal FLOPs", "grid"),
    Arm("ToMe, equal FLOPs", "tome"),
    Arm("ToMe-front, equal FLOPs", "tome front"),
)
NONE, SHARED = "no selection", "values, shared by the candidates"
RIVALS = tuple(arm.name for arm in ARMS if arm.guidance not in ("words", "none") and arm.name != SHARED)
EARLY = "ToMe-front, equal FLOPs"
"""The strongest merging: what the others are measured against besides `SHARED`."""
FRONT = {"tome": None, "tome front": front(DEPTH)}
"""In how many blocks each of the two mergings merges: all, or the first third."""


@lru_cache(maxsize=None)
def tower(grid: int = GRID) -> Lengthwise:
    """Return the tower of `grid` patches each way, as its lengths are reckoned."""
    return Lengthwise(grid * grid, DEPTH, WIDTH, LAYERS, HEADS)


def downsampled(side: tuple[int, int]) -> Lengths:
    """Return what a grid of these sides has."""
    return [(1 + side[0] * side[1],) * 2] * DEPTH


@lru_cache(maxsize=None)
def merged_like(rate: float, first: int | None = None, grid: int = GRID) -> int:
    """Return how many patches ToMe removes in all to cost what selection at this rate does, or as close as it gets."""
    own = tower(grid)
    return own.merged_like(own.share(own.selected(rate)), first)


@lru_cache(maxsize=None)
def once_like(rate: float, merge: float, grid: int = GRID) -> float:
    """Return the keep rate of one selection, after merging, that costs what two selections at this rate do."""
    own = tower(grid)
    return own.rate_like(own.share(own.selected(rate)), merge)


@lru_cache(maxsize=None)
def grid_like(rate: float, grid: int = GRID) -> tuple[int, int]:
    """Return the grid, square or one longer, that costs about as much."""
    sides = [(side, side + longer) for side in range(1, grid) for longer in (0, 1)]
    own = tower(grid)
    target = own.share(own.selected(rate))
    return min([*sides, (grid, grid)], key=lambda side: abs(own.share(downsampled(side)) - target))


def lengths(arm: Arm, rate: float, grid: int = GRID) -> Lengths:
    """Return tokens that this arm leaves; none at all where it sees no image."""
    if arm.guidance == "words":
        return []
    if arm.guidance in FRONT:
        first = FRONT[arm.guidance]
        return tower(grid).merged(merged_like(rate, first, grid), first)
    if arm.guidance == "grid":
        return downsampled(grid_like(rate, grid))
    if arm.merge is not None:
        return tower(grid).once(once_like(rate, arm.merge, grid), arm.merge)
    return tower(grid).selected(1.0 if arm.guidance == "none" else rate)


def flops(arm: Arm, rate: float, grid: int = GRID) -> float:
    """Return the blocks' matrix products under this arm, those of the whole image being 1."""
    return tower(grid).share(lengths(arm, rate, grid), bool(arm.merge))


@torch.no_grad()
def encode_smaller(model: Any, images: Tensor, side: tuple[int, int]) -> Tensor:
    """Return `(N, E)` features of scaled-down images, with the position embeddings scaled like them."""
    small = F.interpolate(images, [PATCH * length for length in side], mode="bilinear", antialias=True)
    grid = size_of(model) // PATCH
    first, rest = model.visual.positional_embedding.split([1, grid * grid])
    square = rest.T.unflatten(1, (grid, grid)).unsqueeze(0)
    square = F.interpolate(square, side, mode="bicubic", antialias=True).flatten(2)[0].T
    state = {"positional_embedding": torch.cat([first, square])}
    return torch.cat([torch.func.functional_call(model.visual, state, (part,)) for part in small.split(256)])


@torch.no_grad()
def answers(model: Any, arm: Arm, rate: float, images: Tensor, texts: Tensor, fusion: Any = "mean") -> Tensor:
    """Return image features `(N, E)`, or `(N, CHOICES, E)` where each caption guides its own.

    Args:
        model: in evaluation mode, without selection; it is left so.
        arm: what to do; any but those that see no image.
        rate: keep rate of both layers.
        images: `(N, 3, S, S)`, of the size of the model.
        texts: `(N, CHOICES, E)`.
        fusion: of `patchselect.apply`.
    """
    grid = size_of(model) // PATCH
    if arm.guidance == "none":
        return encode(model, images)
    if arm.guidance == "grid":
        return encode_smaller(model, images, grid_like(rate, grid))
    if arm.guidance in FRONT:
        first = FRONT[arm.guidance]
        with token_merging(model, merged_like(rate, first, grid), first=first):
            return encode(model, images)
    if arm.merge is None:
        handle = patchselect.apply(model, rate, LAYERS, arm.guidance, arm.relevance, fusion)
    else:
        own, first = once_like(rate, arm.merge, grid), LAYERS[:1]
        handle = patchselect.apply(model, own, first, arm.guidance, arm.relevance, fusion, merge=arm.merge, sizes=True)
    try:
        if arm.guidance != "text":
            return encode(model, images)
        if arm.texts == "nouns":
            nouns = model.encode_text(tokenize([(concept,) for concept in range(len(EMOJI))]))
            with patchselect.guide(model, nouns, "shared"):
                return encode(model, images)
        pairing = "all" if arm.texts == "paired" else "shared"
        parts = []
        for rows in torch.arange(len(images)).split(8 if pairing == "all" else 128):
            with patchselect.guide(model, texts[rows], pairing):
                parts.append(model.encode_image(images[rows]))
        found = torch.cat(parts)
        return found.unflatten(0, (-1, CHOICES)) if pairing == "all" else found
    finally:
        handle.remove()
