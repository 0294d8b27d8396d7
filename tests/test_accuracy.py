"""The mini-ALBEF of the accuracy benchmark: its methods spend alike, and its arms train what their names say."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

import patchselect
from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.albef import base, curves, scratch
from benchmarks.accuracy.albef.arms import (
    MERGING,
    METHODS,
    first_of,
    lengthwise,
    reduced,
    selecting,
    smaller_side,
    spent,
    vision_flops,
)
from benchmarks.accuracy.albef.evaluate import Questions, match_logits, matching_hits, patch_recall, retrieval
from benchmarks.accuracy.albef.model import LAYERS, PATCH, MiniAlbef, Shape
from benchmarks.accuracy.albef.train import Arm, matching_loss, pretrain, region_words, selection_inputs, tune
from benchmarks.accuracy.world.captions import CAPTION_LENGTH, EMOJI, captions
from benchmarks.accuracy.world.sampling import Sampler


@pytest.fixture(scope="module")
def questions():
    return Questions.make(8, 4, seed=5)


@pytest.fixture
def model(any_size):
    torch.manual_seed(0)
    return MiniAlbef().eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep_rate", [0.5, 0.15])
def test_every_method_spends_what_text_guidance_spends(method, keep_rate, model, questions, flops):
    """Tokens out of the encoder, and the model unchanged afterwards."""
    with torch.inference_mode():
        plain = model.encode_image(questions.images)
        text = model.text(questions.fitting)[:, 0]
        with reduced(model, method, keep_rate) as encode:
            tokens = encode(questions.images, text)
        assert torch.equal(model.encode_image(questions.images), plain)
    if method in ("text", "image", "random"):
        kept = patchselect.num_kept(1 + patchselect.num_kept(100, keep_rate), keep_rate)
        assert tokens.shape[1] == 2 + kept
    elif method != "downsampled":
        counted = vision_flops(80, keep_rate, method=method)
        # Merging that is spread evenly cannot reach the least; one patch more for a text that protects is four tokens.
        slack = {("tome", 0.15): 0.06, ("quarter", 0.15): 0.02}.get((method, keep_rate), 0.01)
        assert counted == pytest.approx(vision_flops(80, keep_rate), rel=slack)
        if method in MERGING:
            tower = lengthwise(100)
            removed = tower.merged_like(spent(tower, keep_rate), first_of(method))
            assert tokens.shape[1] == tower.merged(removed, first_of(method))[-1][1]
    else:
        side = smaller_side(80, keep_rate)
        assert tokens.shape[1] == 1 + (side // PATCH) ** 2
        assert vision_flops(side, 1.0) == pytest.approx(vision_flops(80, keep_rate), rel=0.15)  # whole patches only


def test_without_reduction_a_method_is_the_model_itself(model, questions):
    with reduced(model, "none") as encode, torch.inference_mode():
        expected = model(questions.images, questions.fitting)
        found = match_logits(model, encode, questions.images, questions.fitting)
    torch.testing.assert_close(found, expected[:, 1] - expected[:, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="method must be one of"):
        with reduced(model, "magic"):
            pass


def test_patch_recall_counts_the_patches_of_named_objects(model, questions):
    assert patch_recall(model, "random", 1.0, questions) == 1.0
    half = patch_recall(model, "random", 0.5, questions)
    assert 0.2 < half < 0.8


def test_losses_over_boxes_follow_the_surviving_patches(model, scenes):
    batch = Sampler(scenes, 10, seed=2).draw(4)
    handle = patchselect.apply(model.vision, 0.5, LAYERS, relevance="keys")
    with handle.record() as trace, patchselect.guide(model.vision, model.text(batch.fitting)[:, 0]):
        tokens = model.encode_image(batch.images)
    handle.remove()
    patches, left = scratch.surviving(tokens, batch, scratch.own_tokens(trace[-1]))
    assert left.masks.shape == (4, batch.masks.shape[1], patches.shape[1])
    kept = trace[-1].kept
    for row in range(4):
        alive = [place for place in kept[row].tolist() if place >= 0]
        assert torch.equal(left.masks[row].sum(-1), batch.masks[row][:, alive].sum(-1))
    assert not left.masks[..., -1].any()  # the fused token
    assert scratch.surviving(tokens, batch, None)[1] is batch


def test_a_merged_token_is_of_what_most_of_its_patches_are_of(model, scenes):
    batch = Sampler(scenes, 10, seed=2).draw(4)
    handle = selecting(model, "merged", 0.5)
    with handle.record() as trace, patchselect.guide(model.vision, model.text(batch.fitting)[:, 0]):
        tokens = model.encode_image(batch.images)
    handle.remove()
    holders = scratch.own_tokens(trace[-1])
    patches, left = scratch.surviving(tokens, batch, holders)
    assert (torch.bincount(holders[holders >= 0]) > 4).any(), "nothing has merged"
    for row, thing in product(range(4), range(batch.masks.shape[1])):
        for token in range(patches.shape[1]):
            inside = batch.masks[row, thing][holders[row] == token].float()
            assert bool(left.masks[row, thing, token]) == bool(len(inside) and inside.mean() > 0.5)


@pytest.mark.parametrize("shape", [Shape(depth=12), Shape(registers=4)], ids=str)
@pytest.mark.parametrize("method", ["text", "front", "once", "merged", "protected", "quarter"])
def test_other_shapes_spend_alike_and_are_loaded_as_they_were(shape, method, tmp_path, flops):
    model = MiniAlbef(shape=shape).eval()
    base.save(model, tmp_path / f"albef-5{shape}.pt")
    again = base.base(5, tmp_path, shape=shape)
    assert again.shape == shape and len(again.vision.blocks) == shape.depth
    assert again.vision.num_prefix_tokens == shape.prefix
    counted = vision_flops(80, 0.3, method=method, shape=shape)
    assert counted == pytest.approx(vision_flops(80, 0.3, shape=shape), rel=0.015)
    with pytest.raises(FileNotFoundError, match=f"--seed 6 {' '.join(base.arguments(shape))} "):
        base.base(6, tmp_path, shape=shape)


def test_words_are_asked_of_every_patch_of_a_box_and_of_no_other(model, scenes):
    batch = Sampler(scenes, 10, seed=3).draw(4, captions=3)
    assert batch.fitting.shape == batch.other.shape == (12, CAPTION_LENGTH) and batch.named.shape == (12, 100)
    with torch.no_grad():
        words = model.text(captions([[concept] for concept in range(len(EMOJI))]))[:, 2]
    patches = torch.zeros(4, 100, words.shape[1])
    row, thing, patch = batch.masks.nonzero(as_tuple=True)
    patches[row, patch] = words[batch.objects[row, thing]]
    right = region_words(model, patches, batch)
    chance = region_words(model, patches.roll(1, 0), batch)
    assert right < chance
    patches[~batch.masks.any(1)] = torch.randn(words.shape[1])  # what no box covers does not count
    torch.testing.assert_close(region_words(model, patches, batch), right)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_base_trains_the_joint_space_in_its_second_stage(aligned, model, scenes):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pretrain(model, Sampler(scenes, 10, seed=4), 12, 4, 1e-3, aligned)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"vision.blocks.0.attn.qkv.weight", "matching.weight"} <= changed
    assert ("vision_proj.weight" in changed) == ("text_proj.weight" in changed) == aligned
    with pytest.raises(ValueError, match="is not patched"):
        patchselect.handle_of(model.vision)


def test_selection_layers_are_watched_and_left_alone(model, scenes):
    images = scenes.images(slice(0, 2))
    with torch.no_grad(), selection_inputs(model) as seen:
        model.encode_image(images)
        model.vision.blocks[LAYERS[0]](seen[0])
    assert [one.shape[:2] for one in seen] == [(2, 101)] * 3 and torch.equal(seen[2], seen[0])
    model.encode_image(images)
    assert len(seen) == 3


@pytest.mark.parametrize("arm", curves.ARMS, ids=str)
def test_every_arm_trains_what_it_says(arm, model, scenes):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, Sampler(scenes, 10, seed=4), arm, 12, 4, seed=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "vision.blocks.0.attn.qkv.weight" in changed
    with pytest.raises(ValueError, match="is not patched"):
        patchselect.handle_of(model.vision)
    through_joint_space = arm.aligned or arm.guidance == "values"
    assert ("vision_proj.weight" in changed) == through_joint_space


def test_the_committed_base_is_what_its_record_says(any_size):
    """Loads, is small, and answers about as well as it did when it was committed."""
    path = CHECKPOINTS / "albef-0.pt"
    assert path.stat().st_size < 2_000_000
    model = base.base(0, folder=CHECKPOINTS)
    asked = Questions.make(64, 16, seed=5)
    with reduced(model, "none") as encode:
        assert matching_hits(model, encode, asked).float().mean() > 0.85
        assert retrieval(model, encode, asked)["image_to_text"][1] > 50
    with reduced(model, "text", 0.5) as guided:
        text = matching_hits(model, guided, asked).float().mean()
    with reduced(model, "random", 0.5) as guided:
        assert text > matching_hits(model, guided, asked).float().mean()
    assert patch_recall(model, "text", 0.3, asked) > 0.7
    with pytest.raises(FileNotFoundError, match="accuracy train --seed 99"):
        base.base(99)


def test_matching_loss_knows_which_half_fits():
    sure = torch.tensor([[-9.0, 9.0], [9.0, -9.0]])
    assert matching_loss(sure) < 1e-6
    assert matching_loss(sure.flip(0)) > 10
    assert str(Arm("text", aligned=True)) == "text + alignment"
