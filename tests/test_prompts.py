"""Columns of prompts against a slow and obvious count, and what hangs on prompts: text sides, records, budgets."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hosts import build, texts
from hosts.of_prompts import prompts, read
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts_by_hand import inputs_of
from since import needs

import patchselect
from patchselect.prompts.columns import Cut, offsets_of, rows_of_images, shortened
from patchselect.prompts.layers import check_read, last_read

TOKEN = 7


@st.composite
def batches(draw):
    """Rows of words and images, padded on one side; which placeholders stay, per image."""
    sizes, offsets, rows = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        row = [1] * draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 5))
            stays = draw(st.permutations(range(size)))[: draw(st.integers(1, size))]
            sizes.append(size)
            offsets.append(list(stays))
            row += [TOKEN] * size + [1] * draw(st.integers(0, 2))
        rows.append([*row, 1])
    return rows, sizes, offsets, draw(st.sampled_from(["left", "right"]))


@settings(deadline=None, max_examples=200)
@given(batches())
def test_columns_and_positions_are_those_of_a_slow_count(batch):
    rows, sizes, offsets, side = batch
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)])
    mask, holders = (ids != 0).to(torch.long), ids == TOKEN
    assert rows_of_images(holders.sum(1).tolist(), sizes) == [
        r for r, row in enumerate(rows) for _ in _images(row, sizes, r, rows)
    ]
    positions = torch.arange(length).expand(len(rows), -1)
    stay = shortened(holders, sizes, [torch.tensor(each) for each in offsets], positions)
    cut = Cut.of(stay.columns, mask)
    new_mask, found = cut(mask), cut.last(stay.positions)
    image = 0
    for row in range(len(rows)):
        wanted, column = [], 0
        while column < length:
            if ids[row, column] == TOKEN:
                wanted += [column + offset for offset in offsets[image]]
                column, image = column + sizes[image], image + 1
            else:
                wanted += [column] if ids[row, column] else []
                column += 1
        assert found[row][new_mask[row].bool()].tolist() == wanted
        shown = new_mask[row].nonzero().flatten()
        assert len(shown) == 1 + int(shown[-1] - shown[0]), "padding stays on one side"
    assert cut(ids).shape == new_mask.shape
    anew = cut.last(shortened(holders, sizes, [torch.tensor(o) for o in offsets], positions, renumber=True).positions)
    for row in range(len(rows)):
        assert (anew[row][new_mask[row].bool()].diff() == 1).all()


def _images(row, sizes, index, rows):
    """The images of a row, by counting placeholders."""
    before = sum(each.count(TOKEN) for each in rows[:index])
    bounds = [sum(sizes[:i]) for i in range(len(sizes))]
    return [i for i, bound in enumerate(bounds) if before <= bound < before + row.count(TOKEN)]


def test_a_fused_token_gets_the_last_free_place():
    sources = torch.tensor([[0, 3, -1], [2, 3, -1], [-1, 1, -1]])
    assert offsets_of(sources, 4, 0).tolist() == [[0, 3, 2], [2, 3, 1], [2, 1, 3]]
    assert offsets_of(sources, 5, 1).tolist() == [[0, 1, 4, 3], [0, 3, 4, 2], [0, 3, 2, 4]]


def test_the_last_block_that_is_read():
    assert [last_read(24, -2), last_read(24, [-2, -5, 6]), last_read(24, -1), last_read(24, 24)] == [22, 22, 23, 23]
    check_read((9, 19), 24, -2)
    with pytest.raises(ValueError, match=r"select in block 23.*after block 22 \(vision_feature_layer=-2\)"):
        check_read((9, 23), 24, -2)


@pytest.mark.parametrize("relevance", ["keys", "values", "joint", "features"])
@torch.no_grad()
def test_a_text_side_reads_texts_as_its_own_tower_does(relevance):
    """The tower of LLaVA is that of the CLIP, so that CLIP and LLaVA keep the same patches for a text."""
    needs("short prompts")
    clip, case = build("clip"), build("llava")
    tower = case.tower(case.model)
    tower.load_state_dict(clip.model.vision_model.state_dict())
    plain = patchselect.apply(copy.deepcopy(clip.model), 0.5, layers=[1, 3], relevance=relevance)
    before = set(case.model.state_dict())
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3], relevance=relevance, text_side=clip.model)
    assert set(case.model.state_dict()) == before and clip.model not in list(case.model.modules())
    text, inputs = texts(clip, 3), prompts((1, 1, 1), (4, 6, 8))
    with plain.record() as expected, patchselect.guide(plain.model, text):
        plain.model.get_image_features(inputs["pixel_values"])
    with handle.record() as trace, patchselect.guide(case.model, text):
        case.model(**inputs)
    assert [entry.kept.tolist() for entry in trace] == [entry.kept.tolist() for entry in expected]
    twin = copy.deepcopy(case.model)
    assert patchselect.handle_of(twin).towers[0].text_side.module is clip.model.vision_model, "shared, not copied"
    assert patchselect.handle_of(twin).towers[0].module is case.tower(twin)
    with pytest.raises(ValueError, match=r"\(texts, 24\)"):
        patchselect.guide(case.model, texts(case, 3))
    patchselect.remove(case.model)
    assert not hasattr(clip.model, "_patchselect")


def test_a_text_side_that_does_not_fit_is_refused():
    needs("short prompts")
    case, clip, siglip = build("llava"), build("clip").model, build("siglip").model
    assert patchselect.apply(build("paligemma").model, text_side=siglip).towers[0].text_width() == 48
    for error, message, side in (
        (TypeError, "must be a model with a text", "openai/clip"),
        (TypeError, "must be a whole dual encoder", clip.vision_model),
        (ValueError, "of width 64, and .* one of width 48", build("open_clip").model),
        (ValueError, "is on meta, and .* on cpu", copy.deepcopy(clip).to("meta")),
    ):
        with pytest.raises(error, match=message):
            patchselect.apply(case.model, text_side=side)
    with pytest.raises(ValueError, match="has a text half beside it already"):
        patchselect.apply(clip, text_side=copy.deepcopy(clip))
    with pytest.raises(ValueError, match="which positions patches have in the prompt"):
        patchselect.apply(clip, positions="renumbered")
    with pytest.raises(ValueError, match="positions must be one of 'original', 'renumbered'"):
        patchselect.apply(case.model, positions="mrope")


@torch.no_grad()
def test_records_draw_and_restore_over_the_original_grid():
    needs("short prompts")
    pytest.importorskip("matplotlib")
    case = build("llava")
    handle = patchselect.apply(case.model, 0.5, layers=[1], guidance="image")
    inputs = prompts((2, 1), (4, 6))
    with handle.record() as trace:
        case.model.generate(**inputs, max_new_tokens=3, pad_token_id=0)
    assert len(trace) == 1 and trace[0].kept.shape == (3, 8) and trace[0].grid == (4, 4)
    tokens = torch.stack(read(case.model.get_image_features(pixel_values=inputs["pixel_values"])))
    dense = patchselect.restore(tokens, trace)
    assert torch.equal(dense[1].flatten(0, 1)[trace[0].kept[1]], tokens[1, :8])
    assert patchselect.visualization.draw_selection(torch.rand(3, 3, 64, 64), trace, ["a", "b", "c"]) is not None
    twin = pickle.loads(pickle.dumps(build("llava").model))
    assert patchselect.apply(twin, 0.5, guidance="image").record() is not None
    for ask in (
        patchselect.skip_unread_outputs,
        lambda model: patchselect.score_pairs(model, inputs["pixel_values"], texts(case, 2)),
    ):
        with pytest.raises(ValueError):
            ask(case.model)
    with pytest.raises(ValueError, match="has no prompt that holds its patches"):
        patchselect.shorten(patchselect.apply(build("clip").model).model, **inputs)
    with pytest.raises(ValueError, match="give the images as pixel_values"):
        patchselect.shorten(case.model, input_ids=inputs["input_ids"])


@pytest.mark.parametrize("name", ["llava", "paligemma", "internvl", "smolvlm"])
@torch.no_grad()
def test_a_budget_counts_tower_and_prompt(name):
    """What torch counts of a call, at the rate that a budget asks for, is within a token of the budget."""
    needs("short prompts", "counting")
    from benchmarks.common.cost import countable

    case = build(name)
    inputs = inputs_of(case, (1,), (9,))
    inputs["pixel_values"] = inputs["pixel_values"][:1]

    def counted(call, **given) -> int:
        with countable() as counter:
            call(**given)
        return counter.get_total_flops() // 2

    whole = counted(case.model.model, **inputs, use_cache=False)
    tower = patchselect.wiring.towers.find_towers(case.model)[0]
    pixels = inputs["pixel_values"].flatten(0, -4)
    size = int((inputs["input_ids"] == 98).sum())
    alone = counted(tower.module, pixel_values=pixels)
    assert tower.adapter.prompt_cost(case.model.model, size, 9) == pytest.approx(whole - alone, rel=0.02)
    rate = patchselect.keep_rate_for_budget(case.model, 0.8, words=9)
    patchselect.apply(case.model, rate, guidance="image", relevance="keys")
    assert 0.6 < counted(case.model.model, **inputs, use_cache=False) / whole < 0.83
    with pytest.raises(ValueError, match="words counts the prompt of a language model"):
        patchselect.keep_rate_for_budget(build("clip").model, 0.8, words=9)
