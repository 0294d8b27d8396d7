"""Merge, then select, by `patchselect.relevance.Contrast`: what sets a text apart from generic prompts (ours)."""

from patchselect.relevance import Contrast

from ..method import Selection


def contrast(host, kept):  # type: ignore[no-untyped-def]
    """Return the relevance with the host's generic prompts."""
    return Contrast(host.generic)


METHODS = [Selection("merge, then select: contrast", "docs/merging.md, merge=0.5", contrast, layers=1, merge=0.5)]
