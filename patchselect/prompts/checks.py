"""What `apply` asks of hosts with prompts before it changes anything."""

from __future__ import annotations

import dataclasses
from typing import Sequence

from torch import nn

from ..adapter import Tower
from ..reduction.groups import Grouped
from ..wiring.plan import Plan
from .host import Prompted


def plan_for_prompts(plan: Plan, model: nn.Module, tower: Tower) -> Plan:
    """Return the plan of a host that reads squares of patches as one: whole squares stay or go.

    Raises:
        ValueError: patches are to merge, or a reduction asks for the place of each.
    """
    host = tower.adapter
    side = host.side(host.core(model)) if isinstance(host, Prompted) else 1
    if side == 1 or not plan.selects:
        return plan
    square = f"{type(model).__name__} joins squares of {side} x {side} patches into one token, so"
    if plan.merge or plan.sizes:
        raise ValueError(f"{square} patches cannot merge with others or stand for several: leave merge and sizes out")
    if plan.reduction.reads_places:
        raise ValueError(f"{square} fusion={plan.reduction!r} would ask for the place of each square: use another")
    return dataclasses.replace(plan, reduction=Grouped(plan.reduction, side, host.squares_together))


def check_prompts(plan: Plan, model: nn.Module, towers: Sequence[Tower]) -> None:
    """Raise a ValueError if a selection would not be read, or `positions` was given and there is no prompt."""
    for tower in towers:
        if isinstance(tower.adapter, Prompted):
            if plan.positions != "original" and not tower.adapter.renumbers:
                raise ValueError(
                    f"positions={plan.positions!r} counts columns anew, and in {type(model).__name__} a position is a "
                    "place in the image: leave it out"
                )
            tower.adapter.check(model, tower, plan.layers if plan.selects else ())
        elif plan.positions != "original":
            raise ValueError(
                f"positions={plan.positions!r} says which positions patches have in the prompt of a language model, "
                f"and {type(model).__name__} has none: leave it out"
            )
