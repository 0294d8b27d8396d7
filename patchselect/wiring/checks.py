"""What `apply` looks at before it changes anything: wrappers that would hide the selection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..adapter import Tower, Wrapper
from ..reading import evaluating
from .places import follows
from .plan import Plan
from .state import STATE
from .swapping import is_stuck
from .text_calls import call_with_text, recall_text

HALF_ON_CPU = (torch.float16, "cpu")
"""Older releases cannot multiply these."""


def check_reachable(plan: Plan, tower: Tower) -> None:
    """Raise a TypeError if a block carries a `forward` of its own, which goes before that of its class."""
    for index, block in enumerate(tower.blocks):
        if index not in plan.layers and not plan.counts(index) and not follows(plan, tower, index):
            continue
        _refuse_stuck(block)
        if "forward" in vars(block):
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
    """Raise a ValueError if the keys of a block are not known, or its attention cannot count sizes."""
    if not plan.follows_sizes:
        return
    for index, block in enumerate(tower.blocks):
        if index not in plan.layers and not plan.counts(index):
            continue
        weights = tower.adapter.projections(block)
        known = weights.qkv is not None and weights.out is not None
        if plan.sizes and not (known and _counts_alike(tower, block)):
            raise ValueError(
                f"the attention of block {index} of {type(tower.module).__name__} cannot count how many patches a "
                f"token stands for: the {tower.adapter.name} adapter "
                + ("computes it otherwise than the block does" if known else "does not say how it is computed")
                + (". Use sizes=False (merge alone), or merge=0" if plan.merge else ". Leave sizes out")
            )


@torch.no_grad()
def _counts_alike(tower: Tower, block: nn.Module) -> bool:
    """Check that attention which counts sizes of 1 is the block's own, on a few random tokens.

    Where tokens cannot be run here, nothing is checked: on the meta device, of weights in shards, in half precision on
    a CPU.
    """
    weight = next(block.parameters())
    cannot = weight.is_meta or hasattr(weight, "full_tensor") or (weight.dtype, weight.device.type) == HALF_ON_CPU
    if cannot or tower.single_stream:
        return True
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(tower.num_prefix_tokens + 4, 2, tower.width, generator=generator).to(weight)
    tokens = tokens.transpose(0, 1).contiguous() if tower.batch_first else tokens
    twin = evaluating(block)  # others may be training the block
    args, kwargs = tower.adapter.sample_call(tower, twin, tokens)
    own = tower.adapter.attend(tower, twin, *args, **kwargs).tokens
    ones = torch.ones(2, tower.num_prefix_tokens + 4, device=weight.device)
    found = tower.adapter.attend_sized(tower, twin, ones, *args, **kwargs).tokens
    far = (own - found).abs().max() / (own - tokens).abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    return bool(far < (0.1 if weight.element_size() < 4 else 0.01))  # TF32 rounds too


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
