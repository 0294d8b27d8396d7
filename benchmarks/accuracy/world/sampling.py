"""Batches of scenes with captions, drawn anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import captions as token_ids
from .captions import name_some, swap_one
from .scenes import Scenes


@dataclass(frozen=True)
class Batch:
    """Pictures with captions that fit and ones that do not; caption c of picture i lies in row `c * B + i`."""

    images: Tensor
    """`(B, 3, S, S)`"""
    fitting: Tensor
    """`(captions * B, L)` token ids; `other` is the same caption with one object swapped for an absent one."""
    other: Tensor
    objects: Tensor
    """`(B, most)` concepts, -1 where a scene has fewer."""
    masks: Tensor
    """`(B, most, patches)`: which patches each object covers."""
    named: Tensor
    """`(captions * B, patches)`: which patches the objects that the fitting caption names cover."""


class Sampler:
    """Draws batches from scenes, each time with new captions."""

    def __init__(self, scenes: Scenes, grid: int, seed: int, most: int = 2) -> None:
        self.scenes, self.most = scenes, most
        self.random = np.random.default_rng(seed)
        width = max(len(objects) for objects in scenes.objects)
        self.objects = torch.full((len(scenes), width), -1)
        self.masks = torch.zeros(len(scenes), width, grid * grid, dtype=torch.bool)
        for row, objects in enumerate(scenes.objects):
            self.objects[row, : len(objects)] = torch.tensor(objects)
            self.masks[row, : len(objects)] = scenes.patch_masks(row, grid)

    def draw(self, size: int, captions: int = 1) -> Batch:
        """Draw a batch of random scenes, with so many captions of either kind for each."""
        return self.ask(self.random.integers(0, len(self.scenes), size).tolist(), captions)

    def ask(self, rows: Sequence[int], captions: int = 1) -> Batch:
        """Pair these scenes with captions drawn now."""
        asked = list(rows) * captions
        chosen = [self.scenes.objects[row] for row in asked]
        named = [name_some(objects, self.random, self.most) for objects in chosen]
        other = [swap_one(names, objects, self.random) for names, objects in zip(named, chosen)]
        here = torch.tensor(rows)
        mentioned = torch.zeros(len(asked), self.masks.shape[-1], dtype=torch.bool)
        for place, (row, names, objects) in enumerate(zip(asked, named, chosen)):
            mentioned[place] = self.masks[row, [objects.index(name) for name in names]].any(0)
        texts = (token_ids(named), token_ids(other))
        return Batch(self.scenes.images(here), *texts, self.objects[here], self.masks[here], mentioned)
