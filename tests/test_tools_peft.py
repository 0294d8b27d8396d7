"""Adapters of peft: the relevance is that of the layers with their adapters, as if merged, in both orders."""

from __future__ import annotations

import pytest
import torch
from hosts import build, texts
from tooling import METHODS, PROJECTIONS, check_alike, look, tool, tuned
from torch import nn

import patchselect

PACKED = r"(visual|visual_encoder|eyes|trunk)?\.?(trunk\.)?blocks\.\d+\.attn\.(qkv|proj)"
OWN_TARGETS = {
    "open_clip_siglip": PACKED,
    "timm_class_token": PACKED,
    "timm_average": PACKED,
    "albef": PACKED + "|vision_proj|text_proj|see|read",
}
"""What adapters are put on in hosts whose attention has one layer for queries, keys and values."""


@pytest.mark.parametrize("relevance", ["values", "keys"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_count_as_if_merged_whether_they_come_before_apply_or_after(method, relevance):
    reference = build("clip")
    patchselect.apply(reference.model, 0.5, relevance=relevance)
    plain = look(reference, reference.model)
    patchselect.remove(reference.model)
    merged = tuned(reference.model, method).merge_and_unload()
    patchselect.apply(merged, 0.5, relevance=relevance)
    expected = look(reference, merged)

    case = build("clip")
    before = tuned(case.model, method)
    handle = patchselect.apply(before, 0.5, relevance=relevance)
    assert handle.model is case.model
    check_alike(look(case, before), expected, plain if relevance == "values" else None)
    with before.disable_adapter():
        check_alike(look(case, before), plain)

    case = build("clip")
    patchselect.apply(case.model, 0.5, relevance=relevance)
    after = tuned(case.model, method)
    check_alike(look(case, after), expected)


@pytest.mark.parametrize("name", OWN_TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_packed_projections_count_as_if_merged(method, name):
    """In both orders, for both relevances; the head of ALBEF is called with image and text as its own code does."""
    for relevance in ("values", "keys"):
        reference, targets = build(name), OWN_TARGETS[name]
        patchselect.apply(reference.model, 0.5, relevance=relevance, layers=[1, 3])
        plain = look(reference, reference.model)
        patchselect.remove(reference.model)
        merged = tuned(reference.model, method, targets).merge_and_unload()
        patchselect.apply(merged, 0.5, relevance=relevance, layers=[1, 3])
        expected = look(reference, merged)
        for order in ("before", "after"):
            case = build(name)
            if order == "after":
                patchselect.apply(case.model, 0.5, relevance=relevance, layers=[1, 3])
            model = tuned(case.model, method, targets)
            if order == "before":
                patchselect.apply(model, 0.5, relevance=relevance, layers=[1, 3])
            check_alike(look(case, case.model), expected, plain)
            with model.disable_adapter():
                check_alike(look(case, case.model), plain)
            unloaded = model.unload()
            check_alike(look(case, unloaded), plain)


def test_the_dropout_of_an_adapter_does_not_hide_its_matrix():
    peft = tool("peft")
    model = peft.get_peft_model(build("clip").model, peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=PROJECTIONS))
    layer = model.base_model.model.visual_projection
    nn.init.normal_(layer.lora_B["default"].weight)
    model.eval()
    expected = patchselect.weights.matrix(layer)
    model.train()
    state = torch.get_rng_state()
    torch.testing.assert_close(patchselect.weights.matrix(layer), expected)
    assert layer.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_projections_of_a_head_are_read_with_their_adapters(name, order):
    peft = tool("peft")
    case, reference = build(name), build(name)

    def adapted(model):
        found = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["text_proj", "vision_proj"]), model)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for path, weight in found.named_parameters():
                if "lora_" in path:
                    weight.copy_(torch.randn(weight.shape, generator=generator))
        return found.eval()

    patchselect.apply(reference.model, 0.5, relevance="values")
    plain = look(reference, reference.model)
    adapted(reference.model)
    for parent in list(reference.model.modules()):
        for child_name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                child.merge()
                setattr(parent, child_name, child.base_layer)
    expected = look(reference, reference.model)

    if order == "before":
        adapted(case.model)
    patchselect.apply(case.model, 0.5, relevance="values")
    if order == "after":
        adapted(case.model)
    check_alike(look(case, case.model), expected, plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_tuned_norm_whose_scale_is_hidden_is_refused_by_name(order):
    peft, case = tool("peft"), build("clip")

    def tune():
        peft.get_peft_model(case.model, peft.LNTuningConfig(target_modules=["post_layernorm", "layer_norm1"]))

    if order == "after":
        patchselect.apply(case.model, 0.5, relevance="values")
    tune()
    with pytest.raises((TypeError, ValueError), match="LNTuningLayer"):
        if order == "before":
            patchselect.apply(case.model, 0.5, relevance="values")
        look(case, case.model)


def test_a_prefix_made_with_an_adapter_is_refused_without_it():
    case = build("clip")
    patchselect.apply(case.model, 0.5)
    model = tuned(case.model, "LoRA")
    prefix = patchselect.encode_prefix(model, case.images(2))

    def use():
        with torch.no_grad(), patchselect.guide(model, texts(case, 2), prefix=prefix):
            return case.image_side(model, prefix.images)

    use()
    with model.disable_adapter(), pytest.raises(ValueError, match="an adapter was switched on or off"):
        use()
    use()
