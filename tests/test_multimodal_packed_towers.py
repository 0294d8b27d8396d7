"""Towers of hosts that pack images select from each image alone, are restored, budgeted, or refused in words."""

from __future__ import annotations

import pytest
import torch
from hosts import build, take, texts
from hosts.of_prompts import is_old, packed_prompts, read
from packed_by_hand import GRIDS, RATE, WORDS, each, patched
from since import needs
from torch import Tensor

import patchselect

needs("short prompts", module=True)


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
