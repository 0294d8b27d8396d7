"""Which texts belong to which rows of a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor

from .guidance import Guidance
from .state import Layer


def texts_for(layer: Layer, guidance: Guidance, tokens: Tensor) -> Tensor:
    """Return the texts of the rows of `tokens` `(B, N, D)`.

    `(B', 1, D_text)` in tiles, `(B, T, D_text)`, or `(1, T, D_text)` where all images share them.

    Raises:
        ValueError: another device, a number of texts that does not fit the images, or several images per text whose
            order nobody has told.
    """
    # A view of a text that needs a gradient would still claim to need one where none is taken (momentum towers).
    text = guidance.text if torch.is_grad_enabled() else guidance.text.detach()
    rows = tokens.shape[0]
    if text.device != tokens.device:
        raise ValueError(f"text_features are on {text.device}, the images on {tokens.device}: move one of them")
    if text.dim() == 3:
        own = layer.first or guidance.pairing == "shared"
        if own and rows != text.shape[0]:
            raise ValueError(
                f"text_features are (images, texts, width) = {tuple(text.shape)}, but {rows} images came: give "
                "each image its texts, or all images the same ones as (texts, width)"
            )
        if own:
            return text
        text = text.flatten(0, 1)
    if guidance.pairing == "shared" or (guidance.pairing == "all" and layer.first):
        return text.unsqueeze(0)
    texts = text.shape[0]
    if rows % texts or (guidance.exact and rows != guidance.exact * texts):
        raise ValueError(
            f"{texts} texts for {rows} images: text i guides image i, so there must be as many (or, in guide() with "
            "repeat=, a whole multiple of images). For one selection that serves all texts, or every image with "
            'every text, call the image side under guide(model, text_features, pairing="shared") or "all"'
        )
    in_order = guidance.pairing == "all" or guidance.repeat == "tile"  # later layers of "all" see image-major rows
    if rows == texts or texts == 1 or in_order:
        return text.unsqueeze(1)
    if guidance.repeat == "each":
        return text.repeat_interleave(rows // texts, dim=0).unsqueeze(1)
    raise ValueError(
        f"{texts} texts for {rows} images, and nothing says which {rows // texts} images belong to a text: "
        'guide(model, text_features, repeat="each") where they follow each other (the frames of a video), '
        'repeat="tile" where they do not (torch.cat([image0, image1])), or pairing="shared" where the texts are '
        "candidates for every image"
    )
