"""Merge, then select, by `patchselect.relevance.Peek`: [CLS] looks ahead through the later blocks (ours)."""

from patchselect.relevance import Peek

from ..method import Selection

METHODS = [Selection("merge, then select: peek", "docs/merging.md, merge=0.5", Peek(), layers=1, merge=0.5)]
