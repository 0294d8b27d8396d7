"""Wrappers around the linear layers of an attention, as LoRA puts them there after `apply`."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from hosts import build, texts
from hosts.calls import encode
from torch import nn

import patchselect


class Lora(nn.Module):
    """The outside of peft's `lora.Linear`: weight and bias are those of the layer that it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def wrap(model) -> list[tuple[nn.Module, str, Lora]]:
    torch.manual_seed(4)
    found = []
    for block in patchselect.wiring.towers.find_towers(model)[0].blocks:
        for path, part in block.named_modules():
            for name, child in part.named_children():
                if isinstance(child, nn.Linear) and "att" in path:
                    found.append((part, name, Lora(child)))
    for part, name, lora in found:
        setattr(part, name, lora)
    return found


@pytest.mark.parametrize("name", ["clip", "siglip", "timm_class_token", "blip", "albef"])
def test_relevance_is_that_of_the_merged_weights(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    for relevance in ("keys", "features", "values"):
        handle = patchselect.apply(case.model, 0.5, relevance=relevance)

        def look(handle=handle):
            with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, text):
                case.image_side(case.model, images)
            return torch.cat([entry.relevance for entry in trace], dim=1)

        plain, wrapped = look(), wrap(case.model)
        assert len(wrapped) >= 2 * len(handle.towers[0].blocks)
        found = look()
        with torch.no_grad():
            for part, attribute, lora in wrapped:
                lora.base_layer.weight += lora.up.weight @ lora.down.weight
                setattr(part, attribute, lora.base_layer)
        merged = look()
        assert not torch.allclose(plain, merged, rtol=1e-3)
        torch.testing.assert_close(found, merged, rtol=1e-3, atol=1e-5)


def test_the_wrapper_of_a_query_learns_from_what_is_pooled():
    case = build("clip")
    handle = patchselect.apply(case.model, 0.5, layers=[0], relevance="keys")
    wrapped = wrap(case.model)
    with handle.record() as trace, patchselect.guide(case.model, texts(case, 2)):
        case.image_side(case.model, case.images(2))
    trace[0].relevance.square().sum().backward()
    assert next(lora.up.weight.grad for _, name, lora in wrapped if name == "q_proj").abs().sum() > 0


def test_a_wrapper_around_a_whole_attention_is_refused():
    case = build("open_clip")
    attention = case.model.visual.transformer.resblocks[4].attn
    attention.base_layer = nn.Identity()
    with pytest.raises(TypeError, match="around the attention of this block hides its weights"):
        patchselect.apply(case.model, 0.5)


def through_closure(attention):
    plain = attention.forward
    return lambda *args, **kwargs: plain(*args, **kwargs)


def through_reference(attention):
    """As fairscale's `checkpoint_wrapper` does it."""

    def run(forward, module, *args, **kwargs):
        return forward(module(), *args, **kwargs)

    return functools.partial(run, type(attention).forward, weakref.ref(attention))


@pytest.mark.parametrize("relevance", ["keys", "values", "features"])
@pytest.mark.parametrize("wrapped", [through_closure, through_reference])
def test_attention_whose_forward_was_set_from_outside(wrapped, relevance):
    case = build("albef_tower")
    images, text = case.images(2), texts(case, 2)
    handle = patchselect.apply(case.model, 0.5, relevance=relevance)
    expected = encode(case, images, text)
    handle.remove()
    for block in case.model.blocks:
        block.attn.forward = wrapped(block.attn)
    patchselect.apply(case.model, 0.5, relevance=relevance)
    assert torch.equal(encode(case, images, text), expected)
    with torch.no_grad():
        case.model.blocks[-1].attn.forward = lambda *args, **kwargs: 2 * type(block.attn).forward(block.attn, *args)
    if relevance == "values":
        with pytest.raises(TypeError, match="computes something else"):
            patchselect.apply(case.model, 0.5, relevance=relevance)
