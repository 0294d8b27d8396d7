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
from .standing import Held, Standing, all_same, standing

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
    blocks: tuple[nn.Module, ...]
    parts: tuple[Standing, ...]
    """The blocks and what leads to the parameters in them."""
    parameters: tuple[Held, ...]
    """Those that the weights are parts of."""
    weights: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    """Those of all weights, which are compared at once."""
    found: Directions
    left: tuple[Directions, ...]

    def fits(self, goal: Tensor, blocks: Sequence[nn.Module], layers: Sequence[int]) -> bool:
        """Tell whether the same directions would come out again.

        Writes that autograd sees count up the version of a parameter, and a tensor that is held gives its address to
        no other. Writes past autograd (`.data`, numpy) are seen where they change the diagonal, which meets every row
        and every column.
        """
        return (
            [self.found.layer, *(each.layer for each in self.left)] == list(layers)
            and self.goal.dtype == goal.dtype
            and torch.equal(self.goal, goal)
            and all_same(blocks, self.blocks)
            and all(part.stands() for part in self.parts)
            and all(parameter.stands() for parameter in self.parameters)
            and all(map(torch.equal, self.values, values_of(self.weights)))
        )


def values_of(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy the vectors and the diagonals of weights, all of a dtype side by side."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for weight in weights:
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
    if memory is None or goal.device.type != "cpu":  # elsewhere to look at values would make the host wait
        return _pulled_back(tower, first, later, goal)
    blocks = tower.blocks[first:]
    known: Known | None = memory.get(NAME)
    if known is None or not known.fits(goal, blocks, (first, *later)):
        memory.pop(NAME, None)
        found, left = _pulled_back(tower, first, later, goal)
        known = _known(tower, blocks, goal, found, left)
        if known is None:
            return found, left
        memory[NAME] = known
    return known.found, list(known.left)


def _known(
    tower: Tower, blocks: Sequence[nn.Module], goal: Tensor, found: Directions, left: Sequence[Directions]
) -> Known | None:
    """Return what can be used again; `None` where a weight cannot be trusted to stay what it is.

    Those are weights that a layer makes anew for each call (LoRA, quantised, by hooks, offloaded, in shards), that
    stand somewhere else than in the blocks, or that are not on the CPU.
    """
    weights: list[Tensor] = []
    for block in blocks:
        layer = tower.adapter.projections(block)
        if not shown(layer):
            return None
        read = layer.value, layer.output, layer.output_scale, getattr(layer.norm, "weight", None)
        weights.extend(weight for weight in read if weight is not None)
    owners = {id(owner): owner for owner in (each if each._base is None else each._base for each in weights)}
    for owner in owners.values():
        if type(owner) is not nn.Parameter or owner.device.type != "cpu" or owner.is_inference():
            return None
    parts = tuple(part for block in blocks for part in standing(block, owners))
    there = {id(parameter) for part in parts for parameter in part.parameters}
    if not there.issuperset(owners) or not all(part.stands() for part in parts):
        return None
    held = tuple(map(Held.of, owners.values()))
    return Known(goal.clone(), tuple(blocks), parts, held, tuple(weights), values_of(weights), found, tuple(left))


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
