"""Every supported host keeps every promise of the contract about its structure: parts, lengths, copies, records."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hosts import Case, build, texts
from hosts.calls import encode, tokens_of
from promised import RATE, every_host, packed_too
from since import loaded
from torch import Tensor

import patchselect
from patchselect.functional import num_kept


def lengths(case: Case, rate: float, fused: int = 1) -> list[int]:
    first = num_kept(case.patches, rate) + fused
    return [case.prefix + first, case.prefix + num_kept(first, rate) + fused]


@packed_too
def test_nothing_is_added_and_nothing_is_lost(name):
    case = build(name)
    model, images = case.model, case.images(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = {path: (part, type(part)) for path, part in model.named_modules()}
    parameters = [(key, id(value)) for key, value in model.named_parameters()]
    buffers = [(key, id(value)) for key, value in model.named_buffers()]
    reference = encode(case, images)
    handle = patchselect.apply(model, RATE)
    assert not torch.equal(encode(case, images, texts(case, 3)), reference)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [(key, id(value)) for key, value in model.named_parameters()] == parameters
    assert [(key, id(value)) for key, value in model.named_buffers()] == buffers
    assert dict(model.named_modules()) == {path: part for path, (part, _) in parts.items()}
    assert all(isinstance(part, parts[path][1]) for path, part in model.named_modules())
    assert all(type(part).__name__ == parts[path][1].__name__ for path, part in model.named_modules())
    model.load_state_dict(before)
    handle.remove()
    assert {path: (part, type(part)) for path, part in model.named_modules()} == parts
    assert not any("patchselect" in key for part in model.modules() for key in vars(part))
    assert torch.equal(encode(case, images), reference)


@every_host
def test_the_tokens_are_as_long_as_promised(name):
    case = build(name)
    seen: list[Tensor] = []
    tower = patchselect.wiring.towers.find_towers(case.model)[0]
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tokens_of(tower, out)))
    handle = patchselect.apply(case.model, RATE, layers=[1, 3])
    with handle.record() as trace:
        encode(case, case.images(2), texts(case, 2))
    short, shorter = lengths(case, RATE)
    whole = case.prefix + case.patches
    assert [tokens.shape[1] for tokens in seen] == [whole, short, short, shorter, shorter, shorter]
    assert [entry.num_tokens for entry in trace] == [short, shorter]
    assert [entry.layer for entry in trace] == [1, 3]


@every_host
def test_keep_rate_one_is_bit_equal(name):
    case = build(name)
    images = case.images(2)
    reference = encode(case, images)
    handle = patchselect.apply(case.model, 1.0)
    assert torch.equal(encode(case, images, texts(case, 2)), reference)
    with handle.record() as trace:
        assert torch.equal(encode(case, images, texts(case, 2)), reference)
    assert trace[0].kept.tolist() == [list(range(case.patches))] * 2


@packed_too
def test_apply_twice_replaces(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    first = patchselect.apply(case.model, RATE, layers=[0, 1, 2, 3])
    second = patchselect.apply(case.model, 0.7, layers=[2])
    with second.record() as trace:
        encode(case, images, text)
    assert [entry.layer for entry in trace] == [2]
    first.remove()
    patchselect.remove(case.model)
    assert torch.equal(encode(case, images), encode(build(name), images))


@packed_too
def test_copies_and_pickles_are_models_of_their_own(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    patchselect.apply(case.model, RATE)
    expected = encode(case, images, text)
    buffer = io.BytesIO()
    try:
        torch.save(case.model, buffer)
        saved = loaded(io.BytesIO(buffer.getvalue()))
    except (pickle.PicklingError, AttributeError):
        unpatched = build(name)
        encode(unpatched, images)  # transformers hangs hooks on models that were asked for hidden states
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(unpatched.model)
        saved = None
    for twin in (copy.deepcopy(case.model), saved):
        if twin is None:
            continue
        assert torch.equal(encode(case, images, text, model=twin), expected)
        with torch.no_grad():
            next(iter(twin.parameters())).add_(1.0)
            for parameter in patchselect.wiring.towers.find_towers(twin)[0].blocks[1].parameters():
                parameter.mul_(1.5)
        assert torch.equal(encode(case, images, text), expected)
        assert not torch.equal(encode(case, images, text, model=twin), expected)
        patchselect.remove(twin)
        assert torch.equal(encode(case, images, text), expected)


@every_host
def test_records_name_the_original_patches_and_restore_puts_them_back(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    handle = patchselect.apply(case.model, RATE, layers=[1, 3])
    last: list[Tensor] = []
    tower = handle.towers[0]
    hook = tower.blocks[3].register_forward_hook(lambda module, args, out: last.append(tokens_of(tower, out)))
    with handle.record() as trace:
        encode(case, images, text)
    hook.remove()
    assert [entry.grid for entry in trace] == [case.grid] * 2
    first, second = (set(row.tolist()) for row in (trace[0].kept[0], trace[1].kept[0]))
    assert first <= set(range(case.patches)) and second <= first | {-1}
    tokens = last[-1]
    dense = patchselect.restore(tokens, trace, fill=float("nan"))
    assert dense.shape == (2, *case.grid, tokens.shape[-1])
    flat = dense.flatten(1, 2)
    for row in range(2):
        survivors = [int(place) for place in trace[1].kept[row]]
        for position, place in enumerate(survivors):
            if place >= 0:
                assert torch.equal(flat[row, place], tokens[row, case.prefix + position])
        gone = set(range(case.patches)) - set(survivors)
        assert all(flat[row, place].isnan().all() for place in gone)
