"""Hosts that pack images into one sequence (Qwen-VL) against a computation by hand: tower, prompt, answers, loss."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from answers import answers_by_hand
from hosts import build, take, texts
from hosts.of_prompts import IMAGE, PAD, is_old, packed_prompts, read
from since import needs
from torch import Tensor

import patchselect

needs("short prompts", module=True)

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
each = pytest.mark.parametrize("name", NAMES)
LAYERS, RATE = (1, 4), 0.5
GRIDS, WORDS = [[(6, 8), (4, 12)], [(6, 8)], []], [6, 9, 12]


def select_by_hand(module: Any, block: Any, hidden: Tensor, attended: Tensor, turns, text: Tensor | None, rate: float):
    """Return the squares that stay and the tokens after a selection: the layer's own attention, asked by the text."""
    visual = importlib.import_module(type(module).__module__)
    normed, heads = block.norm1(hidden), block.attn.num_heads
    _, keys, _ = block.attn.qkv(normed).unflatten(-1, (3, heads, -1)).unbind(1)
    guide = normed.mean(dim=0) if text is None else block.norm1(text)
    query = block.attn.qkv(guide).unflatten(-1, (3, heads, -1))[0]
    turned = visual.apply_rotary_pos_emb_vision(keys, keys, *turns)[0]
    weights = torch.zeros(len(hidden))
    for head in range(heads):
        weights += (turned[:, head] @ query[head] * block.attn.scaling).softmax(dim=0) / heads
    squares = weights.view(-1, 4).sum(dim=1)
    count = math.ceil(math.ceil(rate * len(hidden)) / 4)
    best = sorted(squares.argsort(descending=True)[:count].tolist())
    rest = [square for square in range(len(squares)) if square not in best]
    if len(rest) <= 1:
        return list(range(len(squares))), attended
    groups = attended.view(len(squares), 4, -1)
    fused = sum(squares[index] * groups[index] for index in rest) / squares[rest].sum()
    return [*best, None], torch.cat([groups[best].flatten(0, 1), fused])


def pieces_by_hand(twin, index: int, squares: list[int | None], ends: dict[int, list[int]]) -> list[int]:
    """Return the ends of what attends to itself alone in block `index`: of windows, what is left of each."""
    if index in getattr(twin.model.visual, "fullatt_block_indexes", range(99)):
        return [0, 4 * len(squares)]
    own = [99 if square is None else sum(4 * square >= end for end in ends[index]) for square in squares]
    changes = [4 * place for place in range(1, len(own)) if own[place] != own[place - 1]]
    return [0, *changes, 4 * len(own)]


def tower_by_hand(twin, pixels: Tensor, grid: Tensor, text: Tensor | None, layers=LAYERS, rate: float = RATE):
    """Encode one image; return its merged tokens, layers read before the end, and the squares that they are."""
    visual, calls = twin.model.visual, []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
        for block in visual.blocks
    ]
    visual(pixels, grid[None])
    for hook in hooks:
        hook.remove()
    hidden, tables = calls[0][0], calls[0][1]["position_embeddings"]
    ends = {index: kwargs["cu_seqlens"].tolist() for index, (_, kwargs) in enumerate(calls)}
    height, width = int(grid[1]) // 2, int(grid[2]) // 2
    squares: list[int | None] = list(range(height * width))
    members = {square: [square] for square in squares}
    deep: list[list[Tensor]] = []
    for index, block in enumerate(visual.blocks):
        places = [None if square is None else 4 * square + i for square in squares for i in range(4)]
        turns = [
            torch.stack([torch.full_like(table[0], value) if place is None else table[place] for place in places])
            for table, value in zip(tables, (1.0, 0.0))
        ]
        cut = torch.tensor(pieces_by_hand(twin, index, squares, ends), dtype=torch.int32)
        attended = hidden + block.attn(block.norm1(hidden), cu_seqlens=cut, position_embeddings=turns)
        if index in layers:
            stay, attended = select_by_hand(visual, block, hidden, attended, turns, text, rate)
            gone = [position for position in range(len(squares)) if position not in stay]
            kept = [position for position in stay if position is not None]
            fused = [member for position in gone for member in members[position]]
            held = [members[position] for position in kept] + ([fused] if None in stay else [])
            squares = [None if position is None else squares[position] for position in stay]
            members = dict(enumerate(held))
        hidden = attended + block.mlp(block.norm2(attended))
        if index in getattr(visual, "deepstack_visual_indexes", ()):
            merger = visual.deepstack_merger_list[len(deep)]
            made = merger(hidden)
            deep.append(
                [made[next(p for p, own in members.items() if square in own)] for square in range(height * width)]
            )
    merged = visual.merger(hidden)
    where = torch.arange(height * width)  # the square in the image of each square of the tower
    if hasattr(visual, "window_size"):
        where = window_index(visual, grid[None])
    found = [None if square is None else int(where[square]) for square in squares]
    order = sorted(range(len(found)), key=lambda position: (found[position] is None, found[position] or 0))
    layers_read = [torch.stack([torch.stack([of[member] for member in members[p]]).mean(dim=0) for p in order])
                   for of in deep]  # fmt: skip
    return merged[order], layers_read, [found[position] for position in order]


