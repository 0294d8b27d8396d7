"""Merge, then select: similar patches merge without a text, then one selection by it; attention counts sizes (ours)."""

from ..method import Selection

METHODS = [
    Selection("merge, then select: values", "docs/merging.md, merge=0.5", "values", layers=1, merge=0.5),
    Selection("merge, then select: keys", "docs/merging.md, merge=0.5", "keys", layers=1, space="hidden", merge=0.5),
]
