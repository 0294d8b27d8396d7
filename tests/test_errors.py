"""Bad arguments, texts and calls: a clear error each, and the model as it was."""

from __future__ import annotations

import functools

import pytest
import torch
from hosts import build, ids
from refusals import classes
from torch import nn

import patchselect


@pytest.fixture
def case():
    return build("clip")


BAD_ARGUMENTS = [
    (dict(keep_rate=0.0), ValueError, r"keep_rate must be in \(0, 1\].*got 0.0"),
    (dict(keep_rate=1.5), ValueError, "got 1.5"),
    (dict(keep_rate=float("nan")), ValueError, "got nan"),
    (dict(keep_rate="half"), TypeError, "keep_rate must be a number"),
    (dict(keep_rate=True), TypeError, "keep_rate must be a number"),
    (dict(keep_rate=[0.5]), ValueError, "1 values for 2 selection layers"),
    (dict(keep_rate=[0.5, 2.0]), ValueError, "got 2.0"),
    (dict(layers=[6]), ValueError, "layer 6 is outside of this model's 6 blocks: use 0 to 5"),
    (dict(layers=[-1]), ValueError, "layer -1 is outside"),
    (dict(layers=[2, 2]), ValueError, "ascending and without repeats"),
    (dict(layers=[3, 1]), ValueError, "ascending"),
    (dict(layers=[]), ValueError, "at least one index"),
    (dict(layers=[1.0]), TypeError, "layers must be integers"),
    (dict(layers=4), TypeError, "layers must be a sequence"),
    (dict(guidance="txt"), ValueError, "guidance must be one of 'text', 'image', 'random'; got 'txt'"),
    (dict(relevance="queries"), ValueError, "relevance must be one of 'keys'"),
    (dict(fusion="max"), ValueError, "fusion must be one of 'mean', 'sum', 'none'"),
    (dict(adapter="clip"), ValueError, "there is no adapter 'clip'; there are 'transformers-llava-clip'"),
    (dict(adapter="timm"), TypeError, "adapter 'timm' does not know .*CLIPModel"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_of_apply(case, arguments, error, message):
    before = classes(case.model)
    with pytest.raises(error, match=message):
        patchselect.apply(case.model, **arguments)
    assert classes(case.model) == before
    handle = patchselect.apply(case.model, 0.5)
    with pytest.raises(error, match=message):
        patchselect.apply(case.model, **arguments)
    with handle.record() as trace, torch.no_grad(), patchselect.guide(case.model, torch.randn(1, 24)):
        case.image_side(case.model, case.images(1))
    assert len(trace) == 2, "a failed apply leaves the one before in place"


def test_a_forward_that_would_hide_the_selection_is_refused(case):
    """Its own forward on a block, as a wrapper leaves it there, goes before that of its class."""
    block = case.tower(case.model).encoder.layers[4]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    before = classes(case.model)
    with pytest.raises(TypeError, match=r"block 4 of .* carries a forward of its own.*wrap after it"):
        patchselect.apply(case.model, 0.5, layers=[1, 4])
    assert classes(case.model) == before
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3])
    block = case.tower(case.model).encoder.layers[3]
    patched = block.forward
    block.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    with handle.record() as trace, torch.no_grad(), patchselect.guide(case.model, torch.randn(1, 24)):
        case.image_side(case.model, case.images(1))
    assert len(trace) == 2, "wrapped after apply, it selects"


@pytest.mark.parametrize("path", ["", "vision_model", "text_model"])
def test_a_forward_that_would_hide_the_text_of_the_call_is_refused(case, path):
    """As `accelerate.prepare` leaves it on a model."""

    def wrap(module):
        plain = module.forward
        module.forward = functools.wraps(plain)(lambda *args, **kwargs: plain(*args, **kwargs))

    part = case.model.get_submodule(path)
    wrap(part)
    before = classes(case.model)
    with pytest.raises(TypeError, match=f"this {type(part).__name__} carries a forward of its own .*wrap after it"):
        patchselect.apply(case.model, 0.5)
    assert classes(case.model) == before
    if path != "vision_model":
        patchselect.apply(case.model, 0.5, guidance="image")
        patchselect.remove(case.model)
    del part.forward
    with torch.no_grad():
        patchselect.apply(case.model, 0.5, pairing="paired")
        expected = case.pair(case.model, case.images(2), ids(2))
        wrap(part)
        assert torch.equal(case.pair(case.model, case.images(2), ids(2)), expected)
        patchselect.apply(case.model, 0.5, pairing="paired")
        assert torch.equal(case.pair(case.model, case.images(2), ids(2)), expected), "wrapped after the first apply"


