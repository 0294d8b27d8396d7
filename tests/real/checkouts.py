"""Importing from a checkout that an environment variable names, as its own scripts do from inside of it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("models", "clip", "llava", "lavis", "vgTools", "core", "meter")
"""Top-level names of these code bases; ALBEF, mPLUG and BLIP all own `models`."""


def directory(variable: str) -> Path:
    """The checkout, or a skip that says which variable is missing."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"set {variable} to a checkout")
    return Path(found).resolve()


def load(variable: str, name: str) -> Any:
    """Import module `name` of the checkout; skip, with the reason, if the environment lacks what it imports."""
    root = directory(variable)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    for known, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None)
        if known.split(".")[0] in PACKAGES and place and root not in Path(place).resolve().parents:
            del sys.modules[known]
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(f"{name} of {root.name} cannot be imported here: {missing}")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder` for the time of the `with` block: relative names of weights and vocabularies are found there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
