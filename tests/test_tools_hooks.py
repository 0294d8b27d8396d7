"""Hooks that scale what a layer returns are read with it; those that bend it are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import build
from tooling import WAYS, check_alike, look, vision_linears
from torch import nn

import patchselect


@pytest.mark.parametrize("name", ["clip", "siglip", "timm_class_token", "albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_that_change_what_a_layer_returns_count_as_merged(order, name):
    for guidance, relevance in WAYS:
        reference, case = build(name), build(name)
        if guidance == "image" and relevance == "values" and "joint" not in case.relevances:
            continue
        plain = build(name)
        patchselect.apply(plain.model, 0.5, guidance=guidance, relevance=relevance)
        generator = torch.Generator().manual_seed(3)
        scales = {}
        with torch.no_grad():
            for parent, child, layer in vision_linears(reference.model):
                scale = 1 + torch.rand(layer.out_features, generator=generator)
                scales[child, id(parent)] = scale
                layer.weight.mul_(scale[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(scale).add_(1)
                else:
                    layer.bias = nn.Parameter(torch.ones(layer.out_features))
        patchselect.apply(reference.model, 0.5, guidance=guidance, relevance=relevance)
        expected = look(reference, reference.model, guidance)
        if order == "after":
            patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance)
        for scale, (*_, layer) in zip(scales.values(), vision_linears(case.model)):
            layer.register_forward_hook(lambda module, args, out, scale=scale: out * scale + 1)
        if order == "before":
            patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance)
        check_alike(look(case, case.model, guidance), expected, look(plain, plain.model, guidance))


def test_hooks_that_look_on_change_nothing_and_see_one_token_more():
    case, seen = build("clip"), []
    patchselect.apply(case.model, 0.5, relevance="values")
    expected = look(case, case.model)
    for *_, layer in vision_linears(case.model):
        layer.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:-1])))
    found = look(case, case.model)
    assert all(torch.equal(left, right) for left, right in zip(found, expected))
    assert (1, 1) in seen and all(shape[0] == 2 for shape in seen if shape != (1, 1)), "no unit vectors"


def test_hooks_that_bend_a_layer_are_refused_by_name():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[2], relevance="keys")
    layer = patchselect.handle_of(case.model).towers[0].blocks[2].self_attn.q_proj
    hook = layer.register_forward_hook(lambda module, args, out: out.relu())
    with pytest.raises(TypeError, match="Linear does not show the matrix.*its hooks make it something else"):
        look(case, case.model)
    hook.remove()
    patchselect.apply(case.model, 0.5, relevance="values")
    case.model.vision_model.post_layernorm.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(TypeError, match="a forward hook changes what LayerNorm returns"):
        look(case, case.model)


class Odd(nn.Linear):
    def forward(self, x):
        raise RuntimeError("rows of another kind")


def test_a_layer_that_cannot_be_asked_is_refused_by_name():
    case = build("clip")
    case.model.visual_projection = Odd(48, 24)
    with pytest.raises(TypeError, match="Odd does not show the matrix that it applies.*rows of another kind.*merge"):
        patchselect.apply(case.model, 0.5, relevance="values")
    assert copy.deepcopy(case.model) is not None
