"""TRIPS: two selections by the text (Jiang et al., EMNLP 2022), as `patchselect.apply(model)` makes them."""

from ..method import Selection

PAPER = "Jiang et al., EMNLP 2022"
METHODS = [
    Selection("TRIPS: keys, two selections", f"{PAPER}; its own relevance", "keys", space="hidden"),
    Selection("values, two selections", f"{PAPER}; the relevance that `apply` takes for CLIP", "values"),
]
