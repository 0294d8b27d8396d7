"""BLIP (salesforce/BLIP): retrieval, matching, VQA, captioning, NLVR2, pretraining and feature extraction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .captions import Captions
from .heads import tokens_of


class SalesforceBlip(Captions):
    """Heads whose text encoder reads the image in every layer and runs without it in `mode="text"`.

    The first strings of the call guide: captions, questions, sentences; answers, which come after them, never do.
    """

    name = "blip"

    def knows(self, head: nn.Module, calls: Mapping[str, tuple[str, ...]], halves: bool) -> bool:
        return not halves

    def text_given(self, given: dict[str, Any], names: tuple[str, ...]) -> Any:
        values = (given.get(name) for name in names if name != "mode")
        return next((value for value in values if is_text(value) or tokens_of(value) is not None), None)


def is_text(value: Any) -> bool:
    """Tell whether this is a string or strings."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, str) for item in value)
    return isinstance(value, str)
