"""BLIP and ViLT of transformers keep the promises: every head, its tokens, gradients, copies and pictures."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from blip_vilt import BLIP, VILTS, build, call, inputs, lengths, selecting
from checkpointing import Way, switch_on, ways
from since import needs

from patchselect import visualization

needs("transformers", module=True)

every_model = pytest.mark.parametrize("name", [*BLIP, *VILTS])


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_keeping_everything_changes_nothing(name, training):
    """In training too: the extra text runs of BLIP draw their dropout apart."""
    model, given = build(name).train(training), inputs(name)
    reference = call(model, given)
    handle = selecting(model, 1.0)
    assert all(map(torch.equal, call(model, given), reference))
    handle.remove()
    assert all(map(torch.equal, call(model, given), reference))


@every_model
@pytest.mark.parametrize("guidance", ["text", "image", "random"])
@pytest.mark.parametrize("relevance", ["keys", "features"])
def test_tokens_and_one_step(name, guidance, relevance):
    model, given = build(name).train(), inputs(name)
    keys = list(model.state_dict())
    handle = selecting(model, 0.5, guidance=guidance, relevance=relevance)
    assert list(model.state_dict()) == keys
    with handle.record() as trace:
        output = call(model, given)
    runs = 2 if name == "ViltForImagesAndTextClassification" else 1
    prefix = 8 if name in VILTS else 1
    assert [entry.num_tokens for entry in trace] == lengths(prefix) * runs
    assert [entry.num_prefix_tokens for entry in trace] == [prefix] * 2 * runs
    loss = sum(part.float().square().mean() for part in output)
    loss.backward()
    weight = handle.towers[0].adapter.projections(handle.towers[0].blocks[0]).output
    assert loss.isfinite() and weight.grad.abs().sum() > 0


@every_model
def test_a_text_guides_its_own_image_alone(name):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    with handle.record() as trace:
        call(model, given)
    other = given["input_ids"].clone()
    other[1, 1:4] = 7
    with handle.record() as moved:
        call(model, given, input_ids=other)
    for one, two in zip(trace, moved):
        assert (one.relevance != two.relevance).any(dim=1).tolist() == [False, True, False]


@every_model
def test_copies_and_pickles_select_on_their_own(name):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    expected = call(model, given)
    duplicate, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    for other in (duplicate, loaded):
        assert all(map(torch.equal, call(other, given), expected))


def trained(name: str, way: Way | None):
    model, given = build(name).train(), inputs(name)
    selecting(model, 0.5)
    if way is not None:
        switch_on(model, way.options)
    sum(part.float().square().mean() for part in call(model, given)).backward()
    return {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}


@every_model
def test_checkpointing_has_the_same_gradients(name):
    """ViLT's text is in its sequence, and gets its gradient always; BLIP's is one that reentry may lose."""
    expected = trained(name, None)
    dust = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for way in ways("clip"):
        if name in BLIP and not way.carries_text:
            with pytest.raises(RuntimeError, match=way.advice):
                trained(name, way)
            continue
        found = trained(name, way)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=dust)


@pytest.mark.parametrize("name", ["ViltModel", "ViltForImagesAndTextClassification", "BlipForConditionalGeneration"])
def test_a_call_of_the_whole_model_can_be_drawn(name, tmp_path):
    needs("matplotlib")
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    with torch.no_grad(), handle.record() as trace:
        call(model, given)
    photos = given["pixel_values"].reshape(-1, 3, 64, 64)[:3]
    figure = visualization.draw_selection(photos, trace[:2], ["one", "two", "three"], path=tmp_path / "kept.png")
    assert len(figure.get_axes()) == 3 * 4 and (tmp_path / "kept.png").stat().st_size > 10_000
