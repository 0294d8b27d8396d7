"""The scenes of the accuracy benchmark show what their boxes, masks and captions say."""

from __future__ import annotations

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
import numpy as np

from benchmarks.accuracy.albef import contrast
from benchmarks.accuracy.world.captions import (
    AND,
    CAPTION_LENGTH,
    EMOJI,
    PAD,
    caption_ids,
    caption_text,
    concepts,
    swap_one,
    unique_captions,
)
from benchmarks.accuracy.world.sampling import Sampler
from benchmarks.accuracy.world.scenes import TEST_PHOTOS, TRAIN_PHOTOS, Layout, backgrounds, make_scenes


def test_a_drawing_is_where_its_box_says(scenes):
    """The same scene without its drawings differs inside of the boxes and nowhere else."""
    empty = make_scenes(1, seed=3, layout=Layout(objects=(0, 0)))
    row = next(i for i in range(len(scenes)) if len(scenes.objects[i]) >= 5)
    assert len(scenes.boxes[row]) == len(scenes.objects[row]) == len(set(scenes.objects[row]))
    assert empty.objects == ((),)
    first = make_scenes(1, seed=3)  # the background is drawn before anything else, so both have the same one
    changed = (first.pixels[0].int() - empty.pixels[0].int()).abs().sum(0) > 0
    inside = torch.zeros(80, 80, dtype=torch.bool)
    for left, top, right, bottom in first.boxes[0]:
        inside[top:bottom, left:right] = True
        assert changed[top:bottom, left:right].float().mean() > 0.2
    assert not changed[~inside].any()


def test_masks_are_the_patches_that_a_box_covers(scenes):
    masks = scenes.patch_masks(0, 10)
    for mask, (left, top, right, bottom) in zip(masks, scenes.boxes[0]):
        full = torch.zeros(80, 80)
        full[top:bottom, left:right] = 1
        share = full.view(10, 8, 10, 8).mean((1, 3)).flatten()
        assert torch.equal(mask, share >= 0.5)


def test_training_and_test_share_no_photograph():
    shown = [{photo.tobytes() for photo in backgrounds(test)} for test in (False, True)]
    assert [len(photos) for photos in shown] == [len(TRAIN_PHOTOS), len(TEST_PHOTOS)]
    assert not shown[0] & shown[1] and not set(TRAIN_PHOTOS) & set(TEST_PHOTOS)


def test_captions_name_what_they_should(scenes):
    assert len(set(concepts())) == len(EMOJI)
    assert caption_text([0, 1, 2]) == "a cactus, a fish and a bicycle"
    ids = caption_ids([0, 31])
    assert len(ids) == CAPTION_LENGTH
    assert [i - AND - 1 for i in ids if i > AND] == [0, 31]
    assert caption_ids([0])[-1] == PAD
    batch = Sampler(scenes, 10, seed=0).draw(16)
    for fitting, other, objects in zip(batch.fitting, batch.other, batch.objects):
        here = set(objects.tolist())
        named, swapped = ({i - AND - 1 for i in ids.tolist() if i > AND} for ids in (fitting, other))
        assert named <= here
        assert len(swapped - here) == 1
        assert len(named) == len(swapped)
    assert swap_one((1,), tuple(range(31)), np.random.default_rng(0)) == (31,)


def test_retrieval_captions_fit_one_scene_alone():
    many = make_scenes(150, seed=9)
    rows, texts = unique_captions(many.objects, 12, seed=0)
    for place, text in enumerate(texts):
        assert [i for i, row in enumerate(rows) if set(text) <= set(many.objects[row])] == [place]
    with pytest.raises(ValueError, match="have a caption of their own"):
        unique_captions(many.objects, 150, seed=0)


def test_false_negatives_are_the_captions_that_truly_fit(scenes):
    batch = Sampler(scenes, 10, seed=1).draw(12)
    found = contrast.fits(batch)
    assert found.diagonal().all()
    for i, objects in enumerate(batch.objects):
        for j, ids in enumerate(batch.fitting):
            assert bool(found[i, j]) == ({k - AND - 1 for k in ids.tolist() if k > AND} <= set(objects.tolist()))
    cleaned = contrast.clean(batch)
    assert torch.equal(contrast.fits(cleaned), torch.eye(len(cleaned.images), dtype=torch.bool))
