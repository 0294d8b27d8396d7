"""Ways to rank patches: one file each, and the registry that `apply(relevance="name")` looks into."""

from __future__ import annotations

from typing import Any

from .base import Candidates, Relevance
from .contrast import Contrast
from .features import Features
from .influence import Influence
from .joint import Joint
from .keys import Keys
from .peek import Peek
from .random import Random
from .values import Values

RELEVANCES: dict[str, type[Relevance]] = {kind.name: kind for kind in (Keys, Features, Values, Joint)}
"""A new built-in relevance is one new file and one word here."""


def relevance_of(value: Any) -> Relevance:
    """Return the relevance that a name or an object stands for.

    Raises:
        ValueError: no relevance of that name.
        TypeError: a class in place of an instance, or an object that is no `Relevance`.
    """
    if isinstance(value, Relevance):
        return value
    names = ", ".join(map(repr, RELEVANCES))
    if isinstance(value, type) and issubclass(value, Relevance):
        raise TypeError(f"relevance must be an instance: write {value.__name__}(), not {value.__name__}")
    if not isinstance(value, str) or value not in RELEVANCES:
        raise ValueError(f"relevance must be one of {names}, or an instance of patchselect.Relevance; got {value!r}")
    return RELEVANCES[value]()


__all__ = [
    "RELEVANCES",
    "Candidates",
    "Contrast",
    "Features",
    "Influence",
    "Joint",
    "Keys",
    "Peek",
    "Random",
    "Relevance",
    "Values",
    "relevance_of",
]
