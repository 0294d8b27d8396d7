"""Captions that name some of the things in a scene, as words and as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

EMOJI = "🌵🐟🚲🎸🐢🔑🚀🍕🐝🍄⚓🎈🦋🚗🏆🪁🍌🐘🌻🎩👑🥕🐧💡🎁🐌🍓🦉⏰🥁🐞🌈"
"""The drawn things, one character each."""

PAD, CLS, ARTICLE, COMMA, AND = range(5)
CAPTION_LENGTH = 9
"""Tokens of the longest caption: [CLS] a X , a Y and a Z."""


@lru_cache(maxsize=None)
def concepts() -> tuple[str, ...]:
    """Return the names of the drawn things, in the order of `EMOJI`."""
    import emoji

    return tuple(emoji.demojize(drawing).strip(":").replace("_", " ") for drawing in EMOJI)


def vocabulary_size() -> int:
    return AND + 1 + len(EMOJI)


def caption_ids(named: Sequence[int]) -> list[int]:
    """Return token ids of "a X", "a X and a Y" or "a X, a Y and a Z" behind a [CLS], padded to `CAPTION_LENGTH`."""
    ids = [CLS]
    for place, concept in enumerate(named):
        if place:
            ids.append(AND if place == len(named) - 1 else COMMA)
        ids += [ARTICLE, AND + 1 + concept]
    return ids + [PAD] * (CAPTION_LENGTH - len(ids))


def captions(named: Sequence[Sequence[int]]) -> Tensor:
    """Return `(B, CAPTION_LENGTH)` token ids of many captions."""
    return torch.tensor([caption_ids(one) for one in named])


def concepts_of(ids: Tensor) -> list[tuple[int, ...]]:
    """Return the concepts that captions `(B, L)` name: what `captions` was given."""
    return [tuple(token - AND - 1 for token in row if token > AND) for row in ids.tolist()]


def caption_text(named: Sequence[int]) -> str:
    """Return the caption in words."""
    words = [concepts()[concept] for concept in named]
    return " and ".join(part for part in (", ".join(f"a {w}" for w in words[:-1]), f"a {words[-1]}") if part)


def name_some(objects: Sequence[int], random: np.random.Generator, most: int = 2) -> tuple[int, ...]:
    """Name one to `most` of the objects of a scene, in random order: what a caption names."""
    number = int(random.integers(1, most + 1))
    return tuple(objects[i] for i in random.permutation(len(objects))[:number])


def swap_one(named: Sequence[int], objects: Sequence[int], random: np.random.Generator) -> tuple[int, ...]:
    """Return the caption with one object swapped for one that the scene does not have."""
    absent = [concept for concept in range(len(EMOJI)) if concept not in objects]
    swapped = list(named)
    swapped[int(random.integers(len(named)))] = absent[int(random.integers(len(absent)))]
    return tuple(swapped)


def unique_captions(
    objects: Sequence[Sequence[int]], pool: int, seed: int, named: int = 2
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return scenes and captions for retrieval, where no caption fits another scene of the pool.

    Args:
        objects: the concepts of each scene.
        pool: how many scenes to find.
        seed: of the choice of captions.
        named: concepts that a caption names.

    Returns:
        Rows of `objects` and, for each, its caption's concepts.

    Raises:
        ValueError: not enough scenes with a caption of their own.
    """
    random = np.random.default_rng(seed)
    rows: list[int] = []
    texts: list[tuple[int, ...]] = []
    for row in range(len(objects)):
        here = set(objects[row])
        if any(here >= set(text) for text in texts):
            continue
        own = next(
            (c for c in _choices(objects[row], named, random) if not any(set(c) <= set(objects[r]) for r in rows)),
            None,
        )
        if own is not None:
            rows.append(row)
            texts.append(own)
        if len(rows) == pool:
            return rows, texts
    raise ValueError(f"only {len(rows)} of {len(objects)} scenes have a caption of their own; {pool} are needed")


def _choices(
    objects: Sequence[int], named: int, random: np.random.Generator, tries: int = 40
) -> Iterator[tuple[int, ...]]:
    for _ in range(tries):
        yield tuple(objects[i] for i in random.permutation(len(objects))[:named])
