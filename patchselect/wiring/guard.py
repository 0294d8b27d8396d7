"""Is a block what its adapter takes it for? Its own `forward` is compared once with the two halves that replace it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ..adapter import Tower
from .alike import likeness
from .equivariance import check_order, refuse_order
from .plan import Plan
from .swapping import own_class
from .twins import asked, call_of, difference_of, has_no_kernels, is_elsewhere, own_output, said

COUNTED = 1e-2
"""How far attention that counts sizes may be from the host's, of what it adds: kernels and TF32 round otherwise."""


def check_blocks(plan: Plan, tower: Tower) -> dict[int, tuple[str, ...]]:
    """Check every block that selects, merges, counts sizes, is read or runs on a shorter sequence.

    Blocks that are alike but for their weights are asked once.

    Returns:
        Of each that selects, merges or counts sizes, the parts that its own attention calls and attention that counts
        sizes does not, or the other way.

    Raises:
        TypeError: as `check_halves`; as `equivariance.check_order`.
        ValueError: as `check_halves`, with sizes.
    """
    seen: dict[Any, tuple[str, ...] | None] = {}
    found = {}
    kinds = [likeness(block) for block in tower.blocks]
    reads = plan.relevance.reads(tower, plan.layers) if plan.selects else ()
    # Order is not asked of packed towers: where an image begins and ends travels with their sequence.
    shorten = plan.selects and not tower.packed
    follows = range(0 if plan.merge else plan.layers[0], len(kinds)) if shorten else ()
    kinds_read, kinds_that_follow = ({kinds[index] for index in some} for some in (reads, follows))
    for index, kind in enumerate(kinds):
        acts = index in plan.layers or plan.counts(index)
        if acts or index in reads:
            if seen.get(kind) is None:
                seen[kind] = check_halves(tower, index, plan, kind in kinds_read, kind in kinds_that_follow)
                _check_weights(tower, index)
            if acts:
                found[index] = seen[kind] or ()
        elif index in follows and kind not in seen:
            seen[kind] = None
            check_order(tower, index)
    return found


def check_halves(
    tower: Tower, index: int, plan: Plan | None = None, read: bool = False, follows: bool = False
) -> tuple[str, ...]:
    """Raise a TypeError unless `attend` and `finish` of the adapter are the forward of block `index`.

    Where attention is to count sizes, raise a ValueError unless `attend_sized` with sizes of 1 is `attend`; return the
    names of the parts that one of the two calls and the other does not. Where a relevance is to `read` the weights of
    the attention, raise a TypeError unless attention of those weights, which is the same, is `attend`. Where the block
    `follows` a reduction, raise one if it depends on where a token stands, or on other rows.

    Both run on a few random tokens, in the dtype and on the device of the block, in evaluation mode, on a copy that
    shares its weights; norms, biases and scales are random there, so that nothing is hidden by ones and zeros. Neither
    the block nor any random state changes. Nothing is compared where nothing can be computed: weights in shards
    (FSDP2, tensor parallelism, ZeRO), offloaded ones, and types that this device has no kernels for. On the meta
    device the shapes are compared.
    """
    block = tower.blocks[index]
    if is_elsewhere(block):
        return ()
    with asked(tower, block) as (twin, tokens):
        own, tokens, error = own_output(tower, twin, tokens)
        if error is not None:
            if has_no_kernels(error, tokens):
                return ()
            raise _refusal(plan, tower, index, f"cannot be compared with them, as it raised {said(error)}")
        try:
            attended, called, found = _halves(tower, twin, tokens)
        except Exception as raised:
            raise _refusal(plan, tower, index, f"ran where they raised {said(raised)}") from raised
        difference = difference_of(own, found, tokens)
        if difference is not None:
            raise _refusal(plan, tower, index, difference)
        if follows:
            refuse_order(tower, index, twin, own, tokens)
        counts = plan is not None and bool(plan.follows_sizes and plan.sizes)
        if plan is None or not (counts or read):
            return ()
        try:
            counted, by_us = _counted(tower, twin, tokens)
        except Exception as raised:
            if not counts:  # an attention that no adapter computes (gates, masks): its weights stand unasked
                return ()
            raise ValueError(cannot_count(plan, tower, index, f"raised {said(raised)}")) from raised
        if difference_of(attended, counted, tokens, COUNTED) is not None:
            if not counts:
                raise TypeError(_cannot_read(plan, tower, index, "its attention computes something else with them"))
            raise ValueError(cannot_count(plan, tower, index, "computes it otherwise than the block does"))
    return tuple(sorted(called ^ by_us)) if counts else ()


