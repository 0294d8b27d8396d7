"""Relevances and reductions on a command line: a name of patchselect's own, or `module:attribute` of anybody's file."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

OUTSIDE = "or MODULE:ATTRIBUTE of your own file"
"""What `--help` says of names that `named` takes."""


def named(text: str) -> Any:
    """Return what `--relevance` or `--fusion` names, as `patchselect.apply` takes it.

    Args:
        text: a name like `keys`, returned as it is; or `module:attribute` (`examples.trim:TrimRelevance`), imported,
            and made without arguments if it is a class.

    Raises:
        argparse.ArgumentTypeError: no such module or attribute, a class that wants arguments, or an object without a
            `name`, by which tables call it.
    """
    module, colon, path = text.partition(":")
    if not colon:
        return text
    try:
        found: Any = import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
        if isinstance(found, type):
            found = found()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}. Give NAME or MODULE:ATTRIBUTE") from error
    if not isinstance(getattr(found, "name", None), str):
        raise argparse.ArgumentTypeError(f"{text!r} has no `name`, by which the tables could call it")
    return found


def name_of(given: Any) -> str | None:
    """Return the name that tables show: a string itself, an object's `name`, `None` for the adapter's own choice."""
    return given if given is None or isinstance(given, str) else str(given.name)
