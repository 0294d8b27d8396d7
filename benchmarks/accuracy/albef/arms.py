"""The ways to spend less on an image that are compared, as one call each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.common.cost import count_flops
from benchmarks.common.lengths import Lengthwise
from benchmarks.common.tome import front, token_merging
from patchselect.reduction import Protect, Reduction

from .model import HEADS, PATCH, USUAL, WIDTH, MiniAlbef, Shape

Encode = Callable[[Tensor, Tensor], Tensor]
"""Images `(B, 3, S, S)` and the text [CLS] of their pairs `(B, D)` to image tokens `(B, N, D)`."""

METHODS = ("text", "image", "random", "downsampled", "tome", "front", "once", "merged", "protected", "quarter")


@dataclass(frozen=True)
class Once:
    """ONE selection, after which attention counts sizes."""

    merge: float
    """The share of the removed patches that merges before it."""
    protect: float | None = None
    """Of `Protect`: into how many tokens for each that stays the others merge; `None`: they become one token."""

    @property
    def fusion(self) -> Reduction | str:
        """What `patchselect.apply` takes."""
        return "mean" if self.protect is None else Protect(self.protect)

    def __str__(self) -> str:
        return f"merge {self.merge:g}, " + ("then select" if self.protect is None else f"Protect({self.protect:.2g})")


ONCE = {
    "once": Once(0.0),
    "merged": Once(0.5),
    "protected": Once(0.5, 1.0),
    "quarter": Once(0.5, 3.0),
    **{f"merged {share:g}": Once(share) for share in (0.3, 0.7, 0.85)},
    "protected 0.7": Once(0.7, 1.0),
    **{f"protected third {share:g}": Once(share, 1 / 3) for share in (0.5, 0.7)},
    "quarter 0.7": Once(0.7, 3.0),
}
"""What was tried of it; the first four are in the tables, which were chosen among the others on validation."""
RELEVANCE = {"text": "keys", "values": "values", **dict.fromkeys(ONCE, "keys")}
"""Of the methods that are guided by text."""
FRONT = "front"
MERGING = ("tome", FRONT)
"""Methods that merge without a text: in all blocks, or in the first third of them."""
LABELS = {
    "words": "text alone, no image",
    "none": "no reduction",
    "text": "text (TRIPS)",
    "values": 'text, "values"',
    "image": "image [CLS] (EViT)",
    "random": "random",
    "downsampled": "smaller image, same FLOPs",
    "tome": "merging (ToMe), same FLOPs",
    "front": "merging early (ToMe-front), same FLOPs",
    "once": "text, one selection, sizes counted, same FLOPs",
    "merged": "merge, then select by text, same FLOPs",
    "protected": "merge, text protects, the rest merges, same FLOPs",
    "quarter": "merge, text protects a quarter, the rest merges, same FLOPs",
}
LABELS.update((name, str(way)) for name, way in ONCE.items() if name not in LABELS)


@contextmanager
def reduced(
    model: MiniAlbef,
    method: str,
    keep_rate: float = 1.0,
    layers: tuple[int, ...] | None = None,
    share: float | None = None,
) -> Iterator[Encode]:
    """Let the model's image encoder run under one method; the model is itself again afterwards.

    Args:
        model: unpatched.
        method: `none`, `values` or one of `METHODS`; `text` ranks by the paper's `keys`.
        keep_rate: of each selection layer; the others spend what text guidance spends at this rate.
        layers: where text, image and random guidance select; `None`: in those of its shape.
        share: of the blocks' FLOPs, which merging or one selection spends instead.
    """

    def plain(images: Tensor, text: Tensor) -> Tensor:
        return model.encode_image(images)

    def guided(images: Tensor, text: Tensor) -> Tensor:
        with patchselect.guide(model.vision, lifted(model, method, text)):
            return model.encode_image(images)

    def smaller(images: Tensor, text: Tensor) -> Tensor:
        side = smaller_side(images.shape[-1], keep_rate, model.shape)
        return model.encode_image(F.interpolate(images, (side, side), mode="bilinear", antialias=True))

    if method == "none":
        yield plain
    elif method == "downsampled":
        yield smaller
    elif method in MERGING:
        tower, first = lengthwise(model.vision.patch_embed.num_patches, model.shape), first_of(method, model.shape)
        removed = tower.merged_like(spent(tower, keep_rate) if share is None else share, first)
        with token_merging(model.vision, removed, first=first):
            yield plain
    else:
        handle = selecting(model, method, keep_rate, layers, share)
        try:
            yield guided if method in RELEVANCE else plain
        finally:
            handle.remove()


def selecting(
    model: MiniAlbef,
    method: str,
    keep_rate: float,
    layers: tuple[int, ...] | None = None,
    share: float | None = None,
) -> patchselect.Handle:
    """Put the selection of one method into the image encoder; arguments as of `reduced`."""
    whole = model.shape.layers
    if method in ONCE:
        tower, way = lengthwise(model.vision.patch_embed.num_patches, model.shape), ONCE[method]
        own = tower.rate_like(spent(tower, keep_rate) if share is None else share, way.merge, way.protect)
        given = dict(relevance=RELEVANCE[method], fusion=way.fusion, merge=way.merge, sizes=True)
        return patchselect.apply(model.vision, own, whole[:1], **given)  # type: ignore[arg-type]
    if method not in ("text", "values", "image", "random"):
        raise ValueError(f"method must be one of none, {', '.join(METHODS)} or values; got {method!r}")
    relevance = RELEVANCE.get(method)
    return patchselect.apply(model.vision, keep_rate, layers or whole, "text" if relevance else method, relevance)


def lifted(model: MiniAlbef, method: str, text: Tensor) -> Tensor:
    """Return the text [CLS] `(B, WIDTH)` as the bare tower takes it: for "values" through the joint space."""
    return model.text_proj(text) @ model.vision_proj.weight if method == "values" else text


@lru_cache(maxsize=None)
def lengthwise(patches: int, shape: Shape = USUAL) -> Lengthwise:
    """Return the image encoder as its lengths are reckoned."""
    return Lengthwise(patches, shape.depth, WIDTH, shape.layers, HEADS, shape.prefix)


def first_of(method: str, shape: Shape = USUAL) -> int | None:
    """Return in how many blocks one of `MERGING` merges; `None`: in all."""
    return front(shape.depth) if method == FRONT else None


def spent(tower: Lengthwise, keep_rate: float) -> float:
    """Return the share of the blocks' FLOPs that the two selections of text guidance spend."""
    return tower.share(tower.selected(keep_rate))


@lru_cache(maxsize=None)
def vision_flops(
    image_size: int,
    keep_rate: float,
    layers: tuple[int, ...] | None = None,
    method: str = "text",
    share: float | None = None,
    shape: Shape = USUAL,
) -> int:
    """Count the FLOPs of encoding one image by one of `METHODS`; at keep rate 1 those of the unpatched encoder."""
    model = MiniAlbef(image_size, shape).eval()

    with reduced(model, "none" if keep_rate == 1 and share is None else method, keep_rate, layers, share) as encode:
        return count_flops(
            lambda: encode(torch.zeros(1, 3, image_size, image_size), torch.zeros(1, model.vision.embed_dim))
        )


@lru_cache(maxsize=None)
def smaller_side(image_size: int, keep_rate: float, shape: Shape = USUAL) -> int:
    """Return the side whose unpatched FLOPs come closest to those of the selection, whole patches only."""
    target = vision_flops(image_size, keep_rate, shape=shape)
    sides = range(2 * PATCH, image_size + 1, PATCH)
    return min(sides, key=lambda side: abs(vision_flops(side, 1.0, shape=shape) - target))
