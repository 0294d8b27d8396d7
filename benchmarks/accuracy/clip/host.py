"""The small CLIP and its scenes as the tools for your own weights see a model and its pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.world.scenes import Layout, make_scenes
from benchmarks.accuracy.yours.pairs import Pair, Pairs
from benchmarks.models.host import OpenClipHost

from .model import SIZE, load, tokenize
from .training import named_in


def scene_pairs(count: int, seed: int) -> Pairs:
    """Return emoji scenes that the small CLIP was not trained on, with captions that name 2 to 8 objects."""
    scenes = make_scenes(count, 5000 + seed, layout=Layout(size=SIZE))

    def read(place: int, epoch: int) -> Pair:
        random = np.random.default_rng([seed, epoch, place])
        named = named_in(scenes.objects[place], 2, random)
        return scenes.images(slice(place, place + 1))[0], {"text": tokenize([named])[0]}

    return Pairs(count, read, f"emoji scenes of seed {seed}")


def small_host(seed: int, checkpoints: Path = CHECKPOINTS) -> OpenClipHost:
    """Return the small CLIP as the other benchmarks see a model; it has no preprocessing or words of its own."""

    def refuse(*_: object) -> Tensor:
        raise ValueError("the small CLIP sees emoji scenes alone: pictures and words are for other models")

    model = load(seed, checkpoints)
    name, weights = f"small CLIP {seed}", f"weights: {checkpoints}"
    return OpenClipHost(model, name, "open_clip", SIZE, weights, False, refuse, refuse)  # type: ignore[arg-type]
