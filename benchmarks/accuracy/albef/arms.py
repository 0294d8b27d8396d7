"""The ways to spend less on an image that are compared, as one call each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.common.cost import count_flops
from benchmarks.common.tome import token_merging

from .model import LAYERS, PATCH, MiniAlbef

Encode = Callable[[Tensor, Tensor], Tensor]
"""Images `(B, 3, S, S)` and the text [CLS] of their pairs `(B, D)` to image tokens `(B, N, D)`."""

METHODS = ("text", "image", "random", "downsampled", "tome")
RELEVANCE = {"text": "keys", "values": "values"}
"""Of the methods that are guided by text."""
LABELS = {
    "words": "text alone, no image",
    "none": "no reduction",
    "text": "text (TRIPS)",
    "values": 'text, "values"',
    "image": "image [CLS] (EViT)",
    "random": "random",
    "downsampled": "smaller image, same FLOPs",
    "tome": "merging (ToMe), same tokens",
}


@contextmanager
def reduced(
    model: MiniAlbef, method: str, keep_rate: float = 1.0, layers: tuple[int, ...] = LAYERS
) -> Iterator[Encode]:
    """Let the model's image encoder run under one method; the model is itself again afterwards.

    Args:
        model: unpatched.
        method: `none`, `text` (the paper's `keys`), `values`, `image`, `random`, `downsampled` or `tome`.
        keep_rate: of each selection layer; the others spend what text guidance at this rate spends in `LAYERS`.
        layers: where text, image and random guidance select.
    """

    def plain(images: Tensor, text: Tensor) -> Tensor:
        return model.encode_image(images)

    def guided(images: Tensor, text: Tensor) -> Tensor:
        with patchselect.guide(model.vision, lifted(model, method, text)):
            return model.encode_image(images)

    def smaller(images: Tensor, text: Tensor) -> Tensor:
        side = smaller_side(images.shape[-1], keep_rate)
        return model.encode_image(F.interpolate(images, (side, side), mode="bilinear", antialias=True))

    if method == "none":
        yield plain
    elif method == "downsampled":
        yield smaller
    elif method == "tome":
        with token_merging(model.vision, merged(model.vision.patch_embed.num_patches, keep_rate)):
            yield plain
    elif method in ("text", "values", "image", "random"):
        relevance = RELEVANCE.get(method)
        guidance = "text" if relevance else method
        handle = patchselect.apply(model.vision, keep_rate, layers, guidance, relevance)
        try:
            yield guided if relevance else plain
        finally:
            handle.remove()
    else:
        raise ValueError(f"method must be one of none, {', '.join(METHODS)} or values; got {method!r}")


def lifted(model: MiniAlbef, method: str, text: Tensor) -> Tensor:
    """Return the text [CLS] `(B, WIDTH)` as the bare tower takes it: for "values" through the joint space."""
    return model.text_proj(text) @ model.vision_proj.weight if method == "values" else text


def tokens_per_block(patches: int, keep_rate: float, depth: int = 6) -> list[int]:
    """Return tokens that the attention and the MLP of each block see on average, [CLS] and fused tokens included."""
    seen, now = [], patches + 1
    for block in range(depth):
        before = now
        if block in LAYERS and keep_rate < 1:
            now = 2 + patchselect.num_kept(now - 1, keep_rate)
        seen.append((before + now) / 2)
    return seen  # type: ignore[return-value]


def merged(patches: int, keep_rate: float, depth: int = 6) -> int:
    """Return how many patches ToMe must merge in all for the tokens of its blocks to sum up to those of the selection.

    Spread evenly, no merging reaches the token count of the lowest rates: it then merges all that it can.
    """
    target = sum(tokens_per_block(patches, keep_rate, depth))
    # r merged in every block: block b sees N - b r before and N - (b + 1) r after its merging.
    per_block = (depth * (patches + 1) - target) / sum(block + 0.5 for block in range(depth))
    return min(round(per_block * depth), patches - 1)


@lru_cache(maxsize=None)
def vision_flops(image_size: int, keep_rate: float, layers: tuple[int, ...] = LAYERS, method: str = "text") -> int:
    """Count the FLOPs of encoding one image by one of `METHODS`; at keep rate 1 those of the unpatched encoder."""
    model = MiniAlbef(image_size).eval()

    def call() -> object:
        with reduced(model, "none" if keep_rate == 1 else method, keep_rate, layers) as encode:
            return encode(torch.zeros(1, 3, image_size, image_size), torch.zeros(1, model.vision.embed_dim))

    return count_flops(call)


@lru_cache(maxsize=None)
def smaller_side(image_size: int, keep_rate: float) -> int:
    """Return the side whose unpatched FLOPs come closest to those of the selection, whole patches only."""
    target = vision_flops(image_size, keep_rate)
    return min(range(2 * PATCH, image_size + 1, PATCH), key=lambda side: abs(vision_flops(side, 1.0) - target))
