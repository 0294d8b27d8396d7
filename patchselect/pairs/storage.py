"""Finished chunks of a long computation, in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Texts
from ..compat import load_tensors
from ..wiring.state import Wiring
from .batches import Batch
from .checksums import checksums
from .prefix import Prefix


class Finished:
    """Chunks of scores that are stored under the place of their images, with what they were computed from.

    Args:
        folder: where to store them; `None` stores and finds nothing.
        wiring: the selection that is used.
        texts: all texts.
        candidates: the texts of each image, if not all.
    """

    def __init__(self, folder: str | Path | None, wiring: Wiring, texts: Texts, candidates: Tensor | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = () if candidates is None else (candidates,)
        self.key = [
            repr(wiring.plan),
            checksums([*wiring.model.parameters(), *wiring.model.buffers()]),
            checksums([texts.features, *texts.states.values(), *chosen]),
        ]

    def load(self, batch: Batch) -> Tensor | None:
        """Return the scores of these images, if they are finished.

        Raises:
            ValueError: they were computed from something else.
        """
        path = self._path(batch)
        if path is None or not path.exists():
            return None
        found = load_tensors(path)
        if found["key"] != self._key(batch):
            raise ValueError(
                f"{path} holds scores of other images, texts, weights or settings: give resume= an empty folder, or "
                "delete what is in it"
            )
        scores: Tensor = found["scores"]
        return scores

    def save(self, batch: Batch, scores: Tensor) -> None:
        """Store the scores of these images."""
        path = self._path(batch)
        if path is not None:
            unfinished = path.with_suffix(f".{os.getpid()}")
            torch.save({"key": self._key(batch), "scores": scores}, unfinished)
            unfinished.replace(path)

    def _path(self, batch: Batch) -> Path | None:
        name = f"images-{batch.start:09d}-{batch.start + len(batch):09d}.pt"
        return None if self.folder is None else self.folder / name

    def _key(self, batch: Batch) -> list[object]:
        images = batch.images.tokens if isinstance(batch.images, Prefix) else batch.images
        return [*self.key, checksums([images, *batch.options.values()])]
