"""Calls of language models with a shortened prompt, in all the ways of calling them: right, or refused in words."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from answers import answers_by_hand, extended
from hosts import build, texts
from hosts.of_prompts import IMAGE, PAD, is_old, prompts
from since import needs
from test_multimodal import by_hand, compare, each, encoded, guided, inputs_of, patched

import patchselect

needs("short prompts", module=True)

both = pytest.mark.parametrize("name", ["llava", "paligemma"])
GREEDY = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=PAD)


def answers(case, text, inputs, **options: Any) -> torch.Tensor:
    found = guided(case, text, "generate", **inputs, **{**GREEDY, **options})
    return found[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else found


@each
@torch.no_grad()
def test_a_rate_of_one_and_removing_are_bit_equal(name):
    case = build(name)
    inputs, text = inputs_of(case), texts(case, 3)
    logits = case.model(**inputs).logits
    ids = case.model.generate(**inputs, **GREEDY)
    handle = patchselect.apply(case.model, 1.0)
    assert torch.equal(guided(case, text, **inputs).logits, logits)
    assert torch.equal(guided(case, text, "generate", **inputs, **GREEDY), ids)
    patchselect.apply(case.model, 0.5)
    assert guided(case, text, **inputs).logits.shape != logits.shape
    patchselect.remove(case.model)
    assert torch.equal(case.model(**inputs).logits, logits)
    assert torch.equal(case.model.generate(**inputs, **GREEDY), ids)
    assert not any("patchselect" in key for part in case.model.modules() for key in vars(part))
    handle.remove()


@both
@torch.no_grad()
def test_ways_of_generating_agree(name):
    case, _, _ = patched(name)
    inputs, text = inputs_of(case), texts(case, 3)
    expected = answers(case, text, inputs)
    for options in (
        dict(cache_implementation="static"),
        dict(use_cache=False),
        dict(prompt_lookup_num_tokens=2),
        dict(prefill_chunk_size=7),
    ):
        given, few = inputs, text
        if "prompt_lookup_num_tokens" in options:  # one row at a time, says transformers
            given = {k: v[1:2, inputs["attention_mask"][1].bool()] for k, v in inputs.items() if v.dim() == 2}
            given["pixel_values"], few = inputs["pixel_values"][2:], text[1:2]
        if name == "paligemma" and "prefill_chunk_size" in options:  # chunks cut its look ahead, selection or not
            if not is_old():  # which takes no chunks of images
                assert not torch.equal(*answers_of_host(case, inputs, options))
            continue
        found, wanted = answers(case, few, given, **options), expected[1:2] if few is not text else expected
        if name == "paligemma" and is_old() and few is text:  # its masks are others then, selection or not
            assert not torch.equal(*answers_of_host(case, inputs, options))
            wanted = answers_with_prefix(case, text, inputs, 0 if "cache_implementation" in options else 999)
        assert torch.equal(found, wanted), options


def answers_of_host(case, inputs, options: dict[str, Any]) -> list[torch.Tensor]:
    """What the unpatched model answers, without these options and with them."""
    twin, length = copy_of(case), inputs["input_ids"].shape[1]
    return [twin.generate(**inputs, **GREEDY, **more)[:, length:] for more in ({}, options)]


def answers_with_prefix(case, text, inputs, prefix: int) -> torch.Tensor:
    """Answers by hand, where the first `prefix` columns see each other."""
    twin = copy_of(case)
    hand = by_hand(case, twin, inputs, text, 0, masked=True)
    return answers_by_hand(lambda ids: twin(**extended(twin, hand, ids, 1, prefix)).logits[:, -1], 3, 12)


def copy_of(case):
    twin = copy.deepcopy(case.model)
    patchselect.remove(twin)
    return twin


@both
@torch.no_grad()
def test_what_generate_returns_counts_the_whole_prompt(name):
    case, _, _ = patched(name)
    inputs, text = inputs_of(case), texts(case, 3)
    length = inputs["input_ids"].shape[1]
    expected = answers(case, text, inputs)
    config = copy.deepcopy(case.model.generation_config)
    config.update(max_length=length + 12, min_length=length + 12, do_sample=False, pad_token_id=PAD)
    for options in (dict(max_length=length + 12, min_length=length + 12, do_sample=False, pad_token_id=PAD),
                    dict(generation_config=config)):  # fmt: skip
        assert torch.equal(guided(case, text, "generate", **inputs, **options)[:, length:], expected)
    assert config.max_length == length + 12, "the caller's own"
    with patchselect.guide(case.model, text):
        found = case.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
        sampled = case.model.generate(**inputs, **{**GREEDY, "do_sample": True}, num_return_sequences=3)
        again = case.model.generate(
            inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, **GREEDY
        )
    assert torch.equal(found.sequences[:, length:], expected) and torch.equal(again[:, length:], expected)
    assert torch.equal(found.sequences[:, :length], inputs["input_ids"])
    assert found.past_key_values.get_seq_length() < length - 8 + 12, "the cache is as short as the prompt"
    assert torch.equal(sampled[:, :length], inputs["input_ids"].repeat_interleave(3, dim=0))
    with pytest.raises(ValueError, match="generate from prompts that patchselect.shorten"):
        case.model.generate(input_ids=found.sequences, past_key_values=found.past_key_values, max_new_tokens=2)


@both
@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_from_the_short_cache(name):
    case, _, _ = patched(name)
    inputs, text = inputs_of(case, (1, 1), (7, 7)), texts(case, 2)
    assert inputs["attention_mask"].all()
    expected = answers(case, text, inputs)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    for step in range(6):
        if step == 0:
            out = guided(case, text, **inputs, use_cache=True)
            length = out.past_key_values.get_seq_length()
            assert length == inputs["input_ids"].shape[1] - 16 + 6
        else:
            more = {} if name == "llava" else {"token_type_ids": torch.ones_like(ids)}
            out = case.model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **more)
            assert out.past_key_values.get_seq_length() == length + step
        logits = out.logits[:, -1]
        logits[:, 2] = -torch.inf
        ids = logits.argmax(dim=-1, keepdim=True)
        assert torch.equal(ids, expected[:, step : step + 1])
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


@both
@torch.no_grad()
def test_a_loop_with_padding_starts_from_the_short_prompt(name):
    case, _, _ = patched(name)
    inputs, text = inputs_of(case), texts(case, 3)
    expected = answers(case, text, inputs)
    out = guided(case, text, **inputs, use_cache=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="with padding it must be cut alike"):
        case.model(input_ids=expected[:, :1], attention_mask=mask, past_key_values=out.past_key_values)
    with patchselect.guide(case.model, text):
        short = patchselect.shorten(case.model, **inputs)
        for_answers = patchselect.shorten(case.model, generate=True, **inputs)
    assert short["input_ids"].shape == short["attention_mask"].shape == short["position_ids"].shape
    assert torch.equal(case.model(**short).logits, out.logits)
    found = case.model.generate(**for_answers, **GREEDY)
    assert torch.equal(found[:, for_answers["input_ids"].shape[1] :], expected)


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


@both
@torch.no_grad()
def test_a_wrong_split_between_rows_is_refused_by_its_row(name):
    case, _, _ = patched(name, guidance="image")
    inputs = inputs_of(case, (1, 1), (7, 7))
    ids = inputs["input_ids"]
    moved = ids.clone()  # as many placeholders as before, one of them in the other row
    moved[0, (ids[0] == IMAGE).nonzero()[-1]] = 5
    moved[1, (ids[1] != IMAGE).nonzero()[-1]] = IMAGE
    twin = copy_of(case)
    assert twin(**{**inputs, "input_ids": moved}).logits is not None, "transformers compares the sums"
    for method in (case.model, case.model.generate):
        with pytest.raises(ValueError, match="row 0 of the prompts has 15 image placeholders"):
            method(**{**inputs, "input_ids": moved})
    fewer = ids.clone()
    fewer[1][fewer[1] == IMAGE] = 5
    with pytest.raises(ValueError, match="2 images came, and the 2 rows of the prompts have placeholders for 1"):
        case.model(**{**inputs, "input_ids": fewer})
    with pytest.raises(ValueError, match="row 1 of the prompts has 16 image placeholders.*no image is left"):
        case.model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    encoded = case.model.get_image_features(pixel_values=inputs["pixel_values"])
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="come encoded in mm_encoder_outputs: give their pixels"):
        case.model(**rest, mm_encoder_outputs={"image": encoded})
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
        case.model(**inputs, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_other_releases_are_refused_by_name(name, monkeypatch):
    import patchselect.adapters.readers as readers

    case = build(name)
    transformers = sys.modules["transformers"]
    monkeypatch.setattr(readers, "takes_encoded", lambda core: False)
    for release in ("4.53.3", "5.10.0"):
        monkeypatch.setattr(transformers, "__version__", release)
        message = rf"of transformers {release} does not take encoded images.*use transformers 4\.57, or 5\.23 and newer"
        with pytest.raises(TypeError, match=message):
            patchselect.apply(case.model, 0.5)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert patchselect.apply(case.model, 0.5, guidance="image")


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


@torch.no_grad()
def test_what_cannot_be_cut_is_refused():
    case, _, _ = patched("llava", guidance="image")
    inputs = inputs_of(case, (1, 1), (7, 7))
    length = inputs["input_ids"].shape[1]
    for message, more in (
        ("logits_to_keep as a tensor", dict(logits_to_keep=torch.tensor([1, 2]))),
        ("weights is as long as the prompt", dict(weights=torch.ones(2, length))),
        (r"attention_mask must be \(rows, columns\)", dict(attention_mask=torch.ones(2, 1, length, length))),
        ("image_sizes is for towers", dict(image_sizes=torch.tensor([[64, 64]] * 2))),
        ("would get tokens that nobody has selected", dict(vision_feature_layer=1)),
        ("pixel_values must be", dict(pixel_values=inputs["pixel_values"][None])),
    ):
        with pytest.raises(ValueError, match=message):
            case.model(**{**inputs, **more})
    first = case.model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="this call brings images: a prompt with images starts a new cache"):
        case.model(**inputs, past_key_values=first.past_key_values)
    with pytest.raises(
        ValueError, match=r"select in block 5, and the language model reads the vision tower after block 4"
    ):
        patchselect.apply(case.model, 0.5, layers=[1, 5], guidance="image")
    short = prompts((1, 1), (7, 7), 17)
    with pytest.raises(ValueError, match="row 0 of the prompts has 17 image placeholders"):
        case.model(**short)
    assert case.model(**short, vision_feature_select_strategy="full").logits is not None