def _check_weights(tower: Tower, index: int) -> None:
    try:
        tower.adapter.projections(tower.blocks[index])
    except AttributeError as error:
        raise TypeError(
            f"block {index} of {type(tower.module).__name__} computes as the adapter {tower.adapter.name!r} says, but "
            f"its weights are not where it looks for them: {error}"
        ) from error


def cannot_count(plan: Plan, tower: Tower, index: int, why: str) -> str:
    """Say that the attention of a block cannot count sizes, and what to do."""
    return (
        f"the attention of block {index} of {type(tower.module).__name__} cannot count how many patches a token stands "
        f"for: the {tower.adapter.name} adapter {why}"
        + (". Use sizes=False (merge alone), or merge=0" if plan.merge else ". Leave sizes out")
    )


def _refusal(plan: Plan | None, tower: Tower, index: int, what: str) -> TypeError:
    kind = own_class(type(tower.blocks[index]))
    what = f"the forward of {kind.__module__}.{kind.__qualname__} {what}"
    if plan is not None and index not in plan.layers and not plan.counts(index):
        return TypeError(_cannot_read(plan, tower, index, what))
    return TypeError(
        f"block {index} of {type(tower.module).__name__} cannot select: the adapter {tower.adapter.name!r} runs its "
        f"attention and its MLP one by one, and {what}. Leave "
        "this block out of layers (without merge and sizes, if it does not select), or say how it computes: "
        "apply(model, adapter=…) with a patchselect.Adapter of your own, whose attend and finish are its two halves "
        "(and sample_call what it is called with)"
    )


def _cannot_read(plan: Plan, tower: Tower, index: int, why: str) -> str:
    """Say that a relevance would read weights as something else than the block makes of them, and what to do."""
    return (
        f"relevance={plan.relevance.name!r} cannot read the attention of block {index} of "
        f"{type(tower.module).__name__}: the adapter {tower.adapter.name!r} runs attention and MLP of a block one by "
        f"one and says which weights are query, key, value and output, and {why}. Use a relevance that does not read "
        'this block ("keys" reads those that select, "joint" none), or say how it computes: apply(model, adapter=…) '
        "with a patchselect.Adapter of your own (attend, finish, projections)"
    )


def _halves(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Tensor, set[str], Any]:
    """Return the tokens after the first half, the names of the parts that it called, and the output of the second."""
    args, kwargs = call_of(tower, twin, tokens)
    torch.manual_seed(0)
    with _heard(twin) as called:
        attended = tower.adapter.attend(tower, twin, *args, **kwargs)
    return attended.tokens, called, tower.adapter.finish(tower, twin, attended.tokens, attended.rest)


def _counted(tower: Tower, twin: Any, tokens: Tensor) -> tuple[Tensor, set[str]]:
    """Run attention that counts sizes of 1; return the tokens after it, and the names of the parts that it called."""
    args, kwargs = call_of(tower, twin, tokens)
    rows = tokens if tower.batch_first else tokens.transpose(0, 1)
    ones = torch.ones(rows.shape[:2], device=tokens.device)
    with _heard(twin) as called:
        found = tower.adapter.attend_sized(tower, twin, ones, *args, **kwargs).tokens
    return found, called


@contextmanager
def _heard(twin: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the parts that are called."""
    called: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs, path=path: called.add(path))  # type: ignore[misc]
        for path, part in twin.named_modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()
