"""Methods of patched classes on objects that hold no selection."""

from __future__ import annotations

import pytest
import torch
from hosts import build, ids
from torch import nn

import patchselect
from patchselect.hooked import has_own_forward
from patchselect.wiring.swapping import swap, unswap


@pytest.mark.parametrize("name", ["open_clip", "openai_clip"])
def test_a_method_bound_while_patched_outlives_the_selection(name):
    case = build(name)
    expected = case.model.encode_text(ids(2)), case.model(case.images(2), ids(2))
    handle = patchselect.apply(case.model, 0.5)
    encode, forward, block = case.model.encode_text, case.model.forward, handle.wiring.patched[0].forward
    handle.remove()
    assert torch.equal(encode(ids(2)), expected[0])
    assert all(torch.equal(*pair) for pair in zip(forward(case.images(2), ids(2)), expected[1]))
    x = torch.randn(2, 17, handle.towers[0].width)
    assert torch.equal(block(x), handle.towers[0].blocks[handle.layers[0]](x))


def test_a_new_model_of_a_patched_class_is_a_plain_one():
    case = build("clip")
    plain = type(case.model)
    patchselect.apply(case.model, 0.5, pairing="paired")
    twin = type(case.model)(case.model.config).eval()
    twin.load_state_dict(case.model.state_dict())
    images, text = case.images(2), torch.randn(2, 24)
    with torch.no_grad():
        unguided, paired = case.image_side(twin, images), case.pair(twin, images, ids(2))
        assert not torch.equal(paired, case.pair(case.model, images, ids(2)))
        with patchselect.guide(case.model, text):
            expected = case.image_side(case.model, images)
            assert torch.equal(case.image_side(twin, images), unguided)
        handle = patchselect.apply(twin, 0.5)
        with handle.record() as trace, patchselect.guide(twin, text):
            assert torch.equal(case.image_side(twin, images), expected)
        assert len(trace) == 2
        handle.remove()
        assert type(twin) is plain and torch.equal(case.pair(twin, images, ids(2)), paired)


def test_whose_forward_a_module_carries():
    """The one of its own class, bound to it, is none; that of a parent, of another module or a function is."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, other = Twice(3, 3), Twice(3, 3)
    assert not has_own_forward(module)
    for forward, own in (
        (module.forward, False),
        (nn.Linear.forward.__get__(module), True),
        (other.forward, True),
        (lambda x: x, True),
    ):
        module.forward = forward
        assert has_own_forward(module) is own
        swap(module, {"extra_repr": lambda module, name, original: original()})
        assert has_own_forward(module) is own and ("forward" in vars(module)) is own
        unswap(module)
        assert ("forward" in vars(module)) is own


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "timm_class_token", "openai_clip", "albef", "mplug"])
@torch.no_grad()
def test_a_forward_left_behind_by_a_call_of_a_patched_model_is_none(name):
    """transformers 4.57 sets those that it wrapped during a call back as bound ones, of the class that they had."""
    case = build(name)
    handle = patchselect.apply(case.model, 0.5, guidance="image")
    expected = case.image_side(case.model, case.images(2))
    blocks = [tower.blocks[layer] for tower in handle.towers for layer in handle.layers]
    for block in blocks:
        block.forward = block.forward
    patchselect.apply(case.model, 1.0, guidance="image")
    again = patchselect.apply(case.model, 0.5, guidance="image")
    assert torch.equal(case.image_side(case.model, case.images(2)), expected)
    for block in blocks:
        block.forward = block.forward
    again.remove()
    assert not any("forward" in vars(block) for block in blocks)
