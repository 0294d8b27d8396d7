"""What is particular to ViLT of transformers: text and image are one sequence, and patches come shuffled."""

from __future__ import annotations

import pytest
import torch
from blip_vilt import build, call, inputs, selecting
from since import needs

import patchselect
from patchselect import visualization

needs("transformers", module=True)


def test_text_tokens_of_vilt_are_never_touched():
    """The prefix, text and image [CLS], is bit for bit what attention made of it, and the padding stays masked."""
    model, given = build("ViltModel"), inputs("ViltModel")
    handle = selecting(model, 0.5)
    seen = {}
    adapter = handle.towers[0].adapter
    block = handle.towers[0].blocks[1]
    block.layernorm_after.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    block.register_forward_pre_hook(
        lambda module, args: seen.update(before=adapter.attend(handle.towers[0], block, *args, text_length=7).tokens)
    )
    first = call(model, given)[0]
    assert torch.equal(seen["after"][:, :8], seen["before"][:, :8])
    other = given["input_ids"].clone()
    other[1, 5:] = 7
    second = call(model, given, input_ids=other)[0]
    assert torch.equal(first[1, :5], second[1, :5]) and not torch.equal(first[1, 5:7], second[1, 5:7])


def test_vilt_tells_the_places_of_its_shuffled_patches():
    model, given = build("ViltModel"), inputs("ViltModel")
    handle = selecting(model, 0.5)
    found, maps = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with handle.record() as trace:
            output = model(**given)
        assert trace[-1].grid == (4, 4)
        found.append([set(row.tolist()) for row in trace[-1].kept])
        board = patchselect.restore(output.last_hidden_state, trace)
        place = int((trace[-1].kept[0] >= 0).nonzero()[0])
        where = int(trace[-1].kept[0, place])
        assert torch.equal(board[0].flatten(0, 1)[where], output.last_hidden_state[0, 8 + place])
        maps.append(torch.stack([visualization.relevance_map(trace[0], row) for row in range(3)]))
    assert found[0] == found[1]
    torch.testing.assert_close(maps[0], maps[1])


def test_padded_images_of_vilt_are_refused():
    model, given = build("ViltModel"), inputs("ViltModel")
    selecting(model, 0.5)
    given["pixel_mask"][0, :, 40:] = 0
    with pytest.raises(ValueError, match="batch images of one size"):
        model(**given)


def test_vilt_takes_no_text_from_outside():
    model = build("ViltForQuestionAnswering")
    selecting(model, 0.5)
    for attempt in (
        lambda: patchselect.guide(model, torch.zeros(3, 64)),
        lambda: patchselect.encode_prefix(model, torch.zeros(3, 3, 64, 64)),
        lambda: patchselect.apply(model, relevance="values"),
        lambda: patchselect.apply(model, relevance="joint"),
        lambda: patchselect.score_pairs(model, torch.zeros(3, 3, 64, 64), torch.ones(3, 7, dtype=torch.long)),
        lambda: patchselect.keep_rate_for_budget(model, 0.7),
    ):
        with pytest.raises(ValueError, match="same sequence|(share|as) one sequence"):
            attempt()


def test_a_block_of_vilt_alone_is_an_error():
    model = build("ViltModel")
    selecting(model, 0.5)
    with pytest.raises(ValueError, match="call the model as a whole"):
        model.encoder.layer[1](torch.randn(1, 20, 64))