def window_index(visual, grids: Tensor) -> Tensor:
    """Return the square in the image of each square of the tower."""
    if is_old():
        return visual.get_window_index(grids)[0]
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)[0]


def prompt_by_hand(twin, inputs: dict[str, Tensor], text: Tensor | None) -> dict[str, Any]:
    """Return a call of the unpatched language model with placeholders dropped, row by row, in plain Python.

    `embeds` `(B, L, D)` and `deep` `[(B, L, D)]`, what layers of the language model read beside.
    """
    ids, mask, grids = inputs["input_ids"], inputs["attention_mask"], inputs["image_grid_thw"]
    kinds = {name: value for name, value in inputs.items() if name == "mm_token_type_ids"}
    whole, _ = twin.model.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask, **kinds)
    pixels = inputs["pixel_values"].split(grids.prod(dim=1).tolist())
    tokens, deep, rows, image = [], [], [], 0
    for row in range(len(ids)):
        made, column = [], 0
        while column < ids.shape[1]:
            if ids[row, column] != IMAGE:
                if mask[row, column]:
                    made.append((int(ids[row, column]), whole[:, row, column].tolist()))
                column += 1
                continue
            size = int(grids[image].prod()) // 4
            own = None if text is None else text[row]
            features, read, squares = tower_by_hand(twin, pixels[image], grids[image], own)
            free = [place for place in range(size) if place not in squares][-squares.count(None) or size :]
            places = [free.pop(0) if square is None else square for square in squares]
            made += [(IMAGE, whole[:, row, column + place].tolist()) for place in places]
            tokens.append(features)
            deep.append(read)
            column, image = column + size, image + 1
        rows.append(made)
    length = max(map(len, rows))
    short = torch.full((len(rows), length), PAD)
    seen, positions = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(3, len(rows), length).long()
    for row, made in enumerate(rows):
        short[row, length - len(made) :] = torch.tensor([token for token, _ in made])
        positions[:, row, length - len(made) :] = torch.tensor([position for _, position in made]).T
        seen[row, length - len(made) :] = 1
    images, words = (short == IMAGE).unsqueeze(-1), twin.get_input_embeddings()(short)
    layers = [torch.zeros_like(words).masked_scatter(images, torch.cat(layer)) for layer in zip(*deep)]
    return {
        "input_ids": short,
        "attention_mask": seen,
        "position_ids": positions,
        "embeds": words.masked_scatter(images, torch.cat(tokens)),
        "deep": layers,
    }


def logits_by_hand(twin, hand: dict[str, Any], ids: Tensor | None = None) -> Tensor:
    """Return the logits of short prompts, with answers `(B * beams, t)` behind them."""
    rows, length = hand["input_ids"].shape
    ids = torch.zeros(rows, 0, dtype=torch.long) if ids is None else ids
    copies = len(ids) // rows

    def longer(prompts: Tensor, more: Tensor, rows_at: int = 0) -> Tensor:
        return torch.cat([prompts.repeat_interleave(copies, dim=rows_at), more], dim=rows_at + 1)

    images = longer(hand["input_ids"] == IMAGE, torch.zeros_like(ids, dtype=torch.bool))
    own = hand["position_ids"].repeat_interleave(copies, dim=1)[..., -1:]
    beside = {}
    if hand["deep"]:
        read = [layer.repeat_interleave(copies, dim=0)[images[:, :length]] for layer in hand["deep"]]
        beside = {"visual_pos_masks": images, "deepstack_visual_embeds": read}
    hidden = twin.model.language_model(
        inputs_embeds=longer(hand["embeds"], twin.get_input_embeddings()(ids)),
        attention_mask=longer(hand["attention_mask"], torch.ones_like(ids)),
        position_ids=longer(hand["position_ids"], own + 1 + torch.arange(ids.shape[1]), 1),
        use_cache=False, **beside,
    ).last_hidden_state  # fmt: skip
    return twin.lm_head(hidden)


