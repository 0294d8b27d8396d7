"""One right caption of sixteen: what the small CLIP is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.world.candidates import GRID, KINDS
from benchmarks.accuracy.world.captions import name_some
from benchmarks.accuracy.world.scenes import Layout, Scenes, make_scenes
from patchselect.metrics import retrieval_recall

from .model import SIZE, size_of, tokenize

VALIDATION, TEST, LEARNING = "validation", "test", "learning"
SEEDS = {VALIDATION: 7001, TEST: 9001, LEARNING: 11001}
"""Scenes on which choices are made, on new crops of the training's photographs; scenes on which none is, on photographs
that training never sees; and more of these, from which classifiers that look for leaks learn."""


@dataclass(frozen=True)
class Questions:
    """Scenes, each with the one caption that fits (in front) and others that name something absent."""

    scenes: Scenes
    candidates: tuple[tuple[tuple[int, ...], ...], ...]
    """`CHOICES` captions for each scene, as concepts."""
    kind: str = GRID
    """Of the wrong ones, one of `KINDS`."""

    def images(self, rows: slice = slice(None)) -> Tensor:
        """Return `(N, 3, S, S)`"""
        return self.scenes.images(rows)

    @torch.no_grad()
    def texts(self, model: Any) -> Tensor:
        """Return `(N, CHOICES, E)`, normalised text features of the candidates; each caption is encoded once."""
        distinct = sorted({caption for row in self.candidates for caption in row})
        place = {caption: index for index, caption in enumerate(distinct)}
        rows = torch.tensor([[place[caption] for caption in row] for row in self.candidates])
        return model.encode_text(tokenize(distinct), normalize=True)[rows]


@lru_cache(maxsize=None)
def make_questions(count: int, split: str, named: int = 2, kind: str = GRID, size: int = SIZE) -> Questions:
    """Make questions on scenes that training never sees.

    Args:
        count: how many.
        split: one of `SEEDS`.
        named: most objects that a caption names.
        kind: one of `KINDS`.
        size: of the images, in pixels: the same scenes, drawn larger or smaller.
    """
    scenes = make_scenes(count, SEEDS[split], test=split != VALIDATION, layout=Layout(size=size))
    random = np.random.default_rng([SEEDS[split], count])
    asked = (KINDS[kind](name_some(objects, random, named), objects, random) for objects in scenes.objects)
    return Questions(scenes, tuple(asked), kind)


def right(image: Tensor, texts: Tensor) -> Tensor:
    """Tell whether the fitting caption won, `(N,)` bool.

    Args:
        image: features `(N, E)`, or `(N, CHOICES, E)` where every caption guided its own.
        texts: `(N, CHOICES, E)`, normalised, the fitting one in front.
    """
    image = F.normalize(image, dim=-1)
    scores = (texts * (image if image.dim() == 3 else image.unsqueeze(1))).sum(-1)
    # A tie is no right answer: the fitting caption must be ahead of every other.
    return scores[:, 0] > scores[:, 1:].amax(1)


@torch.no_grad()
def encode(model: Any, images: Tensor, batch: int = 256) -> Tensor:
    """Return `(N, E)` image features, as the model gives them."""
    return torch.cat([model.encode_image(part) for part in images.split(batch)])


@torch.no_grad()
def score(model: Any, count: int = 1024, split: str = VALIDATION) -> dict[str, float]:
    """Return accuracy among 16 captions, its standard error, and R@1 in percent over half as many scenes."""
    questions = make_questions(count, split, size=size_of(model))
    features = encode(model.eval(), questions.images())
    accuracy = float(right(features, questions.texts(model)).float().mean())
    pool = count // 2
    captions = model.encode_text(tokenize([objects[:3] for objects in questions.scenes.objects[:pool]]))
    cosines = F.normalize(features[:pool], dim=-1) @ F.normalize(captions, dim=-1).T
    recall = retrieval_recall(cosines, torch.arange(pool), ks=(1,))
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
        "questions": count,
        "image_to_text_r1": recall["image_to_text"][1],
        "text_to_image_r1": recall["text_to_image"][1],
        "pool": pool,
    }
