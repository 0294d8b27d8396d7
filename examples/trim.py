"""A relevance of your own in one file: TRIM's cosine between text and patch in the joint space, with either sign.

TRIM (Song et al., 2024) ranks the patches of a LLaVA tower by their similarity to the text. Code bases disagree on the
sign: some keep the most similar patches, some the least similar. Run both on your own data.

    python examples/trim.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect


class Trim(patchselect.Relevance):
    """`s = sign * cos(t, P(norm(x)))`, weights by a softmax at a temperature.

    Args:
        sign: 1 keeps the most similar patches, -1 the least similar.
        temperature: of the softmax that makes weights of the cosines; above 0.
    """

    name = "trim"

    def __init__(self, sign: int = 1, temperature: float = 0.1) -> None:
        self.sign, self.temperature = sign, temperature

    def scores(self, seen: patchselect.Candidates, text: Tensor) -> Tensor:
        patches = F.normalize(seen.projected(seen.patches), dim=-1)  # (B, n, E)
        text = F.normalize(text.to(patches.dtype), dim=-1)  # (B', T, E)
        return self.sign * text @ patches.transpose(-1, -2)

    def weights(self, scores: Tensor) -> Tensor:
        return (scores.float() / self.temperature).softmax(dim=-1)


def main() -> None:
    from plain_vit import PlainViT, PlainViTAdapter

    torch.manual_seed(0)
    model = PlainViT().eval()
    images, texts = torch.randn(2, 3, 64, 64), torch.randn(2, model.width)
    for sign in (1, -1):
        handle = patchselect.apply(model, 0.5, relevance=Trim(sign), adapter=PlainViTAdapter())
        with torch.no_grad(), handle.record() as trace, patchselect.guide(model, texts):
            model(images)
        print(handle.plan.relevance, "keeps", trace[0].kept[0].tolist())


if __name__ == "__main__":
    main()
