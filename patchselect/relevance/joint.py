"""`relevance="joint"`: the cosine between text and patch in the joint image-text space."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..adapter import Tower
from ..weights import place_of
from .base import Candidates, Relevance, check_projects, multiply_adds
from .kernels import combine_scores, joint_scores


class Joint(Relevance):
    """`s = cos(t, P(norm(x)))`: each patch goes through the host's final norm and projection."""

    name = "joint"
    takes_tiles = True

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        return joint_scores(text, seen.projected(seen.patches))

    def combine(self, scores: Tensor) -> Tensor:
        return combine_scores(scores)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        tower.text_width()  # a host that shares one sequence says so here
        check_projects(tower, self.name, guidance)

    def reads(self, tower: Tower, layers: Sequence[int]) -> Sequence[int]:
        return ()

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        width = tower.text_width() if guidance == "text" else 0
        return 0, projection_cost(tower) + width


def projection_cost(tower: Tower) -> int:
    """Count the multiply-adds that take one token into the joint space; 0 where there is none."""
    token = torch.zeros(1, 1, tower.width, **place_of(tower.blocks[0]))
    try:
        return multiply_adds(lambda: tower.project(token))
    except ValueError:
        return 0
