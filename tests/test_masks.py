"""Masks over patches, by whichever name they come: refused with the name and a way out, never read past in silence."""

from __future__ import annotations

import inspect

import pytest
import torch
from doubles.text import pictures
from doubles.xvlm import RegionVit
from hosts import build

import patchselect

MASKS = {
    "clip_vision": "attention_mask",
    "siglip": "attention_mask",
    "blip": "attention_mask",
    "open_clip": "attn_mask",
    "timm_class_token": "attn_mask",
    "albef_tower": "image_atts",
}


@pytest.mark.parametrize("name", list(MASKS))
def test_a_block_that_gets_a_mask_names_it(name):
    case = build(name) if name != "albef_tower" else None
    model = RegionVit().eval() if case is None else case.model
    handle = patchselect.apply(model, 0.5, guidance="image")
    block = handle.towers[0].blocks[handle.layers[0]]
    if MASKS[name] not in inspect.signature(getattr(type(block), "_patchselect_base", type(block)).forward).parameters:
        pytest.skip(f"blocks of this release take no {MASKS[name]}")
    x = torch.randn(2, 17, handle.towers[0].width)
    mask = torch.zeros(2, 1, 17, 17)
    mask[..., 5:] = -10000.0
    message = rf"was called with {MASKS[name]}, which hides patches.*patchselect\.remove\(model\)"
    with pytest.raises(ValueError, match=message):
        block(x, **{MASKS[name]: mask})
    block(x)


def test_a_causal_tower_of_timm_is_refused():
    case = build("timm_class_token")
    if "is_causal" not in inspect.signature(type(case.model).forward).parameters:
        pytest.skip("this release has no causal attention")
    patchselect.apply(case.model, 0.5, guidance="image")
    with pytest.raises(ValueError, match="was called with is_causal, which hides patches"):
        case.model(case.images(2), is_causal=True)


def regions() -> dict[str, torch.Tensor]:
    """Three regions, two of them of the first image; each sees [CLS] and a few patches."""
    seen = torch.zeros(3, 17)
    seen[:, 0] = seen[0, 1:5] = seen[1, 5:9] = seen[2, 9:13] = 1
    return dict(idx_to_group_img=torch.tensor([0, 0, 1]), image_atts=seen)


@pytest.mark.parametrize("layers", [[1], [1, 3], [5]])
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_regions_of_x_vlm_are_refused_whatever_block_would_see_them(guidance, layers):
    torch.manual_seed(0)
    model = RegionVit().eval()
    with torch.no_grad():
        expected = model(pictures(2), **regions())
        patchselect.apply(model, 0.5, layers, guidance=guidance)
        for given in (regions(), {"image_atts": regions()["image_atts"]}):
            names = " and ".join(name for name in ("image_atts", "idx_to_group_img") if name in given)
            with pytest.raises(ValueError, match=f"RegionVit was called with {names}, which hides patches"):
                model(pictures(2), **given)
        patchselect.apply(model, 0.5, layers, guidance="image")
        assert model(pictures(2)).shape[1] < 17
        patchselect.apply(model, 1.0, layers, guidance="image")
        assert all(map(torch.equal, model(pictures(2), **regions()), expected)), "nothing is selected"


@pytest.mark.parametrize("name", ["timm_class_token", "open_clip"])
def test_symbolic_tracing_is_no_mask(name):
    model = build(name).model
    handle = patchselect.apply(model, 0.5, guidance="image")
    block = handle.towers[0].blocks[handle.layers[0]]
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace.*torch\.export.*patchselect\.remove\(model\)"):
        torch.fx.symbolic_trace(block)
    patchselect.remove(model)
