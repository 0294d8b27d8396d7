"""The models that `whole_model` measures, at their published sizes with random weights."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchselect


@dataclass
class Whole:
    """One model at one size, and what one call of it does."""

    name: str
    model: nn.Module
    pair: Callable[[], object]
    step: Callable[[], Tensor]
    negatives: Callable[[], Tensor] | None = None
    """The same step, with the image tokens of negative pairs encoded for their own texts (docs/training.md)."""


def albef(work: str, size: int, batch: int, length: int) -> Whole:
    """Return `model_ve` for pairs (image, text, fusion, head), `model_retrieval` for training (ITC, ITM, momentum)."""
    runners = os.environ.get("PATCHSELECT_TARGETS")
    if not runners or not os.environ.get("ALBEF_DIR"):
        raise SystemExit(
            "--host albef needs ALBEF_DIR and PATCHSELECT_TARGETS, see python -m benchmarks.speed.whole_model -h"
        )
    sys.path.insert(0, runners)
    targets = importlib.import_module("albef_targets")
    name = "ve" if work == "pair" else "retrieval"
    options = {"distill": False} if work == "pair" else {}
    model, make = targets.ALL[name](image_size=size, small=False, train=work == "train", **options)
    arguments, named = make(batch_size=batch, length=length, **({"train": False} if work == "pair" else {}))
    image, text = arguments[:2]

    def step() -> Tensor:
        torch.manual_seed(0)
        return torch.stack(list(model(*arguments, **named))).sum()

    def negatives() -> Tensor:
        loss = step()
        texts = model.text_encoder(text.input_ids, attention_mask=text.attention_mask, return_dict=True, mode="text")
        others = torch.arange(batch).roll(1)
        words = texts.last_hidden_state[:, 0]
        with patchselect.guide(model, torch.cat([words, words[others]])):
            tokens = model.visual_encoder(torch.cat([image[others], image]))
        return loss + 1e-3 * tokens.square().mean()

    return Whole("ALBEF ViT-B/16", model, lambda: model(*arguments, **named), step, negatives)


def blip(work: str, size: int, batch: int, length: int) -> Whole:
    """Return `BlipForImageTextRetrieval` with its matching head, at the size of blip-itm-base."""
    import transformers

    transformers.logging.set_verbosity_error()
    text_config = dict(encoder_hidden_size=768, initializer_range=0.02)
    vision_config = dict(image_size=size, patch_size=16, initializer_range=0.02)
    config = transformers.BlipConfig(text_config=text_config, vision_config=vision_config)
    model = transformers.BlipForImageTextRetrieval(config).train(work == "train")
    ids = torch.randint(1000, 30000, (batch, length))
    inputs = dict(pixel_values=torch.randn(batch, 3, size, size), input_ids=ids, attention_mask=torch.ones_like(ids))

    def step() -> Tensor:
        return F.cross_entropy(model(**inputs).itm_score, torch.arange(batch) % 2)

    return Whole("BLIP ViT-B/16", model, lambda: model(**inputs), step)


HOSTS = {"albef": albef, "blip": blip}
