"""Language models with a shortened prompt, answering: `generate` in all its ways, and loops of one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from answers import answers_by_hand, extended
from hosts import build, texts
from hosts.of_prompts import PAD, is_old
from prompts_by_hand import GREEDY, answers, both, by_hand, copy_of, each, guided, inputs_of, patched
from since import needs

import patchselect

needs("short prompts", module=True)


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
