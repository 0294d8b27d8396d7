"""Rank in two passes: all images with all texts cheaply, then the best of each direction pair by pair."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import patchselect

BEHIND = 1e4
"""What is not ranked again stands behind all that is, in the order of the first pass."""


def candidates_of(first: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """Choose from the first pass `(N, M)` the pairs to look at again, as two masks `(N, M)`.

    The `best` texts of each image, and the `best` images of each text.
    """
    of_images, of_texts = torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(first, dtype=torch.bool)
    of_images.scatter_(1, first.topk(min(best, first.shape[1]), dim=1).indices, True)
    of_texts.scatter_(0, first.topk(min(best, first.shape[0]), dim=0).indices, True)
    return of_images, of_texts


def rescored(
    model: nn.Module,
    pixels: Callable[[Sequence[int]], Tensor],
    texts: Callable[[Tensor], Any],
    wanted: Tensor,
    batch: int,
    about: str,
    resume: Path | None = None,
) -> Tensor:
    """Score the wanted pairs with `patchselect.score_pairs`; `(N, M)`, NaN where nobody asked.

    Args:
        model: patched.
        pixels: images of some places to `(n, 3, H, W)`, on the device of the model.
        texts: places `(m,)` of texts to what `score_pairs` takes as texts.
        wanted: `(N, M)`.
        batch: images at once; those with as many texts stand together.
        about: what the progress bar says.
        resume: a folder for what is finished, one file per batch; of the same call alone.
    """
    scores = torch.full(wanted.shape, float("nan"))
    order = wanted.sum(dim=1).argsort()
    for number, places in enumerate(tqdm(order.split(batch), about, file=sys.stderr)):
        store = None if resume is None else resume / f"{number}"
        chosen = wanted[places].any(dim=0).nonzero().flatten()
        if not len(chosen):
            continue
        here = wanted[places][:, chosen]
        width = int(here.sum(dim=1).max())
        # Images with fewer texts repeat their first one.
        columns = here.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        columns = torch.where(here.gather(1, columns), columns, columns[:, :1])
        found = patchselect.score_pairs(
            model, pixels(places.tolist()), texts(chosen), candidates=columns, resume=store, progress=False
        )
        rows = scores[places]
        rows[torch.arange(len(places))[:, None], chosen[columns]] = found
        scores[places] = torch.where(wanted[places], rows, float("nan"))
    return scores


def ranked(first: Tensor, scores: Tensor, again: Tensor) -> Tensor:
    """Put what was ranked again, by its score, before all else, `(N, M)`."""
    return torch.where(again, scores, first - BEHIND)
