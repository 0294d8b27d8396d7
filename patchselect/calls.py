"""What adapters share in reading the calls and outputs of hosts."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor


def bound(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return {**dict(zip(names, args)), **kwargs}


def patch_grid(pixels: Tensor, embedding: Any) -> tuple[int, int]:
    """Return height and width, in patches, of images `(B, 3, H, W)` that this convolution cuts into patches."""
    height, width = embedding.stride
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def named(texts: Any, ids: str = "input_ids") -> dict[str, Any]:
    """Return token ids, or a tokenizer's output, as keyword arguments."""
    return dict(texts) if isinstance(texts, Mapping) else {ids: texts}


def pooled(output: Any) -> Tensor:
    """Return the features in a host's output: a tensor, a tuple, or an object of whatever release of transformers."""
    for name in ("image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return output if isinstance(output, Tensor) else output[0]


def padded(state: Tensor, length: int) -> Tensor:
    """Lengthen `(M, L, ...)` to `(M, length, ...)` with zeros."""
    return F.pad(state, (0, 0) * (state.dim() - 2) + (0, length - state.shape[1]))


def refuse_extras(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a block is called with a mask, or asked for its attention map, where its attention counts sizes.

    Raises:
        ValueError: it is; says what to do.
    """
    given = {**{f"argument {place}": value for place, value in enumerate(args, start=2)}, **kwargs}
    asked = [name for name, value in given.items() if isinstance(value, Tensor) or value is True]
    if asked:
        raise ValueError(
            f"attention that counts sizes knows no {', '.join(asked)} (a mask over the image, or a flag that asks for "
            "the attention map, which a fused call does not have): call without, or patchselect.apply(..., sizes=False)"
        )
