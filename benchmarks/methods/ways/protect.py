"""Influence protects, the rest merges: patches that speak for OR against the text stay, others merge (ours)."""

from patchselect.reduction import Protect
from patchselect.relevance import Influence

from ..method import Selection

METHODS = [
    Selection("influence protects, rest merges", "merge=0.5", Influence(), layers=1, fusion=Protect(), merge=0.5)
]
