"""Language models with a shortened prompt compute what somebody computes who drops the placeholders by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from answers import answers_by_hand, extended
from hosts import build, texts
from hosts.of_prompts import IMAGE, PAD, prompts, read
from since import needs
from torch import Tensor

import patchselect

needs("short prompts", module=True)

SQUARES = ("smolvlm", "idefics3", "internvl")
NAMES = ("llava", "llava_siglip", "llava_full", "vipllava", "paligemma", *SQUARES)
RATE = 0.5
each = pytest.mark.parametrize("name", NAMES)


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
    for rows, words in (((2, 1, 0), (5, 9, 12)), ((1, 1, 1), (5, 9, 12)), ((1, 0, 2), (30, 20, 3))):
        inputs = inputs_of(case, rows, words)
        hand = by_hand(case, twin, inputs, text, first_of(name))
        found = guided(case, text, **inputs).logits
        assert found.shape[1] < inputs["input_ids"].shape[1]
        width = hand["attention_mask"].shape[1]  # padding that all rows keep
        compare(found[:, -width:], twin(**hand).logits, hand["attention_mask"])


@pytest.mark.parametrize(("merge", "fusion"), [(0.5, "mean"), (0.0, "none"), (0.0, "sum")])
@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma"])
@torch.no_grad()
def test_other_ways_of_shortening_the_tower(name, merge, fusion):
    case, twin, handle = patched(name, merge=merge, fusion=fusion, layers=[2])
    text, inputs = texts(case, 3), inputs_of(case)
    hand = by_hand(case, twin, inputs, text, first_of(name))
    compare(guided(case, text, **inputs).logits, twin(**hand).logits, hand["attention_mask"])
    assert handle.plan.merge == merge


@each
@torch.no_grad()
def test_answers_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text, inputs = texts(case, 3), inputs_of(case)
    hand = by_hand(case, twin, inputs, text, 0, masked=True)
    length, short = inputs["input_ids"].shape[1], hand["attention_mask"].shape[1]

    def next_logits(ids: Tensor) -> Tensor:
        return twin(**extended(twin, hand, ids, first_of(name)), use_cache=False).logits[:, -1]

    for beams, copies in ((1, 1), (2, 1), (2, 2)):
        options: dict[str, Any] = dict(do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=PAD)
        options.update(num_beams=beams, num_return_sequences=copies)
        found = guided(case, text, "generate", **inputs, **options)
        expected = answers_by_hand(next_logits, 3, 20, beams).unflatten(0, (3, beams))[:, :copies].flatten(0, 1)
        assert torch.equal(found[:, :length], inputs["input_ids"].repeat_interleave(copies, dim=0))
        assert torch.equal(found[:, length:], expected)
    assert short < length


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
        for part in case.model.model.children():  # tower, projector, language model
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


@pytest.mark.parametrize("name", SQUARES)
@torch.no_grad()
def test_squares_are_joined_as_in_the_whole_image(name):
    """Put the squares that stay where they were, nothing elsewhere: the host makes the same tokens of them there."""
    for layers, rate in (([1], 0.5), ([1, 4], 0.5), ([2], 0.1)):
        case = build(name)
        twin = copy.deepcopy(case.model)
        handle = patchselect.apply(case.model, rate, layers=layers, guidance="image")
        pixels, seen = case.images(2), []
        blocks = handle.towers[0].blocks
        hook = blocks[-1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        with handle.record() as trace:
            found = read(case.model.get_image_features(pixel_values=pixels))
        hook.remove()
        tokens, prefix, kept = torch.as_tensor(seen[0]), case.prefix, trace[-1].kept
        assert tokens.shape[1] == trace[-1].num_tokens and (tokens.shape[1] - prefix) % 4 == 0
        found = torch.cat([each.reshape(-1, each.shape[-1]) for each in found]).unflatten(0, (2, -1))
        whole = torch.zeros(2, prefix + 36, tokens.shape[-1])
        whole[:, :prefix] = tokens[:, :prefix]
        for image in range(2):
            for place, token in zip(kept[image].tolist(), tokens[image, prefix:]):
                if place >= 0:
                    whole[image, prefix + place] = token
        last = patchselect.wiring.towers.find_towers(twin)[0].blocks[-1]
        last.register_forward_hook(lambda module, args, out, whole=whole: whole)
        joined = read(twin.get_image_features(pixel_values=pixels))
        joined = torch.cat([each.reshape(-1, each.shape[-1]) for each in joined]).unflatten(0, (2, -1))
        for image in range(2):
            squares = [square(place, 2, 6) if place >= 0 else -1 for place in kept[image, ::4].tolist()]
            groups = kept[image].view(-1, 4).tolist()
            assert all(g[0] < 0 or [g[0], g[0] + 1, g[0] + 6, g[0] + 7] == g for g in groups), "whole squares"
            for place, token in zip(squares, found[image]):
                if place >= 0:
                    torch.testing.assert_close(token, joined[image, place], rtol=1e-4, atol=1e-5)
        if len(layers) == 1:  # the fused square: the mean of the others, place by place
            weights = trace[0].relevance
            assert found.shape[1] == -(-int(trace[0].kept.shape[1]) // 4) + 1 and weights.shape == (2, 36)
        patchselect.remove(case.model)


@pytest.mark.parametrize("name", SQUARES)
@torch.no_grad()
def test_a_rate_that_leaves_every_square_changes_nothing(name):
    case = build(name)
    expected = read(case.model.get_image_features(pixel_values=case.images(2)))
    for rate in (0.9, 0.8):  # nine squares; eight, and the ninth alone
        patchselect.apply(case.model, rate, layers=[1], guidance="image")
        found = read(case.model.get_image_features(pixel_values=case.images(2)))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", SQUARES)
def test_squares_stay_whole_with_their_own_terms(name):
    case = build(name)
    before = [type(part) for part in case.model.modules()]
    for message, options in (
        ("leave merge and sizes out", dict(merge=0.5)),
        ("leave merge and sizes out", dict(sizes=True)),
    ):
        with pytest.raises(ValueError, match=message):
            patchselect.apply(case.model, 0.5, guidance="image", **options)
    assert [type(part) for part in case.model.modules()] == before
    for fusion in ("mean", "sum", "none"):
        handle = patchselect.apply(case.model, 0.5, layers=[1], fusion=fusion, guidance="image")
        assert handle.fusion == fusion
        with torch.no_grad(), handle.record() as trace:
            case.model.get_image_features(pixel_values=case.images(2))
        assert trace[0].num_tokens == case.prefix + 4 * (5 + (fusion != "none"))
    rate = patchselect.keep_rate_for_budget(case.model, 0.8)
    assert 0 < rate < 1


def test_a_grouped_fusion_is_the_weighted_mean_of_squares():
    from patchselect.reduction import Fuse, Places
    from patchselect.reduction.groups import Grouped

    torch.manual_seed(0)
    tokens, weights = torch.randn(2, 1 + 36, 5, dtype=torch.float64), torch.rand(2, 36, dtype=torch.float64)
    places = Places(torch.arange(36).expand(2, -1), (6, 6))
    found = Grouped(Fuse("mean"), 2).reduce(tokens, weights, 10, 1, places)
    for row in range(2):
        squares = [[(r + i) * 6 + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2, 4) for c in (0, 2, 4)]
        score = [sum(weights[row, place].item() for place in places) for places in squares]
        best = sorted(sorted(range(9), key=lambda index: -score[index])[:3])
        rest = [index for index in range(9) if index not in best]
        wanted = [tokens[row, 0]] + [tokens[row, 1 + place] for index in best for place in squares[index]]
        for within in range(4):
            total = sum(score[index] * tokens[row, 1 + squares[index][within]] for index in rest)
            wanted.append(total / sum(score[index] for index in rest))
        torch.testing.assert_close(found.tokens[row], torch.stack(wanted))
        assert found.kept[row].tolist() == [place for index in best for place in squares[index]]
        for index in range(9):
            for within, place in enumerate(squares[index]):
                target = 1 + 4 * (best.index(index) if index in best else 3) + within
                assert found.into[row, 1 + place] == target
    every = Grouped(Fuse("mean"), 2).reduce(tokens, weights.unsqueeze(1).expand(-1, 3, -1), 10, 1, places)
    assert torch.equal(every.tokens, found.tokens.repeat_interleave(3, dim=0))
    assert Grouped(Fuse("mean"), 2).num_fused(36, 10) == 16 - 10
