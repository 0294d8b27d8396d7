"""A reduction of your own in one file: what does not stay becomes four tokens, one for each quarter of the image.

python examples/quarters.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import patchselect
from patchselect.functional import destinations, keep_and_fuse
from patchselect.reduction import Places, Reduced


class Quarters(patchselect.Reduction):
    """Keep the k most relevant patches and fuse the others into four tokens by spatial quarter."""

    name = "quarters"
    reads_places = True

    def num_fused(self, num_patches: int, num_keep: int) -> int:
        return 4

    def reduce(
        self, tokens: Tensor, relevance: Tensor, num_keep: int, num_prefix_tokens: int, places: Places | None = None
    ) -> Reduced:
        assert places is not None
        out, kept = keep_and_fuse(tokens, relevance, num_keep, num_prefix_tokens, "none")
        images, patches = tokens.shape[0], tokens.shape[1] - num_prefix_tokens
        rows = kept.shape[0]
        quarter = self.quarter(places)  # (B, n)
        if rows != images:  # every image with every text
            quarter = quarter.repeat_interleave(rows // images, dim=0)

        rest = relevance.reshape(rows, patches).scatter(1, kept, 0.0)
        inside = quarter.unsqueeze(1) == torch.arange(4, device=quarter.device).view(4, 1)  # (R, 4, n)
        weights = rest.unsqueeze(1) * inside
        total = weights.sum(dim=-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp_min(1e-12), rest.unsqueeze(1))  # an empty quarter: all
        weights = weights.view(images, -1, patches).to(tokens.dtype)
        fused = (weights @ tokens[:, num_prefix_tokens:]).view(rows, 4, -1)
        into = destinations(kept, patches, num_prefix_tokens, num_prefix_tokens + num_keep + quarter)
        return Reduced(torch.cat([out, fused], dim=1), kept, into)

    @staticmethod
    def quarter(places: Places) -> Tensor:
        """Return the quarter 0 to 3 of each patch; the last four tokens of a second selection are quarters already."""
        height, width = places.grid
        indices, count = places.indices, places.indices.shape[1]
        found = 2 * (2 * (indices // width) >= height).long() + (2 * (indices % width) >= width).long()
        last = torch.arange(count, device=indices.device) - (count - 4)
        return torch.where(indices < 0, last.clamp_min(0), found)


def main() -> None:
    from plain_vit import PlainViT, PlainViTAdapter

    torch.manual_seed(0)
    model = PlainViT().eval()
    handle = patchselect.apply(model, 0.25, fusion=Quarters(), adapter=PlainViTAdapter())
    with torch.no_grad(), handle.record() as trace, patchselect.guide(model, torch.randn(1, model.width)):
        tokens = model(torch.randn(1, 3, 64, 64))
    print("tokens after each selection:", [entry.num_tokens for entry in trace])
    print("which token each patch is in:\n", trace[0].holders.view(trace[0].grid))
    print("back on the grid:", tuple(patchselect.restore(tokens, trace, fill="fused").shape))


if __name__ == "__main__":
    main()
