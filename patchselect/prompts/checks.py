"""What `apply` asks of hosts with prompts before it changes anything."""

from __future__ import annotations

from typing import Sequence

from torch import nn

from ..adapter import Tower
from ..wiring.plan import Plan
from .host import Prompted


def check_prompts(plan: Plan, model: nn.Module, towers: Sequence[Tower]) -> None:
    """Raise a ValueError if a selection would not be read, or `positions` was given and there is no prompt."""
    for tower in towers:
        if isinstance(tower.adapter, Prompted):
            tower.adapter.check(model, tower, plan.layers if plan.selects else ())
        elif plan.positions != "original":
            raise ValueError(
                f"positions={plan.positions!r} says which positions patches have in the prompt of a language model, "
                f"and {type(model).__name__} has none: leave it out"
            )
