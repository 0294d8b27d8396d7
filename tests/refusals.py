"""What a refused `apply` leaves behind: a sentence that says why, and the model as it was."""

from __future__ import annotations

import pytest

import patchselect


def classes(model):
    """Return the class of each part, which `apply` changes where it succeeds."""
    return {path: type(part) for path, part in model.named_modules()}


def refused(model, message, **options):
    """Ask for a selection that must be refused so, and leave every class as it was."""
    before = classes(model)
    with pytest.raises(TypeError, match=message):
        patchselect.apply(model, 0.5, guidance="image", **options)
    assert classes(model) == before
