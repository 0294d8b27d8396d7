"""A small CLIP of open_clip's own classes: its sizes, its words, and its committed weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.world.captions import PAD, caption_ids, vocabulary_size

SIZE, PATCH, WIDTH, DEPTH, HEADS = 64, 8, 64, 6, 4
"""`SIZE`, in pixels, is that of the committed weights; others are trained and loaded with `--size`."""
LAYERS = (2, 4)
"""Selection inside the 3rd and the 5th of 6 blocks."""
CONTEXT = 25
MOST = 8
"""Objects that a training caption names at most; the questions name one or two."""
END = vocabulary_size()
"""The last token of every caption and the largest id: open_clip pools the text there."""


class Stem(nn.Sequential):
    """Three strided convolutions in the place of `conv1`: small models need them to see edges."""

    stride = (PATCH, PATCH)

    def __init__(self, width: int) -> None:
        steps = (3, width // 4, width // 2, width)
        convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(steps, steps[1:])]
        super().__init__(convolutions[0], nn.GELU(), convolutions[1], nn.GELU(), convolutions[2])


def build(size: int = SIZE) -> Any:
    """Build an `open_clip.model.CLIP`: ViT of 6 blocks, width 64, 64 patches; text of 2 layers; 0.44 M parameters.

    Args:
        size: of its images in pixels, a multiple of 8; the number of patches follows.
    """
    from open_clip.model import CLIP

    vision = dict(layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=size)
    text = dict(context_length=CONTEXT, vocab_size=END + 1, width=WIDTH, heads=HEADS, layers=2)
    model = CLIP(WIDTH, vision, text)
    model.visual.conv1 = Stem(WIDTH)
    return model


def size_of(model: Any) -> int:
    """Return how many pixels the images of a model have, each way."""
    return int(model.visual.image_size[0])


def tokenize(named: Sequence[Sequence[int]]) -> Tensor:
    """Return `(B, CONTEXT)` token ids of captions that name these concepts, at most `MOST` each."""
    rows = [[token for token in caption_ids(one) if token != PAD] + [END] for one in named]
    return torch.tensor([row + [PAD] * (CONTEXT - len(row)) for row in rows])


def save(model: Any, path: Path, about: dict[str, Any]) -> None:
    """Write weights in half precision, and what is known about them in a JSON beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def load(seed: int, folder: Path = CHECKPOINTS) -> Any:
    """Return the model of a committed checkpoint, in single precision.

    Raises:
        FileNotFoundError: there is none for this seed; says how to make it.
    """
    path = folder / f"clip-{seed}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: make it with python -m benchmarks.accuracy clip --train --seed {seed}")
    weights = torch.load(path, weights_only=True)
    model = build(PATCH * round((len(weights["visual.positional_embedding"]) - 1) ** 0.5))
    model.load_state_dict(weights)
    return model.float().eval()


def digest(seed: int, folder: Path = CHECKPOINTS) -> str:
    """Return eight letters that say which weights a checkpoint has: what was answered with others is not taken over."""
    path = folder / f"clip-{seed}.pt"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else "missing"
