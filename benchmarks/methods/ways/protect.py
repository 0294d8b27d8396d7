"""Text protects, the rest merges; by influence, patches that speak for OR against the text stay (ours).

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
    Selection(
        "text protects half, rest merges: keys",
        "docs/merging.md, merge=0.5, share 1",
        "keys",
        layers=1,
        space="hidden",
        fusion=Protect(1.0),
        merge=0.5,
    ),
    Selection(
        "text protects a quarter, rest merges: keys",
        "docs/merging.md, merge=0.5, share 3",
        "keys",
        layers=1,
        space="hidden",
        fusion=Protect(3.0),
        merge=0.5,
    ),
]
