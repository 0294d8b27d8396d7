"""The ways to leave fewer tokens of an image: which of them the language model gets, and at which positions.

All arms leave as many tokens: `keep_rate` of the patches and one more, which in the tower is the fused one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.accuracy.albef.model import LAYERS, MiniAlbef
from patchselect.functional import as_ratio, num_kept
from patchselect.prompts.columns import Cut, offsets_of, shortened

from .decoder import PATCHES
from .questions import WORDS

NONE, WORDS_ALONE = "none", "words"
INSIDE: dict[str, dict[str, Any]] = {
    "text": dict(guidance="text", relevance="keys"),
    "merged": dict(guidance="text", relevance="keys", merge=0.5, sizes=True),
    "image": dict(guidance="image"),
    "random": dict(guidance="random"),
}
"""Arguments of `patchselect.apply`; one selection, in the 3rd of the 6 blocks."""
AFTER = ("after, text", "after, image")
ARMS = (*INSIDE, *AFTER)
LABELS = {
    WORDS_ALONE: "text alone, no image",
    NONE: "no reduction",
    "text": "in the tower, text (TRIPS)",
    "merged": "in the tower, merge, then select by text",
    "image": "in the tower, image [CLS] (EViT)",
    "random": "in the tower, random",
    "after, text": "after the tower, text (joint space)",
    "after, image": "after the tower, [CLS]'s attention",
}


class Left(NamedTuple):
    """What is left of each image, in the order of the tokens."""

    tokens: Tensor
    """`(B, m, WIDTH)`"""
    sources: Tensor
    """`(B, m)`: the patch that each token was; -1 is a fused token."""


def tokens_left(keep_rate: float) -> int:
    """Return how many tokens every arm leaves of an image."""
    return min(PATCHES, num_kept(PATCHES, as_ratio(keep_rate)) + 1)


@torch.inference_mode()
def left(model: MiniAlbef, arm: str, rates: Sequence[float], images: Tensor, text: Tensor) -> dict[float, Left]:
    """Encode images in one way at several keep rates.

    Args:
        model: the base, unpatched.
        arm: `NONE` or one of `ARMS`.
        rates: keep rates; what chooses after the tower encodes once for all of them.
        images: `(B, 3, S, S)`
        text: `(B, WIDTH)`, the text [CLS] of what is asked for.
    """
    if arm == NONE:
        tokens = model.encode_image(images)[:, 1:]
        return dict.fromkeys(rates, Left(tokens, torch.arange(PATCHES).expand(len(tokens), -1)))
    if arm in AFTER:
        return chosen_after(model, arm, rates, images, text)
    return {rate: chosen_inside(model, arm, rate, images, text) for rate in rates}


def chosen_inside(model: MiniAlbef, arm: str, keep_rate: float, images: Tensor, text: Tensor) -> Left:
    """Select in the tower."""
    handle = patchselect.apply(model.vision, keep_rate, LAYERS[:1], **INSIDE[arm])
    by_text = handle.guidance == "text"
    try:
        with handle.record() as trace, patchselect.guide(model.vision, text) if by_text else nullcontext():
            tokens = model.encode_image(images)[:, 1:]
    finally:
        handle.remove()
    fused = tokens.shape[1] - trace[-1].kept.shape[1]
    return Left(tokens, F.pad(trace[-1].kept, (0, fused), value=-1))


def chosen_after(model: MiniAlbef, arm: str, rates: Sequence[float], images: Tensor, text: Tensor) -> dict[float, Left]:
    """Drop tokens of the whole tower's output: those least like the text, or least attended to by the image's [CLS].

    The attention is that of the last block; the likeness is the cosine in the joint space.
    """
    handle = patchselect.apply(model.vision, 1.0, [len(model.vision.blocks) - 1], "image")
    try:
        with handle.record() as trace:
            tokens = model.encode_image(images)[:, 1:]
    finally:
        handle.remove()
    scores = trace[0].relevance
    if arm == "after, text":
        scores = F.cosine_similarity(model.vision_proj(tokens), model.text_proj(text).unsqueeze(1), dim=-1)
    found = {}
    for rate in rates:
        kept = scores.topk(tokens_left(rate), dim=1).indices.sort(dim=1).values
        found[rate] = Left(tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])), kept)
    return found


def positions_of(sources: Tensor, renumber: bool = False) -> Tensor:
    """Return the positions `(B, 1 + m + WORDS)` of the start, of what is left of an image, and of the words.

    Those of the whole prompt, as `patchselect.apply` on a language model keeps them (a fused token has the last place
    that is free), or counted anew.
    """
    rows = len(sources)
    holders = torch.zeros(rows, 1 + PATCHES + WORDS, dtype=torch.bool)
    holders[:, 1 : 1 + PATCHES] = True
    whole = torch.arange(holders.shape[1]).expand(rows, -1)
    stay = shortened(holders, [PATCHES] * rows, list(offsets_of(sources, PATCHES, 0)), whole, renumber)
    return Cut.of(stay.columns).last(stay.positions)
