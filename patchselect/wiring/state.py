"""What hangs on patched modules: one `Wiring` for a whole selection, one `Layer` for each selecting block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from torch import nn

from ..adapter import Tower, Wrapper
from .plan import Plan
from .swapping import swap, unswap

STATE = "_patchselect"


@dataclass(eq=False)
class Wiring:
    """One selection in one model: what was asked for, and where it was put."""

    plan: Plan
    model: nn.Module = field(repr=False)
    towers: list[Tower] = field(repr=False)
    patched: list[nn.Module] = field(default_factory=list, repr=False)
    traced: Any = field(default=None, repr=False)
    """The guidance of a graph while dynamo traces it; never set on the real object."""
    traced_journey: Any = field(default=None, repr=False)
    """The journey of a graph while dynamo traces it; never set on the real object."""

    def patch(self, module: nn.Module, overrides: Mapping[str, Wrapper], state: Wiring | Layer) -> None:
        """Let wrappers stand in for methods of `module`, and hang `state` on it."""
        if overrides:
            swap(module, overrides)
        setattr(module, STATE, state)
        self.patched.append(module)

    def unpatch(self) -> None:
        """Give every patched module its own class back."""
        for module in self.patched:
            if STATE in vars(module):
                unswap(module)
                delattr(module, STATE)
        self.patched = []


@dataclass(eq=False)
class Layer:
    """One block of one tower: a selection layer, one that merges or counts sizes, or one that a prefix may skip."""

    wiring: Wiring
    tower: Tower
    index: int
    """0-based index of the block."""
    first: bool
    """Whether it is the first selection layer of its tower."""
    ratio: tuple[int, int]

    @property
    def plan(self) -> Plan:
        return self.wiring.plan

    @property
    def begins(self) -> bool:
        """Whether it is the first block of its tower that shortens the sequence."""
        return self.index == (0 if self.plan.merge else self.plan.layers[0])

    def instead_of_reentry(self) -> str:
        """Return what to do in place of reentrant checkpointing, on this host."""
        return self.tower.adapter.instead_of_reentry(self.wiring.model, self.tower)


def wirings_in(model: nn.Module) -> list[Wiring]:
    """Return the selections in `model` and in what it contains, in order."""
    states = (vars(module).get(STATE) for module in model.modules())
    found = (state.wiring if isinstance(state, Layer) else state for state in states if state is not None)
    return list(dict.fromkeys(found))


def wiring_of(model: nn.Module) -> Wiring:
    """Return the one selection in `model`, a part of it, or a wrapper around it.

    Raises:
        ValueError: there is none, or there are several.
    """
    state = getattr(model, STATE, None)
    if isinstance(state, Wiring):
        return state
    found = wirings_in(model)
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    raise ValueError(
        f"{name} holds {len(found)} separate selections: name the part that is meant"
        if found
        else f"{name} is not patched: call patchselect.apply(model) first"
    )