def patched(name: str, **options: Any):
    case = build(name)
    twin = copy.deepcopy(case.model)
    return case, twin, patchselect.apply(case.model, RATE, **{"layers": list(LAYERS), **options})


def guided(case, text: Tensor | None, method: str = "__call__", **inputs: Any):
    if text is None:
        return getattr(case.model, method)(**inputs)
    with patchselect.guide(case.model, text):
        return getattr(case.model, method)(**inputs)


@each
@torch.no_grad()
def test_logits_are_those_of_dropping_by_hand(name):
    for guidance in ("text", "image"):
        case, twin, _ = patched(name, guidance=guidance)
        text = texts(case, 3) if guidance == "text" else None
        for grids, words in (
            (GRIDS, WORDS),
            *([([[], [(2, 2)], [(8, 4)]], [3, 3, 4]), ([[(4, 4)]] * 3, [5, 5, 5])] if text is not None else ()),
        ):
            inputs = packed_prompts(grids, words)
            hand = prompt_by_hand(twin, inputs, text)
            found, expected = guided(case, text, **inputs).logits, logits_by_hand(twin, hand)
            seen = hand["attention_mask"].bool()
            found = found[:, -seen.shape[1] :]  # padding that all rows keep
            largest = float(expected[seen].abs().max())
            torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-5 * largest)


@each
@torch.no_grad()
def test_answers_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text, inputs = texts(case, 3), packed_prompts(GRIDS, WORDS)
    hand = prompt_by_hand(twin, inputs, text)
    never = (2, IMAGE - 1, IMAGE)  # min_new_tokens, suppress_tokens

    def expected(beams: int) -> Tensor:
        return answers_by_hand(lambda ids: logits_by_hand(twin, hand, ids)[:, -1], 3, 20, beams, never)

    answer = expected(1)
    options: dict[str, Any] = dict(
        do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=PAD, suppress_tokens=[IMAGE - 1, IMAGE]
    )
    whole = inputs["input_ids"].shape[1]
    for more in ({}, {"prefill_chunk_size": 5}, {"use_cache": False}):
        found = guided(case, text, "generate", **inputs, **options, **more)
        assert torch.equal(found[:, :whole], inputs["input_ids"])
        assert torch.equal(found[:, whole:], answer), more
    answer = expected(2)
    for copies in (1, 2):
        found = guided(case, text, "generate", **inputs, **options, num_beams=2, num_return_sequences=copies)
        assert torch.equal(found[:, whole:], answer.unflatten(0, (3, 2))[:, :copies].flatten(0, 1))


