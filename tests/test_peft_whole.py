"""peft beyond layers: modules that are trained as a whole, adapters on a bare parameter, and around an attention."""

from __future__ import annotations

import pytest
from hosts import build
from tooling import check_alike, look, shaken, tool

import patchselect


def under(model, **settings):
    """The model under a LoRA that does something."""
    peft = tool("peft")
    return shaken(peft.get_peft_model(model, peft.LoraConfig(r=4, **settings)))


SAVED = [
    ("siglip", dict(target_modules=["fc1"], modules_to_save=["post_layernorm"])),
    ("clip", dict(target_modules=["fc1"], modules_to_save=["post_layernorm"])),
    ("clip", dict(target_modules=["fc1"], modules_to_save=["visual_projection"])),
    ("clip", dict(target_modules=["fc1"], modules_to_save=["self_attn"])),
]


@pytest.mark.parametrize(("name", "settings"), SAVED)
def test_modules_that_are_trained_as_a_whole_count_in_both_orders(name, settings):
    found = {}
    for order in ("never", "merged", "before", "after"):
        case = build(name)
        if order == "after":
            patchselect.apply(case.model, 0.5, layers=[1, 3], relevance="values")
        model = case.model if order == "never" else under(case.model, **settings)
        if order == "merged":
            model = model.merge_and_unload()
        if order != "after":
            patchselect.apply(model, 0.5, layers=[1, 3], relevance="values")
        found[order] = look(case, case.model)
    for order in ("before", "after"):
        check_alike(found[order], found["merged"], found["never"])


def test_a_norm_before_attention_that_is_trained_as_a_whole_is_not_read_backwards():
    case = build("clip")
    model = under(case.model, target_modules=["fc1"], modules_to_save=["layer_norm1"])
    with pytest.raises(ValueError, match=r"cannot read block 0 .*ModulesToSaveWrapper, not a LayerNorm; use .*keys"):
        patchselect.apply(model, 0.5, relevance="values")
    patchselect.apply(model, 0.5, relevance="keys")
    found = look(case, case.model)
    patchselect.remove(model)
    merged = model.merge_and_unload()
    patchselect.apply(merged, 0.5, relevance="keys")
    check_alike(found, look(case, merged))


def test_an_adapter_on_the_projection_of_open_clip():
    """peft puts it around the whole tower, whose parameter it is."""
    settings = dict(target_modules=[], target_parameters=["visual.proj"])
    reference = build("open_clip")
    patchselect.apply(reference.model, 0.5, relevance="values")
    plain = look(reference, reference.model)
    patchselect.remove(reference.model)
    merged = under(reference.model, **settings).merge_and_unload()
    patchselect.apply(merged, 0.5, relevance="values")

    case = build("open_clip")
    patchselect.apply(case.model, 0.5, relevance="values")
    after = under(case.model, **settings)
    check_alike(look(case, after), look(reference, merged), plain)
    with pytest.raises(TypeError):
        patchselect.apply(under(build("open_clip").model, **settings), 0.5, relevance="values")


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_adapter_around_a_whole_attention_is_refused(order):
    case = build("open_clip")
    if order == "after":
        patchselect.apply(case.model, 0.5)
    model = under(case.model, target_modules=["attn"])
    with pytest.raises(TypeError, match="around the attention of this block hides its weights"):
        if order == "before":
            patchselect.apply(model, 0.5)
        look(case, model)
