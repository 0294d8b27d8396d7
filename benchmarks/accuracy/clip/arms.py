"""The ways to spend fewer tokens on the small CLIP, and how many each of them spends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.accuracy.world.captions import EMOJI
from benchmarks.common.tome import schedule, token_merging
from patchselect.functional import as_ratio, num_kept

from .model import DEPTH, LAYERS, PATCH, SIZE, tokenize
from .questions import CHOICES, encode

GRID = SIZE // PATCH


@dataclass(frozen=True)
class Arm:
    """One way to spend fewer tokens."""

    name: str
    guidance: str = "text"
    """`text`, `image`, `random`, `grid`, `tome` or `none`."""
    relevance: str | None = None
    texts: str = ""
    """`paired`: each caption guides its own pass; `candidates`: the 16 of a scene share one; `nouns`: all concepts."""


ARMS = (
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
    Arm("smaller grid, equal tokens", "grid"),
    Arm("ToMe, equal tokens", "tome"),
)
NONE, SHARED = ARMS[0].name, ARMS[1].name
RIVALS = ("image [CLS] (EViT)", "keys, per caption (TRIPS)", "keys, shared by the candidates", "ToMe, equal tokens")


def tokens_with(rate: float) -> int:
    """Tokens that all MLPs of the tower see, [CLS] and fused token included: what "equal tokens" compares."""
    total, patches = 0, GRID * GRID
    for index in range(DEPTH):
        if index in LAYERS and rate < 1:
            patches = min(patches, num_kept(patches, as_ratio(rate)) + 1)
        total += 1 + patches
    return total


def tokens_merged(removed: int) -> int:
    """The same for token merging, where a layer can merge no more than half of its patches."""
    total, patches = 0, GRID * GRID
    for step in schedule(removed, DEPTH):
        patches -= min(step, patches // 2)
        total += 1 + patches
    return total


def merged_like(tokens: int) -> int:
    """How many patches ToMe removes in all to spend `tokens`, or as close as it gets."""
    return min(range(GRID * GRID), key=lambda removed: (abs(tokens_merged(removed) - tokens), removed))


def grid_like(tokens: int) -> tuple[int, int]:
    """The grid, square or one longer, that spends about as many."""
    sides = [(side, side + longer) for side in range(1, GRID) for longer in (0, 1)]
    return min(sides, key=lambda side: abs(DEPTH * (1 + side[0] * side[1]) - tokens))


def spent(arm: Arm, rate: float) -> int:
    """Tokens of this arm over all blocks."""
    if arm.guidance == "none":
        return tokens_with(1.0)
    if arm.guidance == "tome":
        return tokens_merged(merged_like(tokens_with(rate)))
    if arm.guidance == "grid":
        height, width = grid_like(tokens_with(rate))
        return DEPTH * (1 + height * width)
    return tokens_with(rate)


@torch.no_grad()
def encode_smaller(model: Any, images: Tensor, side: tuple[int, int]) -> Tensor:
    """`(N, E)` features of scaled-down images, with the position embeddings scaled like them."""
    small = F.interpolate(images, [PATCH * length for length in side], mode="bilinear", antialias=True)
    first, rest = model.visual.positional_embedding.split([1, GRID * GRID])
    square = rest.T.unflatten(1, (GRID, GRID)).unsqueeze(0)
    square = F.interpolate(square, side, mode="bicubic", antialias=True).flatten(2)[0].T
    state = {"positional_embedding": torch.cat([first, square])}
    return torch.cat([torch.func.functional_call(model.visual, state, (part,)) for part in small.split(256)])


@torch.no_grad()
def answers(model: Any, arm: Arm, rate: float, images: Tensor, texts: Tensor, fusion: Any = "mean") -> Tensor:
    """Image features `(N, E)`, or `(N, CHOICES, E)` where each caption guides its own.

    Args:
        model: in evaluation mode, without selection; it is left so.
        arm: what to do.
        rate: keep rate of both layers.
        images: `(N, 3, S, S)`.
        texts: `(N, CHOICES, E)`.
        fusion: of `patchselect.apply`.
    """
    if arm.guidance == "none":
        return encode(model, images)
    if arm.guidance == "grid":
        return encode_smaller(model, images, grid_like(tokens_with(rate)))
    if arm.guidance == "tome":
        with token_merging(model, merged_like(tokens_with(rate))):
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
