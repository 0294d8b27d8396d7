"""BLIP (salesforce/BLIP): retrieval, matching, VQA, captioning, NLVR2, pretraining and feature extraction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from patchselect.adapter import Tower

from .albef import Albef
from .captions import vits_and_head
from .heads import tokens_of


class SalesforceBlip(Albef):
    """Heads with ALBEF's ViT, whose text encoder reads the image in every layer and runs without it in `mode="text"`.

    The first strings of the call guide: captions, questions, sentences; answers, which come after them, never do.
    """

    name = "blip"

    def towers(self, model: nn.Module) -> list[Tower]:
        found = vits_and_head(model, has_no_text_half, first_text)
        return self.vit_towers(*found) if found else []


def has_no_text_half(calls: Mapping[str, tuple[str, ...]], halves: bool) -> bool:
    """Tell a head of BLIP from one of ALBEF."""
    return not halves


def first_text(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first text among the arguments of a call, in their order."""
    values = (given.get(name) for name in names if name != "mode")
    return next((value for value in values if is_text(value) or tokens_of(value) is not None), None)


def is_text(value: Any) -> bool:
    """Tell whether this is a string or strings."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, str) for item in value)
    return isinstance(value, str)
