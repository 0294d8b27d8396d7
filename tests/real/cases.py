"""One head of a real code base and how its own scripts call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from heads import Head, texts_in
from torch import nn


@dataclass
class Evaluation:
    """Steps of an evaluation script, restated."""

    run: Callable[[nn.Module], Any]
    guidance: str = "text"
    """`"image"` where the script encodes images apart from any text."""


@dataclass
class Case(Head):
    """A head, its training call, and what else its code base does with it."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    pairs: Callable[[list[int], list[int]], Any] | None = None
    """A call with these images and these texts of `batch(0)`, if a matching head scores its pairs."""
    cosine: Callable[[int, int], Any] | None = None
    """The cosine of image i and text j of `batch(0)` in a call with both, in a dual encoder; METER's score of them."""
    runs: int = 1
    """How often a call runs its tower, each time on as many images."""
    tokens: Callable[[Any], Any] = texts_in
    """What `score_pairs` gets of the texts of a batch."""
    pairing: str | None = None
    """What `apply` must be told, if some call of it compares all images with all texts."""
    trains: bool = True
    """Whether its call has a gradient (feature extractors have none)."""
