"""What can be answered without the picture: a classifier that is trained on the texts of questions alone.

It sees all candidates of a question at once, as a selection that they share does. On questions that are asked well it
is at chance; where it is not, the texts give the answer away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .candidates import CHOICES, KINDS, Caption
from .captions import EMOJI, name_some, swap_one
from .scenes import PLAIN

TRAINED, COUNTING = "trained", "counting"
PAIR = "pair"
"""Of questions: which of two captions fits, the other being the right one with one object swapped (matching)."""
TRAINING = 4000
"""Questions that the classifier is trained on; their scenes need not be drawn."""


def objects_drawn(count: int, seed: int) -> list[list[int]]:
    """Return the concepts of so many scenes, drawn as `make_scenes` draws them."""
    random, (fewest, most) = np.random.default_rng(seed), PLAIN.objects
    return [random.permutation(len(EMOJI))[: random.integers(fewest, most + 1)].tolist() for _ in range(count)]


def asked(count: int, seed: int, kind: str, named: int = 2) -> list[tuple[Caption, ...]]:
    """Return the candidates of so many questions of one of `KINDS`, or of `PAIR`, the right one in front."""
    random, made = np.random.default_rng([seed, count]), []
    for objects in objects_drawn(count, seed):
        right = name_some(objects, random, named)
        pair = kind == PAIR
        made.append((right, swap_one(right, objects, random)) if pair else KINDS[kind](right, objects, random))
    return made


def overlaps(candidates: Sequence[Caption]) -> np.ndarray:
    """Return `(n,)`: how many words each candidate shares with the others, over all of them."""
    count = Counter(name for caption in candidates for name in set(caption))
    return np.array([sum(count[name] - 1 for name in set(caption)) for caption in candidates], dtype=float)


def described(candidates: Sequence[Caption]) -> np.ndarray:
    """Return `(n, features)`: each candidate by its words and how it stands to others; its own place is not told."""
    count = Counter(name for caption in candidates for name in set(caption))
    first = Counter(caption[0] for caption in candidates)
    last = Counter(caption[-1] for caption in candidates)
    words = np.zeros((len(candidates), len(EMOJI)))
    shared = [[len(set(one) & set(other)) for other in candidates] for one in candidates]
    told = []
    for row, caption in enumerate(candidates):
        words[row, list(caption)] = 1
        often = [count[name] for name in caption]
        others = sorted(shared[row][:row] + shared[row][row + 1 :]) or [0]
        told.append(
            [
                len(caption),
                *(min(often), max(often), sum(often), first[caption[0]], last[caption[-1]]),
                *(others[0], others[-1], sum(others), sum(s > 0 for s in others), sum(s == others[-1] for s in others)),
                caption[0] < caption[-1],
            ]
        )
    stand = np.array(told, dtype=float)
    spread = stand.std(0)
    beside = (stand - stand.mean(0)) / np.where(spread > 0, spread, 1)
    return np.concatenate([words, stand / CHOICES, beside, np.tanh(beside) ** 2], axis=1)


def chance_of(scores: np.ndarray) -> float:
    """Return how likely the first of the candidates wins when the best are drawn from by lot."""
    best = np.isclose(scores, scores.max(), rtol=0, atol=1e-9)
    return float(best[0] / best.sum())


@lru_cache(maxsize=None)
def reader(kind: str, named: int = 2, seed: int = 40001, alone: bool = False) -> Any:
    """Train a logistic regression on the texts of `TRAINING` questions of one kind: does a caption fit.

    It reads each caption among the candidates of its question (`described`), or, with `alone`, by itself.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    questions = asked(TRAINING, seed, kind, named)
    features = np.concatenate([seen(candidates, alone) for candidates in questions])
    right = np.concatenate([np.arange(len(candidates)) == 0 for candidates in questions])
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features, right)


def seen(candidates: Sequence[Caption], alone: bool = False) -> np.ndarray:
    """Return `(n, features)` of the candidates of one question: `described`, or each as if there were no other."""
    return np.concatenate([described([one]) for one in candidates]) if alone else described(candidates)


def answered(candidates: Sequence[tuple[Caption, ...]], how: str, kind: str, named: int = 2) -> Tensor:
    """Return `(N,)`: how likely each question is answered right from the texts alone; ties are broken by lot.

    Args:
        candidates: of each question, the right one in front.
        how: `TRAINED`, a classifier that learned from other questions of this kind, or `COUNTING`: the candidate that
            shares the most words with the others.
        kind: of the questions, one of `KINDS` or `PAIR`.
        named: most objects that a caption names.
    """
    if how == COUNTING:
        return torch.tensor([chance_of(overlaps(one)) for one in candidates], dtype=torch.float64)
    model = reader(kind, named)
    return torch.tensor([chance_of(model.decision_function(seen(one))) for one in candidates], dtype=torch.float64)


def fits(captions: Sequence[Caption], kind: str = PAIR, named: int = 2) -> np.ndarray:
    """Return `(n,)`: how much each caption looks as if it fitted a picture that nobody has seen; above 0 it does."""
    found: np.ndarray = reader(kind, named, alone=True).decision_function(seen(captions, alone=True))
    return found
