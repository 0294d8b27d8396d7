"""Language models with a shortened prompt compute what somebody computes who drops the placeholders by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hosts import build, texts
from hosts.of_prompts import IMAGE, PAD, prompts
from since import needs
from torch import Tensor

import patchselect

needs("encoded images", module=True)

NAMES = ("llava", "llava_siglip", "llava_full", "vipllava", "paligemma")
RATE = 0.5
each = pytest.mark.parametrize("name", NAMES)


def size_of(case) -> int:
    """How many placeholders an image has."""
    return 17 if getattr(case.model.config, "vision_feature_select_strategy", "") == "full" and case.prefix else 16


def inputs_of(case, rows=(2, 1, 0), words=(5, 9, 12), **more: Any) -> dict[str, Tensor]:
    found = prompts(rows, words, size_of(case), **more)
    if "PaliGemma" in type(case.model).__name__:
        found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    return found


def encoded(case, inputs, text=None) -> tuple[list[Tensor], list[list[int]]]:
    """The tokens of each image, and the places of its placeholders that they stand for, as lists."""
    handle = patchselect.handle_of(case.model)
    counts = (inputs["input_ids"] == IMAGE).sum(dim=1) // size_of(case)
    per_image = None if text is None else text.repeat_interleave(counts, dim=0)
    with handle.record() as trace:
        if per_image is None:
            found = case.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        else:
            with patchselect.guide(case.model, per_image):
                found = case.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    extra, places = size_of(case) - 16, []
    for kept in trace[-1].kept.tolist():
        kept = [*kept, *([-1] if trace[-1].fused else [])]
        free = [place for place in range(16) if place not in kept][-kept.count(-1) :] if -1 in kept else []
        places.append([*range(extra), *(extra + (free.pop(0) if place < 0 else place) for place in kept)])
    return list(found), places


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
    case = build_prompted(name)
    twin = copy.deepcopy(case.model)
    handle = patchselect.apply(case.model, RATE, **options)
    return case, twin, handle


def build_prompted(name: str):
    from hosts import HOSTS, of_prompts

    HOSTS.setdefault(name, getattr(of_prompts, name))
    try:
        return build(name)
    finally:
        if name not in ("llava", "vipllava", "paligemma"):
            del HOSTS[name]


def first_of(name: str) -> int:
    return int(name == "paligemma")


def guided(case, text, method: str = "__call__", **inputs: Any):
    with patchselect.guide(case.model, text):
        return getattr(case.model, method)(**inputs)


def compare(logits: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Where the mask shows something; what padding computes is nobody's business."""
    assert logits.shape == expected.shape
    shown = mask.bool()
    torch.testing.assert_close(logits[shown], expected[shown], rtol=1e-4, atol=1e-5)


@each
@torch.no_grad()
def test_logits_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for rows, words in (((2, 1, 0), (5, 9, 12)), ((1, 1, 1), (5, 9, 12)), ((1, 0, 2), (30, 40, 3))):
        inputs = inputs_of(case, rows, words)
        hand = by_hand(case, twin, inputs, text, first_of(name))
        found = guided(case, text, **inputs).logits
        assert found.shape[1] < inputs["input_ids"].shape[1]
        width = hand["attention_mask"].shape[1]  # padding that all rows keep
        compare(found[:, -width:], twin(**hand).logits, hand["attention_mask"])


@each
@torch.no_grad()
def test_answers_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text, inputs = texts(case, 3), inputs_of(case)
    hand = by_hand(case, twin, inputs, text, 0, masked=True)
    length, short = inputs["input_ids"].shape[1], hand["attention_mask"].shape[1]
    for options in (dict(num_beams=1), dict(num_beams=2), dict(num_beams=2, num_return_sequences=2)):
        options.update(do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=PAD)
        found = guided(case, text, "generate", **inputs, **options)
        expected = twin.generate(**(hand if name != "paligemma" else with_ids(case, hand, inputs, text)), **options)
        expected = expected[:, -20:]
        copies = options.get("num_return_sequences", 1)
        assert torch.equal(found[:, :length], inputs["input_ids"].repeat_interleave(copies, dim=0))
        assert torch.equal(found[:, length:], expected)
    ids = greedy(twin, hand, 20, first_of(name))
    alone = guided(case, text, "generate", **inputs, **{**options, "num_beams": 1, "num_return_sequences": 1})
    assert torch.equal(alone[:, length:], ids)
    assert short < length


def with_ids(case, hand: dict[str, Tensor], inputs, text) -> dict[str, Any]:
    """The same call by the ids of a prompt and encoded images, for a host that generates from nothing else."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    width = hand["attention_mask"].shape[1]
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in case.extra["ids"]])
    tokens = torch.stack(encoded(case, inputs, text)[0])
    rest = {key: value for key, value in hand.items() if key != "inputs_embeds"}
    return {**rest, "input_ids": ids, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}


def greedy(twin, hand: dict[str, Tensor], steps: int, first: int) -> Tensor:
    """Answer without a cache: the whole sequence in each step."""
    given, ids = dict(hand), []
    given["position_ids"] = given["position_ids"] + first
    for _ in range(steps):
        logits = twin(**given, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens
        ids.append(logits.argmax(dim=-1, keepdim=True))
        given["inputs_embeds"] = torch.cat([given["inputs_embeds"], twin.get_input_embeddings()(ids[-1])], dim=1)
        for name, value in (("attention_mask", 1), ("token_type_ids", 1)):
            if name in given:
                given[name] = torch.cat([given[name], torch.full_like(given[name][:, :1], value)], dim=1)
        given["position_ids"] = torch.cat([given["position_ids"], given["position_ids"][:, -1:] + 1], dim=1)
    return torch.cat(ids, dim=1)


@each
def test_a_training_step_is_that_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for side in ("left", "right"):
        inputs = inputs_of(case, (1, 1, 1), (5, 9, 12), side=side)
        labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
        labels[torch.arange(3), inputs["attention_mask"].argmax(dim=1)] = -100  # nothing stands before it
        inputs["labels"] = labels
        case.model.train()
        case.model.zero_grad()
        loss = guided(case, text, **inputs).loss
        loss.backward()
        with torch.no_grad():
            expected = loss_by_hand(case, twin, inputs, text, first_of(name))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
        core = case.model.model
        for part in (core.vision_tower, core.multi_modal_projector, core.language_model):
            assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in part.parameters())


def loss_by_hand(case, twin, inputs, text, first: int) -> Tensor:
    """Mean cross-entropy over all words, each row called alone and without padding."""
    total, count = torch.zeros(()), 0
    for row in range(len(inputs["input_ids"])):
        shown = inputs["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, shown] for key, value in inputs.items() if value.dim() == 2}
        alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
        start = int(shown.nonzero()[0])
        hand = by_hand(case, twin, alone, text[row : row + 1], first + start)
        hand.pop("labels")
        labels = torch.tensor(case.extra["ids"][0])
        logits = twin(**hand).logits[0, :-1]
        wanted = labels[1:] != IMAGE
        total = total + torch.nn.functional.cross_entropy(logits[wanted], labels[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count
