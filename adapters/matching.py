"""What heads of image-text matching share: ids of texts, the layer that matches, its probability."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Texts, named
from patchselect.weights import is_linear


def ids_and_mask(texts: Any, encoder: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and mask; without a mask, what the text encoder's configuration names as padding is no word."""
    given = named(texts)
    ids = given["input_ids"]
    mask = given.get("attention_mask")
    if mask is None:
        pad = getattr(getattr(encoder, "config", None), "pad_token_id", None)
        mask = torch.ones_like(ids) if pad is None else (ids != pad).to(ids.dtype)
    return ids, mask


def text_mode(encoder: nn.Module) -> dict[str, str]:
    """Return what makes a BERT that holds both halves (ALBEF) run its text half alone; `{}` for one without halves."""
    return {"mode": "text"} if "mode" in inspect.signature(type(encoder).forward).parameters else {}


def matching_layer(model: nn.Module) -> nn.Module:
    """Return the layer of a head that tells pairs that match from others.

    Raises:
        ValueError: there is none.
    """
    pairs = [part for part in model.children() if is_linear(part) and part.out_features == 2]
    head = getattr(model, "itm_head", pairs[0] if len(pairs) == 1 else None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no image-text matching head (itm_head, width to 2), so pairs have no score in "
            "it: use a retrieval or pretraining head"
        )
    return head


def states_of(model: nn.Module, texts: Texts) -> tuple[Tensor, Tensor]:
    """Return the tokens and the mask of texts for a fusion encoder.

    Raises:
        ValueError: only their features are known.
    """
    if not texts.states:
        raise ValueError(
            f"the matching head of {type(model).__name__} reads the tokens of a text: give score_pairs token ids or "
            "what the tokenizer returns, not features"
        )
    return texts.states["tokens"], texts.states["mask"]


def seen_whole(rows: Tensor) -> Tensor:
    """Return the mask `(R, N)` of image tokens `(R, N, D)` none of which is hidden."""
    return torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)


def matching_probability(logits: Tensor) -> Tensor:
    """Turn `(R, 2)` logits of an image-text matching head into the probability of a match, `(R,)`."""
    return logits.float().softmax(dim=-1)[:, 1]


def fused_from_ids(encoder: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Run a text encoder that reads the image in every layer, from the ids; returns its hidden states."""
    read = dict(encoder_hidden_states=rows, encoder_attention_mask=seen_whole(rows))
    states: Tensor = encoder(input_ids=ids, attention_mask=mask, return_dict=True, **read).last_hidden_state
    return states