@each
@torch.no_grad()
def test_loops_of_ones_own_go_on_from_the_short_cache(name):
    case, _, _ = patched(name)
    text, inputs = texts(case, 3), packed_prompts([[(6, 8)], [(6, 8)], [(6, 8)]], [5, 5, 5])
    more = torch.randint(3, 90, (3, 3), generator=torch.Generator().manual_seed(1))
    other = packed_prompts([[(4, 4)]], [4])
    longer = with_words(inputs, more)
    expected = guided(case, text, **longer).logits[:, -3:]
    for mask in (None, longer["attention_mask"]):
        cache = guided(case, text, **inputs, use_cache=True).past_key_values
        guided(case, text[:1], **other)  # the model remembers the positions of another prompt now
        found = case.model(input_ids=more, past_key_values=cache, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for prompt in (inputs, *([packed_prompts(GRIDS, WORDS)] if is_old() else [])):  # by what the model remembers
        short = guided_short(case, text, prompt)
        cache = case.model(**short, use_cache=True).past_key_values
        given, place = {}, cache.get_seq_length()
        if is_old():  # which counts from columns, and takes a mask with padding
            given["cache_position"] = torch.arange(place, place + 3)
            given["attention_mask"] = torch.cat([short["attention_mask"], torch.ones_like(more)], dim=1)
        found = case.model(input_ids=more, past_key_values=cache, **given).logits
        expected = guided(case, text, **with_words(prompt, more)).logits[:, -3:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    short = guided_short(case, text, inputs, generate=True)
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    tail = guided(case, text, "generate", **inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(case.model.generate(**short, **options)[:, short["input_ids"].shape[1] :], tail)


def with_words(inputs: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """Return a call with more words `(B, t)` at the end of each prompt."""
    tails = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
    longer = {key: torch.cat([inputs[key], tail], dim=1) for key, tail in tails.items() if key in inputs}
    return {**inputs, **longer}


def guided_short(case, text, inputs, **options: Any) -> dict[str, Any]:
    with patchselect.guide(case.model, text):
        return patchselect.shorten(case.model, **options, **inputs)


@each
@torch.no_grad()
def test_nothing_kept_back_and_nothing_left_behind(name):
    case = build(name)
    inputs, text = packed_prompts(GRIDS, WORDS), texts(case, 3)
    expected, answer = case.model(**inputs).logits, case.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    handle = patchselect.apply(case.model, 1.0)
    for _ in range(2):
        with handle.record() as trace:
            assert torch.equal(guided(case, text, **inputs).logits, expected)
        assert trace[0].images is not None and [entry.grid for entry in trace[0].images] == [(6, 8), (4, 12), (6, 8)]
        assert torch.equal(guided(case, text, "generate", **inputs, max_new_tokens=5, do_sample=False), answer)
    handle = patchselect.apply(case.model, RATE)
    guided(case, text, **inputs)
    handle.remove()
    assert torch.equal(case.model(**inputs).logits, expected)
    assert not any("patchselect" in key for part in case.model.modules() for key in vars(part))


@each
def test_a_training_step_is_that_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for side, checkpointed in (("left", False), ("right", False), ("left", True)):
        inputs = packed_prompts(GRIDS, WORDS, side)
        labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
        labels[torch.arange(3), inputs["attention_mask"].argmax(dim=1)] = -100  # nothing stands before it
        case.model.train()
        case.model.zero_grad()
        if checkpointed:
            case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = guided(case, text, **inputs, labels=labels).loss
        loss.backward()
        hand = prompt_by_hand(twin, inputs, text)
        logits = logits_by_hand(twin, hand)[:, :-1]
        wanted = hand["input_ids"].masked_fill((hand["input_ids"] == IMAGE) | (hand["attention_mask"] == 0), -100)[
            :, 1:
        ]
        wanted = wanted.masked_fill(hand["attention_mask"][:, :-1] == 0, -100)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
        twin.zero_grad()
        expected.backward()
        for (path, weight), own in zip(case.model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(weight.grad, own.grad, rtol=1e-3, atol=1e-5, msg=path)


@each
@torch.no_grad()
def test_images_are_selected_from_each_alone(name):
    case, _, handle = patched(name)
    images, text = case.images(4), texts(case, 4)

    def rows(order) -> Tensor:
        with patchselect.guide(case.model, text[order]):
            return case.image_side(case.model, take(images, order))

    with handle.record() as trace:
        whole, order = rows(torch.arange(4)), torch.tensor([2, 0, 3, 1])
    assert [entry.grid for entry in trace] == [case.grid] * 2
    for entry in trace:
        for kept in entry.kept.tolist():
            squares = [kept[start : start + 4] for start in range(0, len(kept), 4)]
            assert all(s[0] < 0 or s == [s[0], s[0] + 1, s[0] + 8, s[0] + 9] for s in squares), "whole squares"
    torch.testing.assert_close(rows(order), whole[order], rtol=1e-4, atol=1e-5)
    for row in range(4):
        torch.testing.assert_close(rows(torch.tensor([row])), whole[row : row + 1], rtol=1e-4, atol=1e-5)
    with patchselect.guide(case.model, text):
        tokens, merged = states_of(case, images["pixel_values"].flatten(0, 1), images["image_grid_thw"])
    dense = patchselect.restore(tokens, trace, fill=float("nan"))
    for row, kept in enumerate(trace[-1].kept.tolist()):
        own = tokens.view(4, -1, 48)[row]
        for token, place in zip(own, kept):
            assert place < 0 or torch.equal(dense[row].flatten(0, 1)[place], token)
        assert int(dense[row].isnan().all(dim=-1).sum()) == 48 - sum(place >= 0 for place in kept)
    assert len(tokens) == 4 * len(merged) == 4 * trace[-1].num_tokens


def states_of(case, pixels: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of the last block of a tower, and what its merger makes of them."""
    visual, seen = case.model.model.visual, []
    hook = visual.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    found = visual(pixels, grids)
    hook.remove()
    if not is_old():
        assert torch.equal(found.last_hidden_state, seen[0])
    return seen[0], found if isinstance(found, Tensor) else read(found)


@torch.no_grad()
def test_restoring_and_compiling():
    case, _, handle = patched("qwen2_vl", guidance="image")
    inputs = packed_prompts(GRIDS, WORDS)
    with handle.record() as trace:
        expected = case.model(**inputs).logits
        tokens, _ = states_of(case, inputs["pixel_values"], inputs["image_grid_thw"])
    dense = patchselect.restore(tokens, trace)
    assert [tuple(image.shape) for image in dense] == [(6, 8, 48), (4, 12, 48), (6, 8, 48)]
    place = int(trace.of_image(1)[-1].kept[0, 0])
    assert torch.equal(dense[1].flatten(0, 1)[place], tokens[trace.of_image(0)[-1].num_tokens])
    case.model.model.visual.compile(backend="eager")  # which runs as it is: lengths are data
    assert torch.equal(case.model(**inputs).logits, expected)


@each
@torch.no_grad()
def test_a_budget_is_that_of_the_flop_counter(name):
    from torch.utils.flop_counter import FlopCounterMode

    case = build(name)
    case.model.set_attn_implementation("eager")  # sdpa on CPU is not counted
    images, flops = case.images(1), []
    with pytest.raises(ValueError, match="image_size"):
        patchselect.keep_rate_for_budget(case.model, 0.6)
    rate = patchselect.keep_rate_for_budget(case.model, 0.7, layers=[2], image_size=(48, 64))
    for chosen in (1.0, rate):
        patchselect.apply(case.model, chosen, layers=[2], guidance="image")
        with FlopCounterMode(display=False) as counter:
            case.model.model.visual(images["pixel_values"][0], images["image_grid_thw"])
        counts = counter.get_flop_counts()
        flops.append(
            counter.get_total_flops() - sum(sum(of.values()) for path, of in counts.items() if path.endswith(".merger"))
        )
    assert 0.6 < flops[1] / flops[0] < 0.72
    words = patchselect.keep_rate_for_budget(case.model, 0.7, layers=[2], image_size=(48, 64), words=20)
    assert words != rate


@each
def test_refusals(name):
    case = build(name)
    inputs = packed_prompts([[(4, 4)], [(4, 4)]], [4, 4])
    for message, options in (
        ("leave merge and sizes out", dict(merge=0.5)),
        ("a position is a place in the image", dict(positions="renumbered")),
    ):
        with pytest.raises(ValueError, match=message):
            patchselect.apply(case.model, RATE, guidance="image", **options)
    handle = patchselect.apply(case.model, RATE, guidance="image")
    video = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": torch.tensor([[2, 4, 4]])}
    for given in (video, {**inputs, **video}):
        with pytest.raises(ValueError, match="got a video"):
            case.model(**{**{key: inputs[key] for key in inputs if key in ("input_ids", "mm_token_type_ids")}, **given})
    with pytest.raises(ValueError, match="what the processor returns"):
        case.model(**{**inputs, "image_grid_thw": inputs["image_grid_thw"][:1]})
    with pytest.raises(ValueError, match="row 0 of the prompts"):
        wrong = packed_prompts([[(4, 6)], [(4, 2)]], [4, 4])
        case.model(**{**wrong, "image_grid_thw": inputs["image_grid_thw"]})
    handle = patchselect.apply(case.model, RATE)
    with pytest.raises(ValueError, match="repeat the images"), patchselect.guide(case.model, texts(case, 2), "all"):
        case.model(**inputs)
    with pytest.raises(ValueError, match="not its blocks"), patchselect.guide(case.model, texts(case, 2)):
        handle.towers[0].blocks[1](
            torch.randn(8, 48),
            cu_seqlens=torch.tensor([0, 8]),
            position_embeddings=(torch.ones(8, 12), torch.zeros(8, 12)),
        )
