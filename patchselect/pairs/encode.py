"""`encode_prefix`: images, up to where the first text comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..wiring.state import wiring_of
from .batches import batches
from .prefix import Origin, Prefix, take_prefix


@torch.no_grad()
def encode_prefix(model: nn.Module, images: Any, **kwargs: Any) -> Prefix:
    """Encode images up to the first selection layer: all that does not depend on the text.

        prefix = patchselect.encode_prefix(model, pixel_values)
        with patchselect.guide(model, text_features, prefix=prefix):
            image_features = model.get_image_features(prefix.images)

    Every later question about these images costs the blocks after the first selection, on fewer tokens (and the patch
    embedding of the stand-in, under 1 % of a ViT). The numbers are those from the pixels. Without gradients: a prefix
    is for inference, call `model.eval()` first.

    Args:
        model: a model that `patchselect.apply` patched with `guidance="text"`.
        images: `(B, 3, H, W)`, or whatever else `score_pairs` takes as images: a list, a mapping with `pixel_values`,
            a loader. The prefix of all of them is held at once.
        kwargs: further arguments of the vision tower (SigLIP 2: `spatial_shapes`, …), for a tensor or a mapping.

    Raises:
        ValueError: the model is not patched, or not guided by text; nothing of it is independent of the text; images
            of a wrong shape, of several sizes, or none.
        TypeError: images of a kind that cannot be read.
    """
    wiring = wiring_of(model)
    guidance = wiring.plan.guidance
    if guidance != "text":
        raise ValueError(
            f"this model is guided by {guidance!r}: each image is encoded once whatever the texts, so there is "
            'no prefix to keep; apply(model, guidance="text") first'
        )
    tower = wiring.towers[0]
    if tower.single_stream:
        raise ValueError(
            f"in {type(tower.module).__name__} image and text share one sequence from the first block on: no part of "
            "the image side is independent of the text, so there is no prefix to keep"
        )
    if isinstance(images, Prefix):
        raise TypeError("images are a Prefix already: give it to guide(prefix=…) or score_pairs")
    weight, origin = next(tower.module.parameters()), Origin.of(wiring)
    parts = []
    for batch in batches(images, tower):
        pixels = batch.to(weight)
        options = {**pixels.options, **kwargs}
        parts.append(take_prefix(wiring, pixels.images, options, batch.images.shape[1:], origin))
    if len({(part.shape, part.tokens.shape[1:]) for part in parts}) != 1:
        raise ValueError(
            "a prefix holds images of one size, at least one of them; got "
            + str(sorted({part.shape for part in parts}))
        )
    return Prefix.cat(parts)
