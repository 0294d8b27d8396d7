"""Questions about scenes with one-word answers: is there one, how many, where.

Which answer is right does not depend on the words: in a test every concept has each answer of a kind equally often, so
that whoever reads the words alone is right as often as chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.world.captions import EMOJI
from benchmarks.accuracy.world.scenes import Layout, Scenes

THERE, MANY, WHERE = "is there", "how many", "where is"
ANSWERS = {
    THERE: ("no", "yes"),
    MANY: ("one", "two", "three", "four"),
    WHERE: tuple(f"{down} {across}" for down in ("top", "middle", "bottom") for across in ("left", "centre", "right")),
}
"""What can be answered to each kind of question; one token each."""
COPIES = (2, 4)
"""Every scene has one concept so many times, so that counting looks at the named one and not at what repeats."""
LAYOUT = Layout(copies=COPIES)
START = 0
"""The token that a prompt begins with."""
WORDS = 3
"""Of a question: its kind in two words, and the name of the thing, behind which the answer comes."""


@lru_cache(maxsize=None)
def vocabulary() -> dict[str, int]:
    """Return token ids: the words of questions and answers; the concepts, by their number, come after them."""
    words = ["", *(word for kind in ANSWERS for word in kind.split())]
    return {word: i for i, word in enumerate(dict.fromkeys([*words, *(a for each in ANSWERS.values() for a in each)]))}


def vocabulary_size() -> int:
    return len(vocabulary()) + len(EMOJI)


def question_ids(kind: str, concept: int) -> list[int]:
    """Return the `WORDS` token ids of a question."""
    return [*(vocabulary()[word] for word in kind.split()), len(vocabulary()) + concept]


def answer_id(kind: str, answer: int) -> int:
    return vocabulary()[ANSWERS[kind][answer]]


def cells(scenes: Scenes, row: int) -> dict[int, list[int]]:
    """Return the cells of the 3 x 3 grid, row by row, in which each concept of a scene stands."""
    third, found = scenes.pixels.shape[-1] / 3, {}
    for concept, (left, top, right, bottom) in zip(scenes.objects[row], scenes.boxes[row]):
        place = 3 * int((top + bottom) / 2 // third) + int((left + right) / 2 // third)
        found.setdefault(concept, []).append(place)
    return found


def truth(found: dict[int, list[int]], kind: str, concept: int) -> int | None:
    """Return the right answer as a number of `ANSWERS`; `None` where such a question has none."""
    here = found.get(concept, [])
    if kind == THERE:
        return int(bool(here))
    if kind == MANY:
        return len(here) - 1 if here else None
    return here[0] if len(here) == 1 else None


@dataclass(frozen=True)
class Questions:
    """Questions of all kinds, each about one scene."""

    kinds: tuple[str, ...]
    concepts: tuple[int, ...]
    rows: Tensor
    """`(N,)`: their scenes."""
    right: tuple[int, ...]
    """The right answers, as numbers of `ANSWERS`."""

    def __len__(self) -> int:
        return len(self.kinds)

    def words(self) -> Tensor:
        """Return `(N, WORDS)` token ids."""
        return torch.tensor([question_ids(kind, concept) for kind, concept in zip(self.kinds, self.concepts)])

    def answers(self) -> Tensor:
        """Return `(N,)` token ids of the right answers."""
        return torch.tensor([answer_id(kind, answer) for kind, answer in zip(self.kinds, self.right)])

    def of(self, kind: str) -> Tensor:
        """Return `(N,)`, bool: which are of this kind."""
        return torch.tensor([each == kind for each in self.kinds])


def balanced(scenes: Scenes, times: dict[str, int], seed: int) -> Questions:
    """Ask every concept with every answer of a kind so many times, each time about another scene.

    Args:
        scenes: of a layout with `COPIES`.
        times: how often, by kind.
        seed: of the choice of scenes.

    Raises:
        ValueError: not enough scenes in which an answer is right.
    """
    random = np.random.default_rng(seed)
    fitting: dict[tuple[str, int, int], list[int]] = {}
    for row in range(len(scenes)):
        found = cells(scenes, row)
        for kind in times:
            for concept in range(len(EMOJI)):
                answer = truth(found, kind, concept)
                if answer is not None:
                    fitting.setdefault((kind, concept, answer), []).append(row)
    asked = []
    for kind, often in times.items():
        for concept in range(len(EMOJI)):
            for answer in range(len(ANSWERS[kind])):
                rows = fitting.get((kind, concept, answer), [])
                if len(rows) < often:
                    raise ValueError(
                        f"{len(scenes)} scenes have {len(rows)} in which {ANSWERS[kind][answer]!r} answers "
                        f"{kind!r} of concept {concept}, and {often} are needed: make more scenes"
                    )
                asked += [(kind, concept, row, answer) for row in random.permutation(rows)[:often].tolist()]
    kinds, concepts, chosen, right = zip(*asked)
    return Questions(kinds, concepts, torch.tensor(chosen), right)


def unbalanced(questions: Questions) -> list[tuple[str, int]]:
    """List the kinds and concepts whose answers are not equally often right: none where words give nothing away."""
    count = Counter(zip(questions.kinds, questions.concepts, questions.right))
    pairs = dict.fromkeys(zip(questions.kinds, questions.concepts))
    return [
        (kind, concept)
        for kind, concept in pairs
        if len({count[kind, concept, answer] for answer in range(len(ANSWERS[kind]))}) > 1
    ]


class Drawer:
    """Draws questions for training: for each scene two of each kind, no answer likelier than another."""

    def __init__(self, scenes: Scenes, seed: int) -> None:
        self.found = [cells(scenes, row) for row in range(len(scenes))]
        self.random = np.random.default_rng(seed)

    def ask(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return `(B, 6, WORDS)` token ids of questions and `(B, 6)` of their answers."""
        words, answers = [], []
        for row in rows:
            asked = self._of_scene(self.found[row])
            words.append([question_ids(kind, concept) for kind, concept in asked])
            answers.append([answer_id(kind, truth(self.found[row], kind, concept) or 0) for kind, concept in asked])
        return torch.tensor(words), torch.tensor(answers)

    def _of_scene(self, found: dict[int, list[int]]) -> list[tuple[str, int]]:
        here, once = list(found), [concept for concept, places in found.items() if len(places) == 1]
        absent = [concept for concept in range(len(EMOJI)) if concept not in found]
        several = [concept for concept, places in found.items() if len(places) > 1]
        most = max(ANSWERS[MANY].index("four"), 1)
        # Of the four numbers one is that of the concepts that are there once.
        counted = [once if self.random.integers(most + 1) == 0 else several for _ in range(2)]
        asked = [(THERE, here), (THERE, absent), (WHERE, once), (WHERE, once), *((MANY, each) for each in counted)]
        return [(kind, among[int(self.random.integers(len(among)))]) for kind, among in asked]
