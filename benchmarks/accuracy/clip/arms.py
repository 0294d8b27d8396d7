"""The ways to spend less on the small CLIP, and how much each of them spends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.accuracy.world.candidates import CHOICES
from benchmarks.accuracy.world.captions import EMOJI
from benchmarks.common.tome import front, schedule, token_merging
from patchselect.functional import as_ratio, num_kept

from .model import DEPTH, LAYERS, PATCH, SIZE, WIDTH, tokenize
from .questions import encode

GRID = SIZE // PATCH


@dataclass(frozen=True)
class Arm:
    """One way to spend less."""

    name: str
    guidance: str = "text"
    """`text`, `image`, `random`, `grid`, `tome`, `tome front`, `words` (no image at all) or `none`."""
    relevance: str | None = None
    texts: str = ""
    """`paired`: each caption guides its own pass; `candidates`: the 16 of a scene share one; `nouns`: all concepts."""


ARMS = (
    Arm("text alone, trained", "words", texts="trained"),
    Arm("text alone, counting words", "words", texts="counting"),
    Arm("no selection", "none"),
    Arm("values, shared by the candidates", "text", "values", "candidates"),
    Arm("values, shared by all nouns", "text", "values", "nouns"),
    Arm("values, per caption", "text", "values", "paired"),
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
FRONT = {"tome": None, "tome front": front(DEPTH)}
"""In how many blocks each of the two mergings merges: all, or the first third."""


Lengths = List[Tuple[int, int]]
"""Tokens that the attention and the MLP of each block see, [CLS] and fused token included."""


def selected(rate: float) -> Lengths:
    """Return what selection at this rate leaves of the tokens."""
    seen, patches = [], GRID * GRID
    for index in range(DEPTH):
        before = patches
        if index in LAYERS and rate < 1:
            patches = min(patches, num_kept(patches, as_ratio(rate)) + 1)
        seen.append((1 + before, 1 + patches))
    return seen


def merged(removed: int, first: int | None = None) -> Lengths:
    """Return what token merging leaves, where a layer can merge no more than half of its patches."""
    seen, patches = [], GRID * GRID
    for step in schedule(removed, DEPTH, first):
        before = patches
        patches -= min(step, patches // 2)
        seen.append((1 + before, 1 + patches))
    return seen


def downsampled(side: tuple[int, int]) -> Lengths:
    """Return what a grid of these sides has."""
    return [(1 + side[0] * side[1],) * 2] * DEPTH


def flops(lengths: Lengths) -> float:
    """Return multiplications of the blocks' matrix products, those of the whole image being 1."""
    whole = [(1 + GRID * GRID,) * 2] * DEPTH
    return products(lengths) / products(whole)


def products(lengths: Lengths) -> int:
    """Return multiplications of the matrix products of all blocks, over the width."""
    return sum(4 * before * WIDTH + 2 * before * before + 8 * after * WIDTH for before, after in lengths)


@lru_cache(maxsize=None)
def merged_like(rate: float, first: int | None = None) -> int:
    """Return how many patches ToMe removes in all to cost what selection at this rate does, or as close as it gets."""
    target = flops(selected(rate))
    return min(range(GRID * GRID), key=lambda removed: (abs(flops(merged(removed, first)) - target), removed))


@lru_cache(maxsize=None)
def grid_like(rate: float) -> tuple[int, int]:
    """Return the grid, square or one longer, that costs about as much."""
    sides = [(side, side + longer) for side in range(1, GRID) for longer in (0, 1)]
    return min([*sides, (GRID, GRID)], key=lambda side: abs(flops(downsampled(side)) - flops(selected(rate))))


def lengths(arm: Arm, rate: float) -> Lengths:
    """Return tokens that this arm leaves; none at all where it sees no image."""
    if arm.guidance == "words":
        return []
    if arm.guidance in FRONT:
        first = FRONT[arm.guidance]
        return merged(merged_like(rate, first), first)
    if arm.guidance == "grid":
        return downsampled(grid_like(rate))
    return selected(1.0 if arm.guidance == "none" else rate)


@torch.no_grad()
def encode_smaller(model: Any, images: Tensor, side: tuple[int, int]) -> Tensor:
    """Return `(N, E)` features of scaled-down images, with the position embeddings scaled like them."""
    small = F.interpolate(images, [PATCH * length for length in side], mode="bilinear", antialias=True)
    first, rest = model.visual.positional_embedding.split([1, GRID * GRID])
    square = rest.T.unflatten(1, (GRID, GRID)).unsqueeze(0)
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
        images: `(N, 3, S, S)`.
        texts: `(N, CHOICES, E)`.
        fusion: of `patchselect.apply`.
    """
    if arm.guidance == "none":
        return encode(model, images)
    if arm.guidance == "grid":
        return encode_smaller(model, images, grid_like(rate))
    if arm.guidance in FRONT:
        first = FRONT[arm.guidance]
        with token_merging(model, merged_like(rate, first), first=first):
            return encode(model, images)
    handle = patchselect.apply(model, rate, LAYERS, arm.guidance, arm.relevance, fusion)
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
