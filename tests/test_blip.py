"""What is particular to BLIP of transformers: prompts, captions, questions, and scores of pairs."""

from __future__ import annotations

import pytest
import torch
from blip_vilt import BLIP, build, call, inputs, lengths, selecting
from since import needs

import patchselect

needs("transformers", module=True)


@pytest.mark.parametrize("name", ["BlipForQuestionAnswering", "BlipForConditionalGeneration"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_guided_by_its_question_or_prompt(name, beams):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    given.pop("labels", None)
    given["input_ids"] = given["input_ids"].clone()
    with handle.record() as trace:
        first = model.generate(**given, max_new_tokens=3, num_beams=beams)
    assert [entry.num_tokens for entry in trace] == lengths(1)
    assert first.shape[0] == 3
    handle.remove()
    whole = model.generate(**given, max_new_tokens=3, num_beams=beams)
    selecting(model, 1.0)
    assert torch.equal(model.generate(**given, max_new_tokens=3, num_beams=beams), whole)


@pytest.mark.parametrize("case", ["labels", "no prompt"])
def test_captions_to_learn_and_no_prompt_guide_nothing(case):
    model, given = build("BlipForConditionalGeneration"), inputs("BlipForConditionalGeneration")
    selecting(model, 0.5)
    with pytest.raises(ValueError, match=r"got (labels|no prompt).*patchselect\.guide.*guidance=\"image\""):
        if case == "labels":
            model(**given, labels=given["input_ids"])
        else:
            model.generate(pixel_values=given["pixel_values"], max_new_tokens=2)
    with patchselect.guide(model, torch.randn(3, 64)):
        assert model(**given, labels=given["input_ids"]).loss.isfinite()
        assert model.generate(pixel_values=given["pixel_values"], max_new_tokens=2).shape[0] == 3


def test_a_prompt_is_read_to_its_last_word():
    """Words in the padding do not count, the last one in front of it does."""
    model, given = build("BlipForConditionalGeneration"), inputs("BlipForConditionalGeneration")
    handle = selecting(model, 0.5)
    found = []
    for position in (None, 4, 6):
        ids = given["input_ids"].clone()
        if position is not None:
            ids[1, position] = 50
        with handle.record() as trace:
            call(model, given, input_ids=ids)
        found.append(trace[0].relevance[1])
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_contrastive_score_of_blip_runs_its_text_encoder_once():
    model, given = build("BlipForImageTextRetrieval"), inputs("BlipForImageTextRetrieval")
    selecting(model, 0.5, pairing="paired")
    runs = []
    model.text_encoder.encoder.register_forward_hook(lambda *args: runs.append(1))
    call(model, given, use_itm_head=False)
    assert len(runs) == 1
    call(model, given)
    assert len(runs) == 3


def test_a_wider_blip_tower_is_reached_through_the_joint_space():
    model, given = build("BlipForImageTextRetrieval", 96), inputs("BlipForImageTextRetrieval")
    handle = selecting(model, 0.5)
    with handle.record() as trace:
        call(model, given)
    assert len(trace) == 2
    with pytest.raises(ValueError, match="images of width 96 and has no joint space"):
        patchselect.apply(build("BlipForQuestionAnswering", 96))
    patchselect.apply(build("BlipForQuestionAnswering", 96), guidance="image")


def test_the_dual_encoder_of_blip_scores_pairs_by_its_cosine():
    model, given = build("BlipModel"), inputs("BlipModel")
    selecting(model, 0.5)
    texts = {name: given[name] for name in ("input_ids", "attention_mask")}
    expected = torch.empty(3, 3)
    with torch.no_grad():
        for i in range(3):
            for j in range(3):
                pair = {name: value[j : j + 1] for name, value in texts.items()}
                out = model(pixel_values=given["pixel_values"][i : i + 1], **pair)
                expected[i, j] = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        features = model.get_text_features(**texts)
    found = patchselect.score_pairs(model, given["pixel_values"], texts, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    features = getattr(features, "pooler_output", features)
    found = patchselect.score_pairs(model, given["pixel_values"], features, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "BlipForQuestionAnswering"])
def test_heads_that_score_no_pairs_say_so(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    for texts in (given["input_ids"], torch.randn(3, 64)):
        with pytest.raises(ValueError, match=f"{name} has no image-text matching head"):
            patchselect.score_pairs(model, given["pixel_values"], texts)


@pytest.mark.parametrize("name", ["BlipModel", "BlipForImageTextRetrieval"])
def test_padding_of_bare_ids_is_no_word(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    texts = {name: given[name] for name in ("input_ids", "attention_mask")}
    texts["input_ids"][1, 5:] = model.config.text_config.pad_token_id
    expected = patchselect.score_pairs(model, given["pixel_values"], texts, progress=False)
    found = patchselect.score_pairs(model, given["pixel_values"], texts["input_ids"], progress=False)
    torch.testing.assert_close(found, expected)
    every = {**texts, "attention_mask": torch.ones_like(texts["input_ids"])}
    words = patchselect.score_pairs(model, given["pixel_values"], every, progress=False)
    assert (words - expected)[:, 1].abs().min() > 1e-4


@pytest.mark.parametrize("name", BLIP[1:])
def test_every_image_with_every_text_is_refused_where_a_row_reads_its_own_text(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    calls = [lambda: model(**given)]
    if name != "BlipForImageTextRetrieval":
        prompt = {key: given[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        calls += [lambda: model.generate(**prompt, max_new_tokens=2)]
    with torch.no_grad(), patchselect.guide(model, torch.randn(2, 64), pairing="all"):
        for attempt in calls:
            with pytest.raises(ValueError, match=r'pairing="all" gives a row per image and text.*repeat_interleave'):
                attempt()
        assert model.vision_model(given["pixel_values"]).last_hidden_state.shape[0] == 6
    repeated = {key: value.repeat_interleave(2, dim=0) for key, value in given.items()}
    with torch.no_grad(), patchselect.guide(model, torch.randn(2, 64).repeat(3, 1)):
        call(model, repeated)
