"""Where a language model joins squares of patches, whole squares stay and are joined as in the whole image."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import build
from hosts.of_prompts import read
from prompts_by_hand import SQUARES, square
from since import needs

import patchselect

needs("short prompts", module=True)


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
