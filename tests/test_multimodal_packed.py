"""Hosts that pack images into one sequence (Qwen-VL) against a computation by hand: logits, answers, loss."""

from __future__ import annotations

from typing import Any

import torch
from answers import answers_by_hand
from hosts import build, texts
from hosts.of_prompts import IMAGE, PAD, is_old, packed_prompts
from packed_by_hand import GRIDS, RATE, WORDS, each, guided, logits_by_hand, patched, prompt_by_hand
from since import needs
from torch import Tensor

import patchselect

needs("short prompts", module=True)


@each
@torch.no_grad()
def test_logits_are_those_of_dropping_by_hand(name):
    for guidance in ("text", "image"):
        case, twin, _ = patched(name, guidance=guidance)
        text = texts(case, 3) if guidance == "text" else None
        for grids, words in (
            (GRIDS, WORDS),
            *([([[], [(2, 2)], [(8, 4)]], [3, 3, 4]), ([[(4, 4)]] * 3, [5, 5, 5])] if text is not None else ()),
        ):
            inputs = packed_prompts(grids, words)
            hand = prompt_by_hand(twin, inputs, text)
            found, expected = guided(case, text, **inputs).logits, logits_by_hand(twin, hand)
            seen = hand["attention_mask"].bool()
            found = found[:, -seen.shape[1] :]  # padding that all rows keep
            largest = float(expected[seen].abs().max())
            torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-5 * largest)


@each
@torch.no_grad()
def test_answers_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text, inputs = texts(case, 3), packed_prompts(GRIDS, WORDS)
    hand = prompt_by_hand(twin, inputs, text)
    never = (2, IMAGE - 1, IMAGE)  # min_new_tokens, suppress_tokens

    def expected(beams: int) -> Tensor:
        return answers_by_hand(lambda ids: logits_by_hand(twin, hand, ids)[:, -1], 3, 20, beams, never)

    answer = expected(1)
    options: dict[str, Any] = dict(
        do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=PAD, suppress_tokens=[IMAGE - 1, IMAGE]
    )
    whole = inputs["input_ids"].shape[1]
    for more in ({}, {"prefill_chunk_size": 5}, {"use_cache": False}):
        found = guided(case, text, "generate", **inputs, **options, **more)
        assert torch.equal(found[:, :whole], inputs["input_ids"])
        assert torch.equal(found[:, whole:], answer), more
    answer = expected(2)
    for copies in (1, 2):
        found = guided(case, text, "generate", **inputs, **options, num_beams=2, num_return_sequences=copies)
        assert torch.equal(found[:, whole:], answer.unflatten(0, (3, 2))[:, :copies].flatten(0, 1))


@each
@torch.no_grad()
def test_loops_of_ones_own_go_on_from_the_short_cache(name):
    case, _, _ = patched(name)
    text, inputs = texts(case, 3), packed_prompts([[(6, 8)], [(6, 8)], [(6, 8)]], [5, 5, 5])
    more = torch.randint(3, 90, (3, 3), generator=torch.Generator().manual_seed(1))
    other = packed_prompts([[(4, 4)]], [4])
    longer = with_words(inputs, more)
    expected = guided(case, text, **longer).logits[:, -3:]
    for mask in (None, longer["attention_mask"]):
        cache = guided(case, text, **inputs, use_cache=True).past_key_values
        guided(case, text[:1], **other)  # the model remembers the positions of another prompt now
        found = case.model(input_ids=more, past_key_values=cache, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for prompt in (inputs, *([packed_prompts(GRIDS, WORDS)] if is_old() else [])):  # by what the model remembers
        short = guided_short(case, text, prompt)
        cache = case.model(**short, use_cache=True).past_key_values
        given, place = {}, cache.get_seq_length()
        if is_old():  # which counts from columns, and takes a mask with padding
            given["cache_position"] = torch.arange(place, place + 3)
            given["attention_mask"] = torch.cat([short["attention_mask"], torch.ones_like(more)], dim=1)
        found = case.model(input_ids=more, past_key_values=cache, **given).logits
        expected = guided(case, text, **with_words(prompt, more)).logits[:, -3:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    short = guided_short(case, text, inputs, generate=True)
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    tail = guided(case, text, "generate", **inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(case.model.generate(**short, **options)[:, short["input_ids"].shape[1] :], tail)


def with_words(inputs: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """Return a call with more words `(B, t)` at the end of each prompt."""
    tails = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": torch.zeros_like(more)}
    longer = {key: torch.cat([inputs[key], tail], dim=1) for key, tail in tails.items() if key in inputs}
    return {**inputs, **longer}


def guided_short(case, text, inputs, **options: Any) -> dict[str, Any]:
    with patchselect.guide(case.model, text):
        return patchselect.shorten(case.model, **options, **inputs)


@each
@torch.no_grad()
def test_nothing_kept_back_and_nothing_left_behind(name):
    case = build(name)
    inputs, text = packed_prompts(GRIDS, WORDS), texts(case, 3)
    expected, answer = case.model(**inputs).logits, case.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    handle = patchselect.apply(case.model, 1.0)
    for _ in range(2):
        with handle.record() as trace:
            assert torch.equal(guided(case, text, **inputs).logits, expected)
        assert trace[0].images is not None and [entry.grid for entry in trace[0].images] == [(6, 8), (4, 12), (6, 8)]
        assert torch.equal(guided(case, text, "generate", **inputs, max_new_tokens=5, do_sample=False), answer)
    handle = patchselect.apply(case.model, RATE)
    guided(case, text, **inputs)
    handle.remove()
    assert torch.equal(case.model(**inputs).logits, expected)
    assert not any("patchselect" in key for part in case.model.modules() for key in vars(part))


@each
def test_a_training_step_is_that_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for side, checkpointed in (("left", False), ("right", False), ("left", True)):
        inputs = packed_prompts(GRIDS, WORDS, side)
        labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
        labels[torch.arange(3), inputs["attention_mask"].argmax(dim=1)] = -100  # nothing stands before it
        case.model.train()
        case.model.zero_grad()
        if checkpointed:
            case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = guided(case, text, **inputs, labels=labels).loss
        loss.backward()
        hand = prompt_by_hand(twin, inputs, text)
        logits = logits_by_hand(twin, hand)[:, :-1]
        wanted = hand["input_ids"].masked_fill((hand["input_ids"] == IMAGE) | (hand["attention_mask"] == 0), -100)[
            :, 1:
        ]
        wanted = wanted.masked_fill(hand["attention_mask"][:, :-1] == 0, -100)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
        twin.zero_grad()
        expected.backward()
        for (path, weight), own in zip(case.model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(weight.grad, own.grad, rtol=1e-3, atol=1e-5, msg=path)
