"""Copies and pickles of one block, of a tower and of a model: what selects on its own, and what is a plain block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hosts import build, texts
from torch import nn

import patchselect
from patchselect.wiring import twins
from patchselect.wiring.state import STATE


@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token", "albef"])
def test_a_copy_of_one_block_is_light_and_selects_alike(name):
    case = build(name)
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3])
    block = handle.towers[0].blocks[1]
    twin = copy.deepcopy(block)
    state = vars(twin)[STATE]
    assert state.wiring is handle.wiring and state.tower is handle.towers[0] and patchselect.handle_of(twin) == handle
    tokens = torch.randn(2, case.prefix + 16, handle.towers[0].width)
    tokens = tokens if handle.towers[0].batch_first else tokens.transpose(0, 1)
    kwargs = twins.call_of(handle.towers[0], handle.towers[0].blocks[0], tokens)[1]

    def run(module):
        found = module(tokens, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    with torch.no_grad():
        with patchselect.guide(case.model, texts(case, 2)):
            expected = run(block)
            assert torch.equal(run(twin), expected)
        patchselect.remove(copy.deepcopy(twin))
        with patchselect.guide(case.model, texts(case, 2)):
            assert torch.equal(run(twin), expected), "removing a copy leaves the original alone"
        handle.remove()
        assert torch.equal(run(twin), run(block)), "without the selection, a copy is a plain block"
    patchselect.remove(twin)
    assert type(twin) is type(block)


def test_copies_of_a_model_and_of_a_tower_have_a_selection_of_their_own():
    case = build("clip")
    handle = patchselect.apply(case.model, 0.5)
    for whole in (case.model, case.model.vision_model, nn.Sequential(case.model)):
        for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
            other = patchselect.handle_of(twin)
            assert other.wiring is not handle.wiring
            for layer in (vars(block)[STATE] for block in other.towers[0].blocks if STATE in vars(block)):
                assert layer.wiring is other.wiring and layer.tower is other.towers[0]
            with torch.no_grad(), patchselect.guide(twin, texts(case, 2)):
                other.towers[0].module(case.images(2))


@pytest.mark.parametrize("merge", [0, 0.5])
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token", "albef"])
def test_a_pickled_block_is_a_plain_one_and_carries_nothing(name, merge):
    case = build(name)
    blocks = patchselect.wiring.towers.find_towers(case.model)[0].blocks
    expected = [len(pickle.dumps(block)) for block in blocks]
    handle = patchselect.apply(case.model, 0.5, layers=[3], merge=merge)
    for index in (1, 3):
        pickled = pickle.dumps(blocks[index])
        assert len(pickled) < expected[index] + 1000
        twin = pickle.loads(pickled)
        tokens = torch.randn(2, case.prefix + 16, handle.towers[0].width)
        tokens = tokens if handle.towers[0].batch_first else tokens.transpose(0, 1)
        kwargs = twins.call_of(handle.towers[0], blocks[0], tokens)[1]
        with torch.no_grad():
            found = twin(tokens, **kwargs)
        with pytest.raises(ValueError, match="is not patched"):
            patchselect.handle_of(twin)
        patchselect.remove(twin)
        plain = patchselect.wiring.swapping.own_class(type(blocks[index]))
        assert type(twin) is plain and not any("patchselect" in key for key in vars(twin))
        with torch.no_grad():
            assert repr(found) == repr(twin(tokens, **kwargs))


@pytest.mark.parametrize("name", ["clip", "albef"])
def test_a_copy_of_a_block_that_merges_is_a_plain_one_without_the_selection(name):
    case = build(name)
    handle = patchselect.apply(case.model, 0.5, layers=[3], merge=0.5)
    block = handle.towers[0].blocks[2]
    twin = copy.deepcopy(block)
    handle.remove()
    tokens = torch.randn(2, case.prefix + 16, handle.towers[0].width)
    kwargs = twins.call_of(handle.towers[0], block, tokens)[1]
    with torch.no_grad():
        assert repr(twin(tokens, **kwargs)) == repr(block(tokens, **kwargs))
