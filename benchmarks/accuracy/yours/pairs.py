"""Image-caption pairs to align on, and those of a table of paths and captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Tuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.models.host import Host, Tokens

Pair = Tuple[Tensor, Tokens]
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


def table_pairs(table: Path, images: Path | None, host: Host) -> Pairs:
    """Return lines of `PATH<TAB>CAPTION`; paths start from `images`, or from the folder of the table.

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
