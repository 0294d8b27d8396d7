"""Hosts that pack images into one sequence (Qwen-VL), and their tower and prompt computed by hand, square by square."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from hosts import build
from hosts.of_prompts import IMAGE, PAD, is_old
from torch import Tensor

import patchselect

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
