"""Ways to shorten a sequence: one file each, and the registry that `apply(fusion="name")` looks into."""

from __future__ import annotations

from typing import Any

from ..functional import FUSIONS
from .base import Alike, Places, Reduced, Reduction
from .fuse import Fuse
from .merge import Merge
from .protect import Protect

REDUCTIONS: dict[str, Reduction] = {name: Fuse(name) for name in FUSIONS}  # type: ignore[arg-type]
"""A new built-in reduction is one new file and one entry here."""


def reduction_of(value: Any) -> Reduction:
    """Return the reduction that a name or an object stands for.

    Raises:
        ValueError: no reduction of that name.
        TypeError: a class in place of an instance.
    """
    if isinstance(value, Reduction):
        return value
    if isinstance(value, type) and issubclass(value, Reduction):
        raise TypeError(f"fusion must be an instance: write {value.__name__}(), not {value.__name__}")
    if not isinstance(value, str) or value not in REDUCTIONS:
        names = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"fusion must be one of {names}, or an instance of patchselect.Reduction; got {value!r}")
    return REDUCTIONS[value]


__all__ = ["REDUCTIONS", "Alike", "Fuse", "Merge", "Places", "Protect", "Reduced", "Reduction", "reduction_of"]
