"""What the places of the kept patches tell: a classifier that sees where patches were kept, and no pixel of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import patchselect
from benchmarks.accuracy.albef.arms import RELEVANCE, lifted
from benchmarks.accuracy.albef.evaluate import CHUNK
from benchmarks.accuracy.albef.model import LAYERS as ALBEF_LAYERS
from benchmarks.accuracy.albef.model import MiniAlbef
from benchmarks.accuracy.clip.model import LAYERS as CLIP_LAYERS
from patchselect.recording import Selected


def maps(trace: Sequence[Selected], patches: int) -> Tensor:
    """Return `(B, selections, patches)` booleans: which patches each selection kept."""
    kept = [torch.zeros(len(one.kept), patches + 1).scatter(1, one.kept % (patches + 1), 1.0) for one in trace]
    return torch.stack(kept, 1)[..., :patches].bool()  # -1, the fused token, wrote beyond the end


@torch.inference_mode()
def of_albef(model: MiniAlbef, method: str, keep_rate: float, images: Tensor, ids: Tensor) -> Tensor:
    """Return `(N, selections, patches)`: where each pair, encoded with its own caption, keeps patches.

    Args:
        model: unpatched; it is left so.
        method: `text` (the paper's `keys`) or `values`.
        keep_rate: of both layers.
        images: `(N, 3, S, S)`.
        ids: `(N, L)`, their captions.
    """
    handle = patchselect.apply(model.vision, keep_rate, ALBEF_LAYERS, "text", RELEVANCE[method])
    found = []
    try:
        for rows in torch.arange(len(images)).split(CHUNK):
            text = lifted(model, method, model.text(ids[rows])[:, 0])
            with handle.record() as trace, patchselect.guide(model.vision, text):
                model.encode_image(images[rows])
            found.append(maps(trace, model.vision.patch_embed.num_patches))
    finally:
        handle.remove()
    return torch.cat(found)


@torch.inference_mode()
def of_clip(model: object, relevance: str, keep_rate: float, images: Tensor, texts: Tensor, pairing: str) -> Tensor:
    """Return `(N, candidates, selections, patches)`: where each question's picture keeps patches, by candidate.

    Args:
        model: unpatched; it is left so.
        relevance: `keys` or `values`.
        keep_rate: of both layers.
        images: `(N, 3, S, S)`.
        texts: `(N, candidates, E)`.
        pairing: `shared`, one selection for all candidates, or `all`, each its own.
    """
    handle = patchselect.apply(model, keep_rate, CLIP_LAYERS, "text", relevance)  # type: ignore[arg-type]
    found = []
    try:
        for rows in torch.arange(len(images)).split(8 if pairing == "all" else CHUNK):
            with handle.record() as trace, patchselect.guide(model, texts[rows], pairing):  # type: ignore[arg-type]
                model.encode_image(images[rows])  # type: ignore[attr-defined]
            kept = maps(trace, 64).reshape(len(rows), -1, len(trace), 64)
            found.append(kept.expand(-1, texts.shape[1], -1, -1))
    finally:
        handle.remove()
    return torch.cat(found)


def clumps(kept: np.ndarray) -> list[float]:
    """Say how a map `(side, side)` hangs together: neighbours, pieces, the largest pieces, spread along both sides."""
    from scipy.ndimage import label

    pieces, number = label(kept)
    sizes = sorted(np.bincount(pieces.ravel())[1:].tolist(), reverse=True)
    rows, columns = np.nonzero(kept) if number else np.zeros((2, 1))
    beside = (kept[1:] & kept[:-1]).sum() + (kept[:, 1:] & kept[:, :-1]).sum()
    across = (kept[1:, 1:] & kept[:-1, :-1]).sum() + (kept[1:, :-1] & kept[:-1, 1:]).sum()
    largest = [float(size) for size in (*sizes, 0, 0, 0)[:3]]
    return [float(beside), float(across), float(number), *largest, float(rows.std()), float(columns.std())]


def told(kept: Tensor) -> np.ndarray:
    """Return `(n, features)` of maps `(n, selections, patches)`: the maps themselves and how they hang together."""
    side = round(kept.shape[-1] ** 0.5)
    square = kept.reshape(len(kept), -1, side, side).numpy()
    shape = np.array([[value for one in row for value in clumps(one)] for row in square])
    return np.concatenate([kept.flatten(1).numpy().astype(float), shape], axis=1)


def told_beside(kept: Tensor) -> np.ndarray:
    """Return `(N, candidates, features)`: `told` of each candidate's maps, its shape against the others', and how
    much of its map theirs have too.

    Args:
        kept: `(N, candidates, selections, patches)`.
    """
    each = told(kept.flatten(0, 1)).reshape(*kept.shape[:2], -1)
    shape = each[..., kept.shape[2] * kept.shape[3] :]
    spread = shape.std(1, keepdims=True)
    against = (shape - shape.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
    flat = kept.flatten(2).float()
    common = (flat @ flat.transpose(1, 2)).sort(dim=-1, descending=True).values[..., 1:].numpy()
    middle = common.mean(1, keepdims=True)
    return np.concatenate([each, against, common, common - middle], axis=-1)


def classifiers() -> dict[str, object]:
    """Return a linear classifier and one of trees, untrained."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.05))
    return {"linear": linear, "trees": HistGradientBoostingClassifier(max_iter=100, learning_rate=0.1, random_state=0)}
