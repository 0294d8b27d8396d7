"""Scores of image-text matching heads, for `score_pairs`: the fusion encoder reads the tokens that the text chose."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Adapter, Texts, Tower, named, pooled
from patchselect.weights import is_linear


def _tokens(texts: Any, encoder: Any) -> tuple[Tensor, Tensor]:
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


def _head(model: nn.Module) -> nn.Module:
    pairs = [part for part in model.children() if is_linear(part) and part.out_features == 2]
    head = getattr(model, "itm_head", pairs[0] if len(pairs) == 1 else None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no image-text matching head (itm_head, width to 2), so pairs have no score in "
            "it: use a retrieval or pretraining head"
        )
    return head


def _refuse_without_text(tower: Tower) -> None:
    """Raise for heads that run no text encoder (captioning)."""
    if tower.parts and tower.parts["text_encoder"] is None:
        raise ValueError(
            f"{type(tower.parts['head']).__name__} runs no text encoder, so its pairs have no score: use a retrieval "
            "or pretraining head"
        )


def _states(model: nn.Module, texts: Texts) -> tuple[Tensor, Tensor]:
    if not texts.states:
        raise ValueError(
            f"the matching head of {type(model).__name__} reads the tokens of a text: give score_pairs token ids or "
            "what the tokenizer returns, not features"
        )
    return texts.states["tokens"], texts.states["mask"]


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)


def matching_probability(logits: Tensor) -> Tensor:
    """Turn `(R, 2)` logits of an image-text matching head into the probability of a match, `(R,)`."""
    return logits.float().softmax(dim=-1)[:, 1]


def _is_dual(tower: Tower) -> bool:
    return hasattr(tower.head, "get_text_features") and hasattr(tower.head, "get_image_features")


class BertMatching(Adapter):
    """ALBEF: the text encoder's upper half is the fusion encoder; mPLUG: a module of its own (`parts["fusion"]`)."""

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        wanted = inspect.signature(tower.module.forward).parameters
        flags = {"skip_last_layer": True, "use_checkpoint": False}
        return tower.module(images, **{**{name: flag for name, flag in flags.items() if name in wanted}, **kwargs})

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        encoder = tower.parts.get("text_encoder")
        if encoder is None:
            _refuse_without_text(tower)
            return super().encode_texts(model, tower, texts)
        ids, mask = _tokens(texts, encoder)
        states = encoder(ids, attention_mask=mask, return_dict=True, **text_mode(encoder)).last_hidden_state
        return Texts(states[:, 0], {"tokens": states, "mask": mask})

    def as_fused(self, tower: Tower, rows: Tensor) -> Tensor:
        """Return image tokens of the tower as the fusion encoder of its head reads them."""
        return rows

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        head = tower.parts.get("head", model)
        matching = _head(head)
        _refuse_without_text(tower)
        tokens, mask = _states(head, texts)
        encoder, fusion = tower.parts["text_encoder"], tower.parts["fusion"]
        inputs = dict(
            encoder_embeds=tokens,
            attention_mask=mask,
            encoder_hidden_states=self.as_fused(tower, rows),
            encoder_attention_mask=_ones(rows),
        )
        if text_mode(encoder):
            fused = encoder(**inputs, return_dict=True, mode="fusion").last_hidden_state
        elif fusion is not None:
            _, fused = fusion(**inputs, return_dict=False)  # what became of the image tokens, and of the text
        else:
            raise ValueError(
                f"{type(head).__name__} runs no fusion encoder that is known here (a BERT with cross-attention in its "
                "first layer), so its pairs have no score"
            )
        return matching_probability(matching(fused[:, 0]))


def fused_from_ids(encoder: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Run a text encoder that reads the image in every layer, from the ids; returns its hidden states."""
    read = dict(encoder_hidden_states=rows, encoder_attention_mask=_ones(rows))
    states: Tensor = encoder(input_ids=ids, attention_mask=mask, return_dict=True, **read).last_hidden_state
    return states


class CaptionMatching(BertMatching):
    """salesforce/BLIP and LAVIS: where there is no half for the text alone, every layer reads the image, from the ids.

    The first token of such a text says what is asked for: [CLS] of the text alone, and [ENC] of text and image in the
    heads whose own code puts it there (`parts["first_token"]`). Both are set here, whatever the ids begin with.
    """

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        encoder = tower.parts.get("text_encoder")
        if encoder is None or tower.parts["halves"]:
            return super().encode_texts(model, tower, texts)
        _head(tower.parts["head"])
        ids, mask = _tokens(texts, encoder)
        first = tower.parts["first_token"]
        alone = ids if first is None else _begun_with(ids, tower.parts["head"].tokenizer.cls_token_id)
        states = encoder(alone, attention_mask=mask, return_dict=True, **text_mode(encoder)).last_hidden_state
        return Texts(states[:, 0], {"tokens": ids if first is None else _begun_with(ids, first), "mask": mask})

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        head = tower.parts.get("head", model)
        if tower.parts.get("text_encoder") is None or tower.parts["halves"]:
            return super().score(model, tower, rows, texts)
        matching = _head(head)
        fused = fused_from_ids(tower.parts["text_encoder"], rows, *_states(head, texts))
        return matching_probability(matching(fused[:, 0]))


def _begun_with(ids: Tensor, first: int) -> Tensor:
    ids = ids.clone()
    ids[:, 0] = first
    return ids


class BlipMatching(Adapter):
    """`BlipForImageTextRetrieval`: the text encoder reads the image in every layer, so it starts from the ids.

    `BlipModel` is a dual encoder: the cosine of its two features.
    """

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        if _is_dual(tower):
            return pooled(model.get_image_features(images, **kwargs))
        return super().encode_images(model, tower, images, **kwargs)

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if _is_dual(tower):
            ids, mask = _tokens(texts, model.text_model)
            return Texts(pooled(model.get_text_features(input_ids=ids, attention_mask=mask)))
        if tower.head is None:
            return super().encode_texts(model, tower, texts)
        _head(model)
        encoder = model.text_encoder
        ids, mask = _tokens(texts, encoder)
        states = encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
        return Texts(states[:, 0], {"tokens": ids, "mask": mask})

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        if _is_dual(tower):
            return super().score(model, tower, rows, texts)
        matching = _head(model)
        fused = fused_from_ids(model.text_encoder, rows, *_states(model, texts))
        return matching_probability(matching(fused[:, 0]))
