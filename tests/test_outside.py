"""A relevance, a reduction and a host from a file of the user's own do all that built-in ones do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hosts import texts
from outside import OBJECTS, PlainViTAdapter, Quarters, both, each, features, host, patched
from since import since

import patchselect


@each
@both
def test_it_selects_records_restores_and_draws(name, kind):
    pytest.importorskip("matplotlib")
    case, handle = patched(name, kind)
    fused = 4 if kind in ("quarters", "both") else 1
    with torch.no_grad(), handle.record() as trace:
        features(case, texts(case, 3))
    assert [entry.num_tokens for entry in trace] == [1 + 4 + fused, 1 + 2 + fused]
    for entry in trace:
        assert entry.relevance.sum(dim=1).allclose(torch.ones(3))
        tokens = torch.arange(entry.num_tokens - 1.0).view(1, -1, 1).expand(3, -1, 2)
        board = patchselect.restore(tokens, entry, fill="fused")
        assert torch.equal(board[..., 0].flatten(1), entry.holders.to(board))
    assert patchselect.visualization.draw_selection(torch.rand(3, 3, 64, 64), trace, ["a", "b", "c"]) is not None


@each
@both
def test_the_most_relevant_patches_are_those_that_its_scores_name(name, kind):
    case, handle = patched(name, kind)
    with torch.no_grad(), handle.record() as trace:
        features(case, texts(case, 3))
    expected = trace[0].relevance.topk(4, dim=1).indices.sort(dim=1).values
    assert torch.equal(trace[0].kept, expected)


def test_the_sign_turns_the_choice_round():
    kept = []
    for kind in ("trim", "trim-least"):
        case, handle = patched("clip", kind, 0.5)
        with torch.no_grad(), handle.record() as trace:
            features(case, texts(case, 3))
        kept.append({(row, place) for row, places in enumerate(trace[0].kept.tolist()) for place in places})
    assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 3 * 16


def test_four_tokens_are_the_means_of_their_quarters():
    tokens = torch.randn(2, 1 + 16, 5, dtype=torch.float64)
    relevance = torch.rand(2, 16, dtype=torch.float64)
    places = patchselect.reduction.Places(torch.arange(16).expand(2, -1), (4, 4))
    found = Quarters().reduce(tokens, relevance, 3, 1, places)
    for row in range(2):
        kept = set(found.kept[row].tolist())
        for quarter, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            inside = [4 * y + x for y in (top, top + 1) for x in (left, left + 1) if 4 * y + x not in kept]
            weights = relevance[row, inside]
            mean = (weights[:, None] * tokens[row, [1 + i for i in inside]]).sum(0) / weights.sum()
            torch.testing.assert_close(found.tokens[row, 1 + 3 + quarter], mean)
            assert all(int(found.into[row, 1 + i]) == 1 + 3 + quarter for i in inside)


@each
@both
def test_rows_belong_to_their_text_alone(name, kind):
    case, _ = patched(name, kind)
    text = texts(case, 3)
    with torch.no_grad():
        whole = features(case, text)
        every = features(case, text, pairing="all").view(3, 3, -1)
        shared = features(case, text[:1], pairing="shared")
        alone = features(case, text[:1].expand(3, -1))
    torch.testing.assert_close(every[range(3), range(3)], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


@each
@both
def test_nothing_is_added_and_nothing_is_lost(name, kind):
    case = host(name)
    images, keys = case.images(2), list(case.model.state_dict())
    with torch.no_grad():
        plain = case.image_side(case.model, images)
        adapter = PlainViTAdapter() if name == "plain_vit" else None
        patchselect.apply(case.model, 1.0, adapter=adapter, **OBJECTS[kind])
        assert torch.equal(features(case, texts(case, 2), 2), plain)
        assert list(case.model.state_dict()) == keys
        patchselect.remove(case.model)
        assert torch.equal(case.image_side(case.model, images), plain)


@each
@both
def test_a_budget_is_kept_and_counts_what_the_object_costs(name, kind):
    case, handle = patched(name, kind)
    rate = patchselect.keep_rate_for_budget(case.model, 0.7)
    cost = patchselect.budget.Cost.of(handle.towers[0], handle.plan)
    fraction = patchselect.functional.as_ratio(rate)
    assert 0 < rate < 1
    assert cost.of_encoder(16, (1, 3), [fraction] * 2) <= 0.7 * cost.of_encoder(16)
    once, each_patch = handle.plan.relevance.cost(handle.towers[0], 1, True, "text")
    projection = patchselect.relevance.joint.projection_cost(handle.towers[0])
    assert (once, each_patch) == (0, projection + case.text_width) or "trim" not in handle.relevance


@since("checkpoints without reentry")
@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(kind, reentrant):
    from torch.utils.checkpoint import checkpoint

    found = []
    for checkpointed in (False, True):
        case, _ = patched("plain_vit", kind)
        if checkpointed:
            for block in case.model.blocks:
                block.forward = _checkpointed(checkpoint, block.forward, reentrant)
        images = case.images(2).requires_grad_()
        with patchselect.guide(case.model, texts(case, 2)):
            out = case.image_side(case.model, images)
        out.square().sum().backward()
        found.append([parameter.grad for parameter in case.model.parameters()])
    for plain, again in zip(*found):
        torch.testing.assert_close(plain, again)


def _checkpointed(checkpoint, forward, reentrant):
    return lambda x: checkpoint(forward, x, use_reentrant=reentrant)


@each
@both
def test_copies_and_files_carry_the_object(name, kind, tmp_path):
    case, _ = patched(name, kind)
    text = texts(case, 2)
    with torch.no_grad():
        expected = features(case, text, 2)
        for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            with patchselect.guide(other, text):
                assert torch.equal(case.image_side(other, case.images(2)), expected)


@pytest.mark.parametrize("kind", OBJECTS)
def test_pairs_are_scored(kind):
    case, _ = patched("clip", kind)
    images, text = case.images(3), texts(case, 4)
    found = patchselect.score_pairs(case.model, images, text)
    with torch.no_grad():
        rows = features(case, text, pairing="all").view(3, 4, -1)
    expected = torch.nn.functional.cosine_similarity(rows, text.expand(3, -1, -1), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
