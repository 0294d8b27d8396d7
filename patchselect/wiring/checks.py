"""What `apply` looks at before it changes anything: wrappers that would hide the selection."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..adapter import Tower, Wrapper
from ..hooked import has_own_forward
from .guard import cannot_count
from .places import follows
from .plan import Plan
from .state import STATE
from .swapping import is_stuck
from .text_calls import call_with_text, recall_text


def check_reachable(plan: Plan, tower: Tower) -> None:
    """Raise a TypeError if a block carries a `forward` of its own, which goes before that of its class."""
    for index, block in enumerate(tower.blocks):
        if index not in plan.layers and not plan.counts(index) and not follows(plan, tower, index):
            continue
        _refuse_stuck(block)
        if has_own_forward(block):
            raise TypeError(
                f"block {index} of {type(tower.module).__name__} carries a forward of its own (gradient checkpointing, "
                "accelerate or another wrapper put it there), which would hide the selection: call patchselect.apply "
                "first and wrap after it"
            )


def check_pairing(plan: Plan, name: str, methods: Mapping[nn.Module, Mapping[str, Wrapper]]) -> None:
    """Raise a ValueError if a pairing of calls was asked for, and no call of the model brings a text."""
    if plan.pairing is None or plan.guidance != "text":
        return
    if not any(wrapper is call_with_text for wrappers in methods.values() for wrapper in wrappers.values()):
        raise ValueError(
            f"pairing={plan.pairing!r} says what a call with image and text together means, and {name} has none that "
            "is known here: leave it out, and give the text with patchselect.guide(model, text_features, "
            f"pairing={plan.pairing!r})"
        )


def check_counting(plan: Plan, tower: Tower) -> None:
    """Raise a ValueError if the adapter does not say how the attention of a block computes, and it is to count sizes.

    Whether it says so rightly is up to `check_blocks`.
    """
    if not plan.follows_sizes or not plan.sizes:
        return
    for index, block in enumerate(tower.blocks):
        if index in plan.layers or plan.counts(index):
            weights = tower.adapter.projections(block)
            if weights.qkv is None or weights.out is None:
                raise ValueError(cannot_count(plan, tower, index, "does not say how it is computed"))


def check_methods(plan: Plan, methods: Mapping[nn.Module, Mapping[str, Wrapper]]) -> None:
    """Raise the same for the tower and for methods that bring a text along; what was wrapped after `apply` is fine."""
    for module, wrappers in methods.items():
        _refuse_stuck(module)
        for name, wrapper in wrappers.items():
            of_text = wrapper in (call_with_text, recall_text)
            unused = name == "forward_features" or (of_text and plan.guidance != "text")
            if name in vars(module) and STATE not in vars(module) and not unused:
                raise TypeError(
                    f"this {type(module).__name__} carries a {name} of its own (accelerate or another wrapper put it "
                    "there), which would hide that of the selection: call patchselect.apply first and wrap after it"
                )


def _refuse_stuck(module: nn.Module) -> None:
    kind = type(module)
    if is_stuck(kind):
        raise TypeError(
            f"another library has put its class {kind.__module__}.{kind.__qualname__} on top of an earlier selection: "
            "undo that first, or build the model again"
        )
