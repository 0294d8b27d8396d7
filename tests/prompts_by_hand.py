"""Language models with a shortened prompt, and the same call made by somebody who drops the placeholders by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hosts import build
from hosts.of_prompts import IMAGE, PAD, prompts, read
from torch import Tensor

import patchselect

SQUARES = ("smolvlm", "idefics3", "internvl")
NAMES = ("llava", "llava_siglip", "llava_full", "vipllava", "paligemma", *SQUARES)
RATE = 0.5
each = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("name", ["llava", "paligemma"])
GREEDY = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=PAD)


def size_of(case) -> int:
    """How many placeholders an image has."""
    strategy = getattr(case.model.config, "vision_feature_select_strategy", "")
    return case.extra.get("size", 17 if strategy == "full" and case.prefix else 16)


def inputs_of(case, rows=(2, 1, 0), words=(5, 9, 12), **more: Any) -> dict[str, Tensor]:
    pixels = 96 if "side" in case.extra else 64
    found = prompts(rows, words, size_of(case), pixels=pixels, **more)
    if "PaliGemma" in type(case.model).__name__:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    if hasattr(case.model.model, "connector"):  # rows of images, padded with black ones
        images = list(found["pixel_values"].split([*rows]))
        most = max(rows)
        empty = torch.zeros(1, 3, pixels, pixels)
        padded = [torch.cat([each, *[empty] * (most - len(each))]) for each in images]
        found["pixel_values"] = torch.stack(padded)
    return found


def encoded(case, inputs, text=None) -> tuple[list[Tensor], list[list[int]]]:
    """The tokens of each image, and the places of its placeholders that they stand for, as lists."""
    handle = patchselect.handle_of(case.model)
    counts = (inputs["input_ids"] == IMAGE).sum(dim=1) // size_of(case)
    text = None if text is None else text.repeat_interleave(counts, dim=0)
    with handle.record() as trace, nullcontext() if text is None else patchselect.guide(case.model, text):
        found = read(case.model.get_image_features(pixel_values=inputs["pixel_values"]))
    side, extra = case.extra.get("side", 1), size_of(case) % case.patches if "side" not in case.extra else 0
    size, places = size_of(case) - extra, []
    for kept, fused in zip(trace[-1].kept.tolist(), [trace[-1].fused] * len(trace[-1].kept)):
        kept = [*kept[:: side**2], *([-1] if fused else [])]
        kept = [place if place < 0 else square(place, side, case.grid[1]) for place in kept]
        free = [place for place in range(size) if place not in kept][-kept.count(-1) :] if -1 in kept else []
        places.append([*range(extra), *(extra + (free.pop(0) if place < 0 else place) for place in kept)])
    tokens = torch.cat([each.reshape(-1, each.shape[-1]) for each in found])
    return list(tokens.unflatten(0, (len(places), -1))), places


def square(place: int, side: int, width: int) -> int:
    """Which square of `side` x `side` places of the grid one of its places is in."""
    row, column = divmod(place, width)
    return row // side * (width // side) + column // side


def by_hand(case, twin, inputs, text=None, first: int = 0, renumber: bool = False, masked: bool = False):
    """The arguments of a call of the unpatched `twin`, row by row in plain Python.

    With `masked`, positions are counted over what the mask shows, as `generate` does.
    """
    tokens, places = encoded(case, inputs, text)
    embed, rows, image = twin.get_input_embeddings(), [], 0
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        mask = inputs["attention_mask"][row].tolist()
        own = [sum(mask[: column + 1]) - 1 if masked else column for column in range(len(ids))]
        made: list[tuple[Tensor, int, int, int, int]] = []
        column = 0
        while column < len(ids):
            if ids[column] != IMAGE:
                label = inputs["labels"][row, column].item() if "labels" in inputs else -100
                made.append((embed(torch.tensor(ids[column])), mask[column], own[column], label, ids[column]))
                column += 1
                continue
            for token, place in zip(tokens[image], places[image]):
                made.append((token, 1, own[column + place], -100, IMAGE))
            column, image = column + size_of(case), image + 1
        rows.append([entry for entry in made if entry[1]])
    length = max(map(len, rows))
    found: dict[str, list] = {"inputs_embeds": [], "attention_mask": [], "position_ids": [], "labels": []}
    for entries in rows:
        pads = length - len(entries)
        positions = [entry[2] for entry in entries]
        if renumber:
            positions = list(range(positions[-1] + 1 - len(entries), positions[-1] + 1))
        found["inputs_embeds"].append(torch.stack([embed(torch.tensor(PAD))] * pads + [entry[0] for entry in entries]))
        found["attention_mask"].append(torch.tensor([0] * pads + [1] * len(entries)))
        found["position_ids"].append(torch.tensor([0] * pads + [first + position for position in positions]))
        found["labels"].append(torch.tensor([-100] * pads + [entry[3] for entry in entries]))
    out = {key: torch.stack(value) for key, value in found.items()}
    case.extra["ids"] = [[entry[4] for entry in entries] for entries in rows]
    if "labels" not in inputs:
        del out["labels"]
    if "token_type_ids" in inputs:
        out["token_type_ids"] = torch.zeros_like(out["attention_mask"])
    return out


def patched(name: str, **options: Any):
    case = build(name)
    twin = copy.deepcopy(case.model)
    handle = patchselect.apply(case.model, RATE, **options)
    return case, twin, handle


def copy_of(case):
    twin = copy.deepcopy(case.model)
    patchselect.remove(twin)
    return twin


def first_of(name: str) -> int:
    return int(name == "paligemma")


def guided(case, text, method: str = "__call__", **inputs: Any):
    with patchselect.guide(case.model, text):
        return getattr(case.model, method)(**inputs)


def answers(case, text, inputs, **options: Any) -> torch.Tensor:
    found = guided(case, text, "generate", **inputs, **{**GREEDY, **options})
    return found[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else found


def compare(logits: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Where the mask shows something; what padding computes is nobody's business."""
    assert logits.shape == expected.shape
    shown = mask.bool()
    torch.testing.assert_close(logits[shown], expected[shown], rtol=1e-4, atol=1e-5)
