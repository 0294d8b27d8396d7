"""How the language model learns: from whole images alone, read by a tower that stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.albef.model import MiniAlbef
from benchmarks.accuracy.albef.train import fit
from benchmarks.accuracy.world.captions import EMOJI, captions
from benchmarks.accuracy.world.scenes import Scenes

from .decoder import PATCHES, Answerer
from .questions import WHERE, Drawer, answer_id

BATCH, RATE = 16, 3e-3


@torch.inference_mode()
def encoded(model: MiniAlbef, scenes: Scenes, size: int = 250) -> Tensor:
    """Return `(N, PATCHES, WIDTH)`: the patches of all scenes behind the unreduced tower."""
    parts = (slice(start, start + size) for start in range(0, len(scenes), size))
    return torch.cat([model.encode_image(scenes.images(part))[:, 1:] for part in parts]).clone()


@torch.no_grad()
def names(model: MiniAlbef) -> Tensor:
    """Return `(concepts, WIDTH)`: what the base's text encoder makes of each thing's name in "a X"."""
    return model.text(captions([[concept] for concept in range(len(EMOJI))]))[:, 2]


def places() -> Tensor:
    """Return `(PATCHES,)` token ids: the answer to where each patch is."""
    side = round(PATCHES**0.5)
    third = (torch.arange(side) + 0.5).mul(3 / side).long()
    return torch.tensor([answer_id(WHERE, 3 * down + across) for down in third.tolist() for across in third.tolist()])


def learn(model: MiniAlbef, scenes: Scenes, steps: int, seed: int, blind: bool = False,
          each: Callable[[int, Answerer], None] = lambda step, answerer: None) -> Answerer:  # fmt: skip
    """Train an `Answerer` on questions about these scenes.

    Beside the answers it learns to say, at every token of an image, in which cell of the 3 x 3 grid this is: dense and
    free of charge, for everybody knows it.

    Args:
        model: the base; stays as it is.
        scenes: of a layout with `COPIES`.
        steps: of `BATCH` scenes with six questions each.
        seed: of everything random.
        blind: whether it gets the questions alone.
        each: called before each step.
    """
    torch.manual_seed(seed)
    answerer = Answerer(names(model))
    features = encoded(model, scenes)[:, : 0 if blind else PATCHES]
    drawer, random, where = Drawer(scenes, seed), np.random.default_rng(seed), places()

    def loss(step: int) -> Tensor:
        each(step, answerer)
        rows = random.integers(0, len(scenes), BATCH).tolist()
        words, right = drawer.ask(rows)
        answers, at_image = answerer.several(features[rows], words)
        total = F.cross_entropy(answers.flatten(0, 1), right.flatten())
        if blind:
            return total
        return total + F.cross_entropy(at_image.flatten(0, 1), where.repeat(len(rows))) / 3

    fit(answerer, loss, steps, RATE, f"questions alone {seed}" if blind else f"answering {seed}")
    return answerer
