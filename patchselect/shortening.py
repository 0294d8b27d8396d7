"""`shorten`: the short prompt that a patched language model computes with, for loops of your own."""

from __future__ import annotations

from typing import Any

from torch import nn

from .prompts.calls import counted_positions, encoded_call
from .prompts.host import Prompted
from .prompts.shorten import shorten_call
from .wiring.state import wiring_of


def shorten(model: nn.Module, *, generate: bool = False, **inputs: Any) -> dict[str, Any]:
    """Return the arguments of a call with its images encoded and its prompt cut to the tokens that they have left.

        with patchselect.guide(model, text_features):
            short = patchselect.shorten(model, **inputs)
        output = model(**short)                  # the same as model(**inputs) under guide

    `model(**inputs)` and `model.generate(**inputs)` do this by themselves. It is for loops that go on from a cache,
    with masks and positions of their own, and for asking the same images once more with another ending.

    Args:
        model: a model that `patchselect.apply` patched, whose language model reads patches in its prompt.
        generate: whether the arguments are for `model.generate`, which counts positions without padding; else they
            are for `model(...)`.
        inputs: what the model would be called with: `input_ids` or `inputs_embeds` `(B, L, …)`, `pixel_values`, and
            whatever follows the prompt (`attention_mask`, `labels`, `token_type_ids`, `position_ids`).

    Returns:
        The same, `(B, L', …)`, with `attention_mask`, `position_ids` and `mm_encoder_outputs`, without the pixels. With
        transformers 4.57 the patched model alone reads the last of these.

    Raises:
        ValueError: the model has no such prompts or is not patched, there are no images, or what calls of the model
            raise: placeholders that do not fit the images of their row, no text where one must guide.
    """
    wiring = wiring_of(model)
    host = wiring.towers[0].adapter
    if not isinstance(host, Prompted):
        raise ValueError(f"{type(wiring.model).__name__} has no prompt that holds its patches: nothing to shorten")
    if inputs.get(host.image_arguments[0]) is None:
        raise ValueError(f"nothing to shorten: give the images as {host.image_arguments[0]}")
    positions = host.counted(wiring.model, inputs, counted_positions(wiring.model, inputs)) if generate else None
    return encoded_call(shorten_call(wiring, inputs, positions))
