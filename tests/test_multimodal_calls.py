"""Language models with a shortened prompt, called once: every way of giving prompt, positions and texts."""

from __future__ import annotations

import pytest
import torch
from hosts import build, texts
from hosts.of_prompts import IMAGE
from prompts_by_hand import GREEDY, answers, both, by_hand, compare, copy_of, each, encoded, guided, inputs_of, patched
from since import needs

import patchselect

needs("short prompts", module=True)


@each
@torch.no_grad()
def test_positions_are_the_old_ones_or_counted_anew(name):
    first = int(name == "paligemma")
    case, twin, _ = patched(name, guidance="image")
    inputs = inputs_of(case, (1, 1), (5, 9))
    seen: list[torch.Tensor] = []
    core = case.model.model
    language = getattr(core, "language_model", getattr(core, "text_model", None))
    language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    old = case.model(**inputs).logits
    start = (inputs["input_ids"][0] == IMAGE).int().argmax().item()
    places = encoded(case, inputs)[1][0]
    found = seen[0][0][-len(places) - 4 : -4].tolist()
    assert found == [first + start + place for place in places]
    assert seen[0][0, -1] == first + inputs["input_ids"].shape[1] - 1
    patchselect.apply(case.model, 0.5, guidance="image", positions="renumbered")
    new = case.model(**inputs).logits
    assert (seen[1][0].diff() == 1).all() and not torch.equal(old, new)
    hand = by_hand(case, twin, inputs, None, first, renumber=True)
    hand["position_ids"] = seen[1][:, -hand["attention_mask"].shape[1] :]
    compare(new[:, -hand["attention_mask"].shape[1] :], twin(**hand).logits, hand["attention_mask"])


@both
@torch.no_grad()
def test_other_ways_of_calling_forward(name):
    case, _, _ = patched(name)
    inputs, text = inputs_of(case, (1, 1), (7, 7)), texts(case, 2)
    expected = guided(case, text, **inputs).logits
    without_mask = {k: v for k, v in inputs.items() if k != "attention_mask"}
    torch.testing.assert_close(guided(case, text, **without_mask).logits, expected)  # jumps are no packed sequences
    torch.testing.assert_close(guided(case, text, **without_mask, use_cache=False).logits, expected)
    embeds = case.model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": embeds}
    torch.testing.assert_close(guided(case, text, **by_embeds).logits, expected)
    torch.testing.assert_close(guided(case, text, **inputs, logits_to_keep=3).logits, expected[:, -3:])
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1) + int(name == "paligemma")
    torch.testing.assert_close(guided(case, text, **inputs, position_ids=positions).logits, expected)
    with patchselect.guide(case.model, text):
        torch.testing.assert_close(case.model.model(**inputs).last_hidden_state.shape[1], expected.shape[1])
        as_tuple = case.model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)
    cache = next(part for part in as_tuple if hasattr(part, "get_seq_length"))
    step = case.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)  # counts from the whole prompt
    assert cache.get_seq_length() == expected.shape[1] + 1 and step.logits.shape[1] == 1
    words = {"input_ids": inputs["input_ids"][:, -6:], "attention_mask": inputs["attention_mask"][:, -6:]}
    assert torch.equal(case.model(**words).logits, copy_of(case)(**words).logits), "no image, no text needed"
    if name == "llava":
        ids = guided(case, text, "generate", **by_embeds, **GREEDY)
        assert torch.equal(ids, answers(case, text, inputs))


@torch.no_grad()
def test_a_text_of_a_prompt_guides_all_of_its_images():
    case, _, handle = patched("llava")
    inputs = inputs_of(case, (2, 0, 1), (5, 4, 3))
    text = texts(case, 3)
    kept = {}
    for kind, given in (("prompt", text), ("image", text[[0, 0, 2]]), ("other", text[[1, 1, 1]])):
        with handle.record() as trace:
            guided(case, given, **inputs)
        kept[kind] = trace[0].kept
    assert kept["prompt"].shape == (3, 8)
    assert not torch.equal(kept["prompt"], kept["other"])
    with patchselect.guide(case.model, text[[0, 0, 2]]), handle.record() as trace:
        case.model.get_image_features(pixel_values=inputs["pixel_values"])
    assert torch.equal(trace[0].kept, kept["prompt"])
    with pytest.raises(ValueError, match="2 texts for 3 prompts with 3 images"):
        guided(case, text[:2], **inputs)
    with pytest.raises(ValueError, match="no text guides this call"):
        case.model(**inputs)
    more = inputs_of(case, (3, 0), (5, 4))
    with handle.record() as trace:
        guided(case, text, **more)  # two prompts, three images, three texts: one an image
        guided(case, text[:1], **more)
    assert len({tuple(row) for row in trace[0].relevance.mul(1e4).int().tolist()}) == 3
    with patchselect.guide(case.model, text, pairing="shared"):
        case.model(**more)
    with patchselect.guide(case.model, text, pairing="all"), pytest.raises(ValueError, match='leave out pairing="all"'):
        case.model(**more)


@torch.no_grad()
def test_a_short_prompt_that_nothing_is_taken_out_of():
    """In a release that takes no encoded images too, whose calls would drop them unseen."""
    case = build("llava")
    inputs = inputs_of(case)
    logits, ids = case.model(**inputs).logits, case.model.generate(**inputs, **GREEDY)
    patchselect.apply(case.model, 1.0, guidance="image")
    short = patchselect.shorten(case.model, **inputs)
    torch.testing.assert_close(case.model(**short).logits, logits)
    torch.testing.assert_close(case.model.model(**short).last_hidden_state.shape, logits[..., :32].shape)
    assert torch.equal(case.model.generate(**patchselect.shorten(case.model, generate=True, **inputs), **GREEDY), ids)
