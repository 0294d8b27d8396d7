"""CDPruner's relevance: diversity of patches, conditioned on the text (Zhang et al., NeurIPS 2025, arXiv 2506.10967).

A determinantal point process with the kernel `L_ij = r_i cos(x_i, x_j) r_j` is searched greedily for the most probable
set (fast MAP, Chen et al., NeurIPS 2018). `r` is the cosine of text and patch in the joint space, mean over the texts,
scaled to (0, 1]. The published code of LLaVA takes its negative; both signs are asked. Like it, what does not stay is
dropped; unlike it, patches are ranked inside of the tower, at the first selection layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from patchselect.relevance.kernels import in_tiles, joint_scores

from ..method import Selection

FLOOR = 1e-6


class Diverse(patchselect.Relevance):
    """Weights that fall in the order in which the greedy search takes the patches.

    Args:
        sign: 1 prefers patches like the text, -1 patches unlike it.
        steps: of the greedy search; further patches follow in the order of what is left of their variance.
    """

    name = "cdpruner"

    def __init__(self, sign: int, steps: int) -> None:
        self.sign, self.steps = sign, steps

    def scores(self, seen: patchselect.Candidates, text: Tensor) -> Tensor:
        return self.sign * joint_scores(text, seen.projected(seen.patches))

    def weigh(self, seen: patchselect.Candidates, text: Tensor | None, apart: bool) -> Tensor:
        given = in_tiles(text, len(seen.patches)) if text is not None else None
        scores = self.scores_by_image(seen) if given is None else self.scores(seen, given)
        scores = scores.expand(len(seen.patches), -1, -1)
        if apart:
            return torch.stack([self.order(seen.patches, one) for one in scores.unbind(1)], dim=1)
        return self.order(seen.patches, scores.mean(dim=1))

    def order(self, patches: Tensor, scores: Tensor) -> Tensor:
        """Return weights `(B, n)`, the highest for the patch that is taken first."""
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        quality = (scores - low + FLOOR) / (high - low + FLOOR)
        patches = F.normalize(patches, dim=-1)
        kernel = quality.unsqueeze(2) * (patches @ patches.transpose(1, 2)) * quality.unsqueeze(1)
        left = kernel.diagonal(dim1=1, dim2=2).clone()  # the variance that each patch would add
        rows, taken = torch.arange(len(kernel)), torch.zeros_like(left)
        basis = kernel.new_zeros(len(kernel), 0, kernel.shape[-1])
        for step in range(min(self.steps, kernel.shape[-1])):
            best = left.masked_fill(taken > 0, -1.0).argmax(dim=1)
            taken[rows, best] = kernel.shape[-1] - step + 1.0
            known = (basis[rows, :, best].unsqueeze(1) @ basis).squeeze(1)
            row = (kernel[rows, best] - known) / left[rows, best].clamp_min(1e-12).sqrt().unsqueeze(1)
            basis = torch.cat([basis, row.unsqueeze(1)], dim=1)
            left = (left - row.square()).clamp_min(0)
        weights = torch.where(taken > 0, taken, left.clamp(0, 1))
        return weights / weights.sum(dim=-1, keepdim=True)


def diverse(sign: int):  # type: ignore[no-untyped-def]
    """Return what makes the relevance for a host and the number of patches that stay."""
    return lambda host, kept: Diverse(sign, kept)


PAPER = "Zhang et al., NeurIPS 2025"
METHODS = [
    Selection("CDPruner: most similar", f"{PAPER}; its relevance", diverse(1), layers=1, fusion="none"),
    Selection("CDPruner: least similar", f"{PAPER}; the other sign", diverse(-1), layers=1, fusion="none"),
]
