"""Retrieval in both directions, where an image may have several captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval_recall(
    similarity: Tensor, owner: Tensor | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[int, float]]:
    """Compute R@K: in how many of a hundred queries something that belongs to them is among the K most similar.

    Image to text counts a hit if ANY caption of the image is among the top K (the Karpathy convention); images
    without a caption are not asked. Among equals, the ones in front win. Ties and NaN are no way to a good score: a
    constant matrix finds what happens to stand first.

    Args:
        similarity: `(N, M)`: N images, M texts; larger is more similar.
        owner: `(M,)`: the image that each text belongs to.
        ks: how many candidates count; above 0.

    Returns:
        `{"image_to_text": {K: recall}, "text_to_image": {K: recall}}` in percent, 0 to 100.

    Raises:
        ValueError: shapes that do not fit, an owner outside of the images, NaN among the similarities.
    """
    owner = torch.as_tensor(owner, device=similarity.device)
    if similarity.dim() != 2 or owner.shape != similarity.shape[1:] or not similarity.numel():
        raise ValueError(
            f"similarity must be (images, texts) and owner (texts,), got {tuple(similarity.shape)} and "
            f"{tuple(owner.shape)}"
        )
    images = len(similarity)
    if owner.is_floating_point() or int(owner.min()) < 0 or int(owner.max()) >= images:
        raise ValueError(f"owner must name the image of each text, 0 to {images - 1} as integers")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of candidates, each above 0; got {list(ks)}")
    if similarity.isnan().any():
        raise ValueError("similarity has NaN in it, which cannot be ranked")
    found = torch.empty_like(owner)
    for rows in torch.arange(len(owner), device=owner.device).split(4096):
        ranked = similarity.T[rows].sort(dim=1, descending=True, stable=True).indices
        found[rows] = (ranked == owner[rows, None]).int().argmax(dim=1)
    best = torch.full((images,), similarity.shape[1], device=owner.device)
    asked = torch.zeros(images, dtype=torch.bool, device=owner.device)
    asked[owner] = True
    for rows in torch.arange(images, device=owner.device).split(4096):
        ranked = similarity[rows].sort(dim=1, descending=True, stable=True).indices
        best[rows] = (owner[ranked] == rows[:, None]).int().argmax(dim=1)
    return {
        "image_to_text": {k: 100.0 * float((best[asked] < k).double().mean()) for k in ks},
        "text_to_image": {k: 100.0 * float((found < k).double().mean()) for k in ks},
    }