BAD_TEXTS = [
    (torch.randn(2, 25), ValueError, r"text_features must be \(texts, 24\) for this model, got \(2, 25\)"),
    (torch.randn(24), ValueError, r"got \(24,\)"),
    (torch.randn(0, 24), ValueError, r"got \(0, 24\)"),
    (torch.ones(2, 24, dtype=torch.long), TypeError, "features, not token ids"),
    ([[0.0] * 24], TypeError, "got list"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD_TEXTS)
def test_bad_texts(case, text, error, message):
    patchselect.apply(case.model, 0.5)
    with pytest.raises(error, match=message):
        patchselect.guide(case.model, text)


@pytest.mark.parametrize("fusion", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_a_text_that_is_not_a_number_is_not_hidden(name, fusion):
    case = build(name)
    text = torch.randn(2, case.text_width)
    text[1] = float("nan")
    for relevance in case.relevances:
        patchselect.apply(case.model, 0.5, relevance=relevance, fusion=fusion)
        with torch.no_grad(), patchselect.guide(case.model, text):
            out = case.image_side(case.model, case.images(2))
        assert out[0].isfinite().all() and out[1].isnan().all(), relevance


def test_texts_of_each_image_name_the_pairings_that_take_them(case):
    patchselect.apply(case.model, 0.5)
    with pytest.raises(ValueError, match=r'got \(2, 3, 24\); several texts .* pairing="shared"\) or "all"'):
        patchselect.guide(case.model, torch.randn(2, 3, 24))


def test_bad_guides(case):
    with pytest.raises(ValueError, match="CLIPModel is not patched: call patchselect.apply"):
        patchselect.guide(case.model, torch.randn(2, 24))
    patchselect.apply(case.model, 0.5)
    with pytest.raises(ValueError, match="pairing must be one of 'paired', 'shared', 'all'"):
        patchselect.guide(case.model, torch.randn(2, 24), pairing="each")
    with pytest.raises(ValueError, match="3 texts for 4 images"), patchselect.guide(case.model, torch.randn(3, 24)):
        case.image_side(case.model, case.images(4))
    elsewhere = patchselect.guide(case.model, torch.randn(2, 24, device="meta"))
    with pytest.raises(ValueError, match="text_features are on meta, the images on cpu"), elsewhere:
        case.image_side(case.model, case.images(2))
    patchselect.apply(case.model, 0.5, guidance="image")
    with pytest.raises(ValueError, match="guided by 'image' and reads no text"):
        patchselect.guide(case.model, torch.randn(2, 24))


def test_missing_text_names_both_ways_out(case):
    patchselect.apply(case.model, 0.5)
    with pytest.raises(ValueError, match=r"patchselect\.guide\(model, text_features\)") as error:
        case.image_side(case.model, case.images(1))
    assert 'guidance="image"' in str(error.value)
    assert "call the whole model with image and text together" in str(error.value)
    patchselect.apply(case.model, 1.0)
    with pytest.raises(ValueError, match="no text guides this call"):
        case.image_side(case.model, case.images(1))
    tower = build("clip_vision")
    patchselect.apply(tower.model, 0.5)
    with pytest.raises(ValueError, match=r"with patchselect\.guide\(model, text_features\):`, or choose a guidance"):
        tower.image_side(tower.model, tower.images(1))


def test_a_removed_handle_records_nothing(case):
    handle = patchselect.apply(case.model, 0.5)
    handle.remove()
    handle.remove()
    with pytest.raises(ValueError, match="was removed from this model"):
        handle.record()


def test_a_mask_that_the_tower_does_not_read_is_refused_if_it_hides_something(case):
    patchselect.apply(case.model, 0.5)
    images, text = case.images(2), torch.randn(2, 24)
    expected = patchselect.score_pairs(case.model, images, text, progress=False)
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    named = {"pixel_values": images, "pixel_mask": mask, "input_ids": ids(2), "attention_mask": torch.zeros(2, 7)}
    assert torch.equal(patchselect.score_pairs(case.model, named, text, progress=False), expected)
    mask[1, 60:] = 0
    with pytest.raises(ValueError, match="brings pixel_mask, which .* does not read"):
        patchselect.score_pairs(case.model, named, text, progress=False)


def test_values_refuses_what_it_cannot_read_backwards():
    case = build("open_clip_normalised_keys")
    case.model.visual.transformer.resblocks[3].attn.head_scale = nn.Parameter(torch.ones(4, 1, 1))
    before = classes(case.model)
    with pytest.raises(ValueError, match='cannot read block 3 backwards: its heads are scaled; use relevance="keys"'):
        patchselect.apply(case.model, 0.5)
    assert classes(case.model) == before
    patchselect.apply(case.model, 0.5, relevance="keys")


@pytest.mark.parametrize("relevance", ["values", "joint"])
@pytest.mark.parametrize("name", ["open_clip_pooler", "albef"])
def test_image_guidance_names_the_relevances_that_need_no_joint_space(name, relevance):
    case = build(name)
    with pytest.raises(ValueError, match=f"relevance='{relevance}' reads .*use relevance=.keys. or .features."):
        patchselect.apply(case.model, 0.5, guidance="image", relevance=relevance)
