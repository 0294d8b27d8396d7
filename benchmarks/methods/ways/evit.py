"""EViT: two selections by the image's own [CLS] (Liang et al., ICLR 2022)."""

from ..method import Selection

METHODS = [Selection("EViT: image [CLS]", "Liang et al., ICLR 2022", "keys", guidance="image")]
