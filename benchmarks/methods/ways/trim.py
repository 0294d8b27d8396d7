"""TRIM's relevance: the cosine of text and patch in the joint space, one selection (Song et al., 2024).

The published method prunes once, behind the tower; here it ranks where the others do, at the first selection layer.
Code bases disagree on the sign, so both are asked.
"""

from examples.trim import Trim

from ..method import Selection

METHODS = [
    Selection("TRIM: most similar", "Song et al., 2024; its relevance", Trim(1), layers=1),
    Selection("TRIM: least similar", "Song et al., 2024; the other sign", Trim(-1), layers=1),
]
