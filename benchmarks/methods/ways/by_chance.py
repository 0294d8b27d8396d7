"""Random: two selections that draw."""

from ..method import Selection

METHODS = [Selection("random", "the honest baseline", None, guidance="random")]
