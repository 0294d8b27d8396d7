"""Language models with a shortened prompt compute what somebody computes who drops the placeholders by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answers import answers_by_hand, extended
from hosts import texts
from hosts.of_prompts import IMAGE, PAD
from prompts_by_hand import by_hand, compare, each, first_of, guided, inputs_of, patched
from since import needs
from torch import Tensor

needs("short prompts", module=True)


@each
@torch.no_grad()
def test_logits_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for rows, words in (((2, 1, 0), (5, 9, 12)), ((1, 1, 1), (5, 9, 12)), ((1, 0, 2), (30, 20, 3))):
        inputs = inputs_of(case, rows, words)
        hand = by_hand(case, twin, inputs, text, first_of(name))
        found = guided(case, text, **inputs).logits
        assert found.shape[1] < inputs["input_ids"].shape[1]
        width = hand["attention_mask"].shape[1]  # padding that all rows keep
        compare(found[:, -width:], twin(**hand).logits, hand["attention_mask"])


@pytest.mark.parametrize(("merge", "fusion"), [(0.5, "mean"), (0.0, "none"), (0.0, "sum")])
@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma"])
@torch.no_grad()
def test_other_ways_of_shortening_the_tower(name, merge, fusion):
    case, twin, handle = patched(name, merge=merge, fusion=fusion, layers=[2])
    text, inputs = texts(case, 3), inputs_of(case)
    hand = by_hand(case, twin, inputs, text, first_of(name))
    compare(guided(case, text, **inputs).logits, twin(**hand).logits, hand["attention_mask"])
    assert handle.plan.merge == merge


@each
@torch.no_grad()
def test_answers_are_those_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text, inputs = texts(case, 3), inputs_of(case)
    hand = by_hand(case, twin, inputs, text, 0, masked=True)
    length, short = inputs["input_ids"].shape[1], hand["attention_mask"].shape[1]

    def next_logits(ids: Tensor) -> Tensor:
        return twin(**extended(twin, hand, ids, first_of(name)), use_cache=False).logits[:, -1]

    for beams, copies in ((1, 1), (2, 1), (2, 2)):
        options: dict[str, Any] = dict(do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=PAD)
        options.update(num_beams=beams, num_return_sequences=copies)
        found = guided(case, text, "generate", **inputs, **options)
        expected = answers_by_hand(next_logits, 3, 20, beams).unflatten(0, (3, beams))[:, :copies].flatten(0, 1)
        assert torch.equal(found[:, :length], inputs["input_ids"].repeat_interleave(copies, dim=0))
        assert torch.equal(found[:, length:], expected)
    assert short < length


@each
def test_a_training_step_is_that_of_dropping_by_hand(name):
    case, twin, _ = patched(name)
    text = texts(case, 3)
    for side in ("left", "right"):
        inputs = inputs_of(case, (1, 1, 1), (5, 9, 12), side=side)
        labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
        labels[torch.arange(3), inputs["attention_mask"].argmax(dim=1)] = -100  # nothing stands before it
        inputs["labels"] = labels
        case.model.train()
        case.model.zero_grad()
        loss = guided(case, text, **inputs).loss
        loss.backward()
        with torch.no_grad():
            expected = loss_by_hand(case, twin, inputs, text, first_of(name))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
        for part in case.model.model.children():  # tower, projector, language model
            assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in part.parameters())


def loss_by_hand(case, twin, inputs, text, first: int) -> Tensor:
    """Mean cross-entropy over all words, each row called alone and without padding."""
    total, count = torch.zeros(()), 0
    for row in range(len(inputs["input_ids"])):
        shown = inputs["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, shown] for key, value in inputs.items() if value.dim() == 2}
        alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
        start = int(shown.nonzero()[0])
        hand = by_hand(case, twin, alone, text[row : row + 1], first + start)
        hand.pop("labels")
        labels = torch.tensor(case.extra["ids"][0])
        logits = twin(**hand).logits[0, :-1]
        wanted = labels[1:] != IMAGE
        total = total + torch.nn.functional.cross_entropy(logits[wanted], labels[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count
