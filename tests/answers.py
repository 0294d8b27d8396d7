"""Answers computed by hand, greedily or with beams: the whole sequence in each step, without a cache."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from hosts.of_prompts import is_old
from torch import Tensor


def answers_by_hand(
    next_logits: Callable[[Tensor], Tensor], rows: int, steps: int, beams: int = 1, never: Sequence[int] = (2,)
) -> Tensor:
    """Return the `beams` best answers `(rows * beams, steps)` of each row, the best first.

    Args:
        next_logits: from answers so far `(rows * beams, t)` to the logits `(rows * beams, V)` of what comes next.
        rows: how many prompts there are.
        steps: how long answers are.
        beams: how many answers are followed; 1 is greedy.
        never: tokens that no answer has.
    """
    ids = torch.zeros(rows * beams, 0, dtype=torch.long)
    scores = torch.full((rows, beams), -torch.inf)
    scores[:, 0] = 0
    for _ in range(steps):
        likely = next_logits(ids).log_softmax(dim=-1)
        likely[:, list(never)] = -torch.inf
        total = scores.unsqueeze(-1) + likely.view(rows, beams, -1)
        scores, best = total.flatten(1).topk(beams, dim=1)
        beam, token = best // likely.shape[-1], best % likely.shape[-1]
        before = (torch.arange(rows).unsqueeze(1) * beams + beam).flatten()
        ids = torch.cat([ids[before], token.flatten().unsqueeze(1)], dim=1)
    return ids


def extended(
    twin: Any, hand: dict[str, Tensor], ids: Tensor, first: int = 0, prefix: int | None = None
) -> dict[str, Tensor]:
    """Return a call by embeddings, `hand` of `(B, L, …)`, with answers `(B * beams, t)` behind its prompts.

    PaliGemma's prompts see what comes after them: all of the prompt, or the first `prefix` columns.
    """
    copies, steps = len(ids) // len(hand["inputs_embeds"]), ids.shape[1]
    given = {name: value.repeat_interleave(copies, dim=0) for name, value in hand.items()}
    given["inputs_embeds"] = torch.cat([given["inputs_embeds"], twin.get_input_embeddings()(ids)], dim=1)
    for name in ("attention_mask", "token_type_ids"):
        if name in given:
            given[name] = torch.cat([given[name], torch.ones_like(ids)], dim=1)
    more = given["position_ids"][:, -1:] + 1 + torch.arange(steps)
    given["position_ids"] = torch.cat([given["position_ids"], more], dim=1) + first
    if "token_type_ids" in given and is_old():  # which lets all of a call see each other, answers included
        prompt = hand["attention_mask"].shape[1] if prefix is None else prefix
        given["attention_mask"] = seen_by_prefix(given["attention_mask"], prompt)
    return given


def seen_by_prefix(mask: Tensor, prompt: int) -> Tensor:
    """Return what is added to attention `(B, 1, L, L)`: the first columns see each other, others what is before."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:prompt, :prompt] = True
    seen = seen & mask.bool().unsqueeze(1)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).unsqueeze(1)
