"""Influence protects, the rest merges: patches that speak for OR against the text stay, others merge (ours).

The share says how many tokens the others become for each patch that stays: the more, the nearer to merging alone.
"""

from patchselect.reduction import Protect
from patchselect.relevance import Influence

from ..method import Selection

METHODS = [
    Selection("influence protects, rest merges", "merge=0.5", Influence(), layers=1, fusion=Protect(), merge=0.5),
    Selection(
        "influence protects half, rest merges",
        "merge=0.5, share 1",
        Influence(),
        layers=1,
        fusion=Protect(1.0),
        merge=0.5,
    ),
    Selection(
        "influence protects a quarter, rest merges",
        "merge=0.5, share 3",
        Influence(),
        layers=1,
        fusion=Protect(3.0),
        merge=0.5,
    ),
]
