"""A text pulled back through the value-output paths of a tower, for `relevance="values"`: once per text and weights.

What `values` reads the patches with depends on the text and the weights alone. While a `guide` block lasts it is kept
from one inference pass to the next, and used again where text and weights are what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..weights import gathered, norm_eps, norm_scale, shown
from .kernels import value_direction

NAME = "directions"


class Directions(NamedTuple):
    """What one selection layer reads its patches with, each `(B, T, D)` or `(1, T, D)`.

    `layer` is compared and never looked for in a dict or a tuple: under torch.compile it can be a symbol, which some
    releases do not find there.
    """

    layer: int
    own: Tensor
    folded: Tensor | None
    """The sum over all later layers."""
    eps: float
    """Of the norms of the tower, by which `folded` reads patches."""


@dataclass(frozen=True, eq=False)
class Known:
    """Directions, and what they were made of."""

    goal: Tensor
    weights: tuple[Mark, ...]
    values: tuple[Tensor, ...]
    """Those of all marks, which are compared at once."""
    found: Directions
    left: tuple[Directions, ...]

    def fits(self, goal: Tensor, weights: Sequence[Mark], layers: Sequence[int]) -> bool:
        """Tell whether the same directions would come out again."""
        return (
            [self.found.layer, *(each.layer for each in self.left)] == list(layers)
            and self.goal.dtype == goal.dtype
            and torch.equal(self.goal, goal)
            and len(self.weights) == len(weights)
            and all(known.fits(mark) for known, mark in zip(self.weights, weights))
            and all(map(torch.equal, self.values, values_of(weights)))
        )


@dataclass(frozen=True, eq=False)
class Mark:
    """What tells whether a weight is what it was.

    Writes that autograd sees count up `version`, and a tensor that is held gives its address to no other. Writes past
    autograd (`.data`, numpy) are seen where they change the diagonal, which meets every row and every column.
    """

    weight: Tensor
    version: int

    def fits(self, now: Mark) -> bool:
        old, new = self.weight, now.weight
        return (old.data_ptr(), self.version, old.dtype) == (new.data_ptr(), now.version, new.dtype) and (
            (old.shape, old.stride()) == (new.shape, new.stride())
        )


def values_of(marks: Sequence[Mark]) -> tuple[Tensor, ...]:
    """Copy the vectors and the diagonals of marked weights, all of a dtype side by side."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for mark in marks:
        weight = mark.weight
        found.setdefault(weight.dtype, []).append(weight.diagonal() if weight.dim() == 2 else weight)
    return tuple(map(torch.cat, found.values()))


def pulled_back(
    tower: Tower, first: int, later: Sequence[int], goal: Tensor, memory: dict[str, Any] | None
) -> tuple[Directions, list[Directions]]:
    """Return `w_j` and `sum over l > j of gamma_l * w_l` (if any) of layer `first`, and those of the `later` ones.

    Args:
        tower: the tower.
        first: 0-based index of the selection layer.
        later: those of the selection layers after it, ascending, whose directions are wanted too.
        goal: `(B, T, D)` or `(1, T, D)`, the text in the residual stream.
        memory: where they are kept for the next call; `None` keeps nothing.
    """
    marks = None if memory is None else _marks(tower, first, goal)
    if memory is None or marks is None:
        return _pulled_back(tower, first, later, goal)
    known: Known | None = memory.get(NAME)
    if known is None or not known.fits(goal, marks, (first, *later)):
        found, left = _pulled_back(tower, first, later, goal)
        known = memory[NAME] = Known(goal.clone(), tuple(marks), values_of(marks), found, tuple(left))
    return known.found, list(known.left)


def _marks(tower: Tower, first: int, goal: Tensor) -> list[Mark] | None:
    """Mark all weights that directions are made of; `None` where one cannot be trusted to stay what it is.

    Those are weights that a layer makes anew for each call (LoRA, quantised, by hooks, offloaded, in shards), and
    all that are not on the CPU, where to look at their values would make the host wait for the device.
    """
    marks = []
    for block in tower.blocks[first:]:
        layer = tower.adapter.projections(block)
        if not shown(layer):
            return None
        for weight in (layer.value, layer.output, layer.output_scale, getattr(layer.norm, "weight", None)):
            if weight is None:
                continue
            own = type(weight) is nn.Parameter or type(weight._base) is nn.Parameter
            if not own or weight.device.type != "cpu" or weight.is_inference():
                return None
            marks.append(Mark(weight, weight._version))
    return marks if goal.device.type == "cpu" else None


def _pulled_back(tower: Tower, first: int, later: Sequence[int], goal: Tensor) -> tuple[Directions, list[Directions]]:
    own = goal
    folded: Tensor | None = None
    beyond: Tensor | None = None
    left: list[Directions] = []
    eps = 0.0
    for index in reversed(range(first, len(tower.blocks))):
        weights = tower.adapter.projections(tower.blocks[index])
        output = gathered(weights.output)
        scaled = goal if weights.output_scale is None else goal * gathered(weights.output_scale)
        own, beyond = value_direction(scaled.to(output.dtype), gathered(weights.value), output), folded
        gamma, eps = norm_scale(weights.norm), norm_eps(weights.norm)
        term = own if gamma is None else own * gamma
        folded = term if folded is None else folded + term
        if index in later:
            left.append(Directions(index, own, beyond, eps))
    return Directions(first, own, beyond, eps), left[::-1]


def head_directions(tower: Tower, index: int, goal: Tensor) -> Tensor:
    """Pull directions of the residual stream back through the value-output path of each head of one block.

    Args:
        tower: the tower.
        index: 0-based block.
        goal: `g`, `(B', T, D)`.

    Returns:
        `w_h = (g W_o)_h W_v^h`, `(B', T, H, D)`; its sum over the heads is what `values` reads patches with.
    """
    weights = tower.adapter.projections(tower.blocks[index])
    output, value = gathered(weights.output), gathered(weights.value)
    scaled = goal if weights.output_scale is None else goal * gathered(weights.output_scale)
    read = (scaled.to(output.dtype) @ output).unflatten(-1, (weights.num_heads, -1))  # (B', T, H, E)
    rows, count, heads, _ = read.shape
    per_head = read.permute(2, 0, 1, 3).flatten(1, 2) @ value.unflatten(0, (heads, -1))  # (H, B' T, D)
    return per_head.unflatten(1, (rows, count)).permute(1, 2, 0, 3)
