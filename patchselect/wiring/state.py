"""What hangs on patched modules: one `Wiring` for a whole selection, one `Layer` for each selecting block."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, Mapping

from torch import nn

from ..adapter import Tower, Wrapper
from .changes import Places
from .plan import Plan
from .swapping import swap, unswap

STATE = "_patchselect"


@dataclass(eq=False)
class Wiring:
    """One selection in one model: what was asked for, and where it was put."""

    plan: Plan
    model: nn.Module = field(repr=False)
    towers: list[Tower] = field(repr=False)
    places: list[Places] = field(repr=False)
    """Where each tower held its parts."""
    patched: list[nn.Module] = field(default_factory=list, repr=False)
    bare: list[nn.Module] = field(default_factory=list, repr=False)
    """Those of the patched modules that keep their class."""
    traced: Any = field(default=None, repr=False)
    """The guidance of a graph while dynamo traces it; never set on the real object."""
    traced_journey: Any = field(default=None, repr=False)
    """The journey of a graph while dynamo traces it; never set on the real object."""

    def __getstate__(self) -> dict[str, Any]:
        """Return all that there is; blocks leave their layer out, so that one of them does not carry the model."""
        layers = [(module, vars(module).get(STATE)) for module in self.patched]
        return {**vars(self), "layers": [(m, layer.numbers()) for m, layer in layers if isinstance(layer, Layer)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layers = state.pop("layers")
        vars(self).update(state)
        for module, (tower, *numbers) in layers:
            setattr(module, STATE, Layer(self, self.towers[tower], *numbers))

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        made = memo[id(self)] = Wiring.__new__(Wiring)
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made

    def patch(self, module: nn.Module, overrides: Mapping[str, Wrapper], state: Wiring | Layer) -> None:
        """Let wrappers stand in for methods of `module`, and hang `state` on it."""
        if overrides:
            swap(module, overrides)
        else:
            self.bare.append(module)
        setattr(module, STATE, state)
        self.patched.append(module)

    def unpatch(self) -> None:
        """Give every patched module its own class back; one that got its class from somebody else keeps that."""
        patched, self.patched = self.patched, []
        kept = [type(module) for module in patched if STATE in vars(module) and not release(module, self)]
        if kept:
            names = ", ".join(sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in kept}))
            warnings.warn(
                f"the selection is out of {type(self.model).__name__}, but another library has given {len(kept)} of "
                f"its modules classes of its own since patchselect.apply ({names}): they were left as they are",
                stacklevel=3,
            )

    def swaps(self, module: nn.Module) -> bool:
        """Tell whether `module` got a class of this selection; a model may hold its state alone."""
        return not any(part is module for part in self.bare)

    def holds(self, module: nn.Module) -> bool:
        """Tell whether `module` was patched by this selection, and is not a copy of a block of it."""
        return any(part is module for part in self.patched)


def release(module: nn.Module, wiring: Wiring) -> bool:
    """Take the state of a selection off a module and give its own class back; tell whether that could be done.

    A class of somebody else on top of the swapped one may stay: without a state the swapped one does nothing.
    """
    delattr(module, STATE)
    return unswap(module) if wiring.swaps(module) else True


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

    def numbers(self) -> tuple[Any, ...]:
        """Return which tower it is of, and its own fields."""
        which = next(number for number, tower in enumerate(self.wiring.towers) if tower is self.tower)
        return which, self.index, self.first, self.ratio

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave nothing in the pickle of a block alone: it is a plain one; the wiring gives it back in a whole."""
        return _nothing, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        """Go along with a copy of the model or the tower; a copy of a block alone belongs to the same selection."""
        whole = (self.wiring, self.wiring.model, self.tower.module)
        if not any(id(part) in memo for part in whole):
            return dataclasses.replace(self)
        made = memo[id(self)] = Layer.__new__(Layer)
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made

    @property
    def begins(self) -> bool:
        """Whether it is the first block of its tower that shortens the sequence."""
        return self.index == (0 if self.plan.counts(0) and self.plan.merge else self.plan.layers[0])

    def instead_of_reentry(self) -> str:
        """Return what to do in place of reentrant checkpointing, on this host."""
        return self.tower.adapter.instead_of_reentry(self.wiring.model, self.tower)


def _nothing() -> None:
    """Stand in for the layer of a block that was pickled without its tower."""


def wirings_in(model: nn.Module) -> list[Wiring]:
    """Return the selections in `model` and in what it contains, in order."""
    found = (_of(module) for module in model.modules())
    return list(dict.fromkeys(wiring for wiring in found if wiring is not None))


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


def forget(model: nn.Module) -> None:
    """Take every selection out of `model`, and off copies of single blocks in it, which leave the original alone."""
    for wiring in wirings_in(model):
        copies = [part for part in model.modules() if _of(part) is wiring and not wiring.holds(part)]
        if any(_of(part) is wiring and wiring.holds(part) for part in model.modules()):
            wiring.unpatch()
        for part in copies:
            release(part, wiring)
    for part in model.modules():
        if STATE in vars(part) and vars(part)[STATE] is None:  # a block that was pickled alone
            delattr(part, STATE)
            unswap(part)


def _of(module: nn.Module) -> Wiring | None:
    state = vars(module).get(STATE)
    return state.wiring if isinstance(state, Layer) else state
