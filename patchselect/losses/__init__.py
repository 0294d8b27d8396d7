"""Training objectives around the selection, as functions of features `(N, D)`; row i of both sides match.

`f(v, t) = exp(cos(v, t) / temperature)` throughout; features are normalised inside, in at least float32.
"""

from .alignment import cosine_alignment_loss, selection_alignment_loss
from .contrastive import itc_loss, negative_weights, progressive_alpha, srcl_loss
from .matching import hard_negatives, itm_loss
from .processes import gather_features

__all__ = [
    "cosine_alignment_loss",
    "gather_features",
    "hard_negatives",
    "itc_loss",
    "itm_loss",
    "negative_weights",
    "progressive_alpha",
    "selection_alignment_loss",
    "srcl_loss",
]
