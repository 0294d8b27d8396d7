"""Image-caption pairs to align on: emoji scenes, or a table of paths and captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.host import Host, OpenClipHost, Tokens

from .clip import CHECKPOINTS, SIZE, load, named_in, tokenize
from .scenes import Layout, make_scenes

Pair = tuple[Tensor, Tokens]
"""An image `(3, H, W)` and what the tokenizer makes of its caption, `(L,)` each."""


@dataclass
class Pairs(Dataset[Pair]):
    """`pairs[place, epoch]` gives a pair; scenes have another caption in every epoch."""

    size: int
    read: Callable[[int, int], Pair]
    name: str = ""
    """Tells these pairs from others, in words."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int]) -> Pair:
        return self.read(*key)


def scene_pairs(count: int, seed: int) -> Pairs:
    """Emoji scenes that the small CLIP was not trained on, with captions that name 2 to 8 objects."""
    scenes = make_scenes(count, 5000 + seed, layout=Layout(size=SIZE))

    def read(place: int, epoch: int) -> Pair:
        random = np.random.default_rng([seed, epoch, place])
        named = named_in(scenes.objects[place], 2, random)
        return scenes.images(slice(place, place + 1))[0], {"text": tokenize([named])[0]}

    return Pairs(count, read, f"emoji scenes of seed {seed}")


def table_pairs(table: Path, images: Path | None, host: Host) -> Pairs:
    """Lines of `PATH<TAB>CAPTION`; paths start from `images`, or from the folder of the table.

    Raises:
        ValueError: a line without a tab, or no line at all.
    """
    folder, rows, content = images or table.parent, [], table.read_text()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        path, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"{table}:{number} has no tab between path and caption: {line[:80]!r}")
        rows.append((folder / path, caption.strip()))
    if not rows:
        raise ValueError(f"{table} holds no pair: it needs lines of PATH<TAB>CAPTION")

    def read(place: int, epoch: int) -> Pair:
        path, caption = rows[place]
        with Image.open(path) as picture:
            pixels = host.preprocess(picture.convert("RGB"))
        return pixels, {name: ids[0] for name, ids in host.tokenize([caption]).items()}

    return Pairs(len(rows), read, f"{table.name} with SHA-256 {hashlib.sha256(content.encode()).hexdigest()[:16]}")


def small_host(seed: int, checkpoints: Path = CHECKPOINTS) -> OpenClipHost:
    """The small CLIP as the other benchmarks see a model; it has no preprocessing or words of its own."""

    def refuse(*_: object) -> Tensor:
        raise ValueError("the small CLIP sees emoji scenes alone: pictures and words are for other models")

    model = load(seed, checkpoints)
    name, weights = f"small CLIP {seed}", f"weights: {checkpoints}"
    return OpenClipHost(model, name, "open_clip", SIZE, weights, False, refuse, refuse)  # type: ignore[arg-type]
