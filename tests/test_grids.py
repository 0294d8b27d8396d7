"""Records know the grid of each call, and a shortened sequence is put back on it, or refused as a grid."""

from __future__ import annotations

import pytest
import torch
from hosts import build, vision_transformer
from since import needs

import patchselect


@pytest.mark.parametrize("name", ["open_clip", "timm_class_token", "open_clip_siglip"])
def test_grids_of_a_shortened_sequence_are_refused(name):
    needs("open_clip intermediates" if name == "open_clip" else "intermediates")
    case = build(name)
    patchselect.apply(case.model, 0.5, guidance="image")
    tower, images = case.tower(case.model), case.images(2)
    with pytest.raises(ValueError, match=r'use output_fmt="NLC", or handle.record\(\)'):
        tower.forward_intermediates(images)
    assert tower.forward_intermediates(images, output_fmt="NLC") is not None
    assert tower.forward_intermediates(images, None, False, False, False, "NLC") is not None
    patchselect.apply(case.model, 1.0, guidance="image")
    tower.forward_intermediates(images)
    patchselect.remove(case.model)
    tower.forward_intermediates(images)


def test_patch_dropout_cannot_be_recorded():
    case = build("open_clip")
    import open_clip

    case.model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    handle = patchselect.apply(case.model, 0.5, guidance="image")
    case.model.train()
    case.image_side(case.model, case.images(2))
    with pytest.raises(ValueError, match="patch dropout is on"), handle.record():
        case.image_side(case.model, case.images(2))


def test_a_record_knows_the_grid_of_each_call_and_none_afterwards():
    needs("intermediates")
    sizes = dict(img_size=64, patch_size=16, embed_dim=48, depth=6, num_heads=4, dynamic_img_size=True)
    model = vision_transformer()(**sizes).eval()
    handle = patchselect.apply(model, 0.5, layers=[1, 4], guidance="image")
    tall, wide = torch.randn(1, 3, 64, 32), torch.randn(1, 3, 32, 64)
    with torch.no_grad(), handle.record() as trace:
        model(tall)
        tokens = model.forward_features(wide)
        model.forward_intermediates(wide, output_fmt="NLC")
        model.blocks[:2](torch.randn(1, 9, 48))
    assert [entry.grid for entry in trace] == [(4, 2), (4, 2), (2, 4), (2, 4), (2, 4), (2, 4), None]
    restored = patchselect.restore(tokens, trace[3])
    assert restored.shape == (1, 2, 4, 48)
    assert torch.equal(restored.flatten(1, 2)[0, trace[3].kept[0, 0]], tokens[0, 1])
    for before in (lambda: None, lambda: model(wide)):
        with pytest.raises(ValueError, match="block 4 selects from what an earlier .*call of the whole tower"):
            with torch.no_grad(), handle.record():
                before()
                model.blocks[4](torch.randn(1, 6, 48))


def test_restore_refuses_what_does_not_fit():
    case = build("clip_vision")
    handle = patchselect.apply(case.model, 0.5, guidance="image")
    with handle.record() as trace:
        tokens = case.model(case.images(2)).last_hidden_state
    with pytest.raises(ValueError, match="the trace is empty"):
        patchselect.restore(tokens, [])
    with pytest.raises(ValueError, match=r"tokens must be the \(2, 7, D\)"):
        patchselect.restore(tokens[:, :5], trace)
    with pytest.raises(ValueError, match="fill must be"):
        patchselect.restore(tokens, trace, fill="nearest")
    fused = patchselect.restore(tokens, trace, fill="fused")
    gone = next(place for place in trace[0].kept[0].tolist() if place not in trace[1].kept[0].tolist())
    assert torch.equal(fused[0].flatten(0, 1)[gone], tokens[0, -1])
    without_prefix = patchselect.restore(tokens[:, 1:], trace, fill="fused")
    assert torch.equal(without_prefix, fused)
