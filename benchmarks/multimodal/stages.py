"""One answer in its stages: the images through the tower, the prompt through the language model, word after word."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import patchselect
from patchselect.prompts.columns import Cut, shortened

STAGES = ("tower", "prefill", "decode")
Stage = Callable[[str, Callable[[], Any]], Any]
"""Runs a stage, and takes its time or counts its FLOPs."""


def encode(model: Any, case: str, inputs: dict[str, Tensor], text: Tensor, left: int) -> dict[str, Any]:
    """Return the short call: its images encoded, its prompt cut."""
    if case in ("text", "image", "random"):
        with patchselect.guide(model, text) if case == "text" else nullcontext():
            return patchselect.shorten(model, **inputs)
    encoded = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    if case == "after the tower":
        rest = drop(model, encoded, rest, left)
    return {**rest, "mm_encoder_outputs": {"image": encoded}}


def drop(model: Any, encoded: Any, rest: dict[str, Any], left: int) -> dict[str, Any]:
    """Keep `left` tokens of each image after the whole tower, those most like their mean, as many as the others have.

    What add-ons do that choose after the tower; which tokens they choose costs about as much, and is no matter here.
    """
    tokens = torch.stack(list(encoded.pooler_output))
    scores = torch.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=-1)
    kept = scores.topk(left, dim=1).indices.sort(dim=1).values
    encoded.pooler_output = [each[index] for each, index in zip(tokens, kept)]
    ids = rest["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    holders = ids == model.config.image_token_id
    stay = shortened(holders, [tokens.shape[1]] * len(tokens), list(kept), positions)
    cut = Cut.of(stay.columns)
    found = {name: cut(value) for name, value in rest.items()}
    return {**found, "position_ids": cut.last(stay.positions)}


@torch.inference_mode()
def answer(
    model: Any, case: str, inputs: dict[str, Tensor], text: Tensor, left: int, words: int, stage: Stage
) -> dict[str, int]:
    """Answer with so many words, each the most likely one; return the length of the prompt and bytes of the cache."""
    short = stage("tower", lambda: encode(model, case, inputs, text, left))
    length = short["input_ids"].shape[1]
    first = inputs["input_ids"].shape[1]
    mask = short["attention_mask"]
    found = stage("prefill", lambda: model(**short, use_cache=True, logits_to_keep=1))
    state = {"ids": found.logits[:, -1:].argmax(dim=-1), "cache": found.past_key_values}

    def steps() -> None:
        for step in range(words):
            seen = torch.cat([mask, mask.new_ones(len(mask), step + 1)], dim=1)
            position = torch.full_like(state["ids"], first + step)
            out = model(
                input_ids=state["ids"], attention_mask=seen, position_ids=position, past_key_values=state["cache"]
            )
            state["ids"] = out.logits[:, -1:].argmax(dim=-1)

    stage("decode", steps)
    layers = state["cache"].layers
    held = sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
    return {"prompt_tokens": length, "cache_bytes": held}
