"""What a selecting block does: the five steps of the method (TRIPS §3.2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..adapter import Attended
from ..compat import baked_in, refuse_old_trace
from ..functional import num_kept
from ..reduction import Alike, Places, Reduced
from ..relevance import Candidates
from ..relevance.base import guiding_place
from ..tower import Turn
from .guidance import Guidance, current
from .journey import Journey, asks, for_rows, journey_of
from .packing import select_packed
from .padding import parts_for, select_parts
from .places import at_places
from .recomputation import (
    GRIDS,
    RECORDED,
    carried_over,
    in_backward,
    note_text,
    recalled_text,
    without_grad_in_training,
)
from .recorder import Selected, active_recorder, pool, without_graph
from .sizes import Counted, attend, counted_for
from .state import Layer
from .text_calls import where_text_may_come_from
from .texts import texts_for
from .wording import refuse_symbols

Original = Callable[..., Any]
NOTHING_COUNTED = Counted()


def run_block(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a selecting block: attention, relevance, keep, fuse, MLP."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    tower, adapter = layer.tower, layer.tower.adapter
    if not layer.wiring.patched:  # a copy of a block, which outlived the selection
        return original(*args, **kwargs)
    refuse_old_trace()
    args, kwargs, carried = own_arguments(layer, block, args, kwargs)
    hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
    refuse_symbols(tower, hidden)
    guidance = _guidance(layer, hidden, carried)
    held = None if guidance is None else guidance.prefix
    if held is not None and held.skips(layer):
        return adapter.as_output(tower, hidden)
    attended = None if held is None else held.recall(layer, hidden)
    args, kwargs = at_places(layer, block, args, kwargs)
    counted = counted_for(layer, hidden)
    if attended is None:
        attended = attend(layer, block, counted, args, kwargs)  # 1: self-attention as always
        if held is not None and held.take(layer, attended):
            return adapter.as_output(tower, hidden)
    turn = adapter.turn(tower, block, *args, **kwargs) if tower.rotary and not tower.packed else None
    seen = _seen(layer, block, attended, guidance, counted, turn)
    parts = parts_for(layer, hidden)
    if tower.packed and parts is not None:
        choice = functools.partial(_select_images, layer, hidden, guidance)
        tokens = select_packed(layer, block, seen, guidance, parts, choice, args, kwargs)
    elif parts is None:
        tokens = select(layer, seen, hidden, guidance, counted)  # 2, 3 and 4
    else:
        choose = functools.partial(_select_part, layer, hidden, guidance)
        tokens = select_parts(layer, seen, guidance, parts, choose)
    tokens = tokens if tower.batch_first else tokens.transpose(0, 1)
    return adapter.finish(tower, block, tokens, attended.rest)  # 5: the MLP


def _select_part(
    layer: Layer, hidden: Tensor, guidance: Guidance | None, seen: Candidates, text: Tensor | None
) -> Tensor:
    return select(layer, seen, hidden, guidance, text=text)


def _select_images(
    layer: Layer, hidden: Tensor, guidance: Guidance | None, seen: Candidates, text: Tensor | None, begin: int
) -> Tensor:
    return select(layer, seen, hidden[begin:], guidance, text=text)  # what is noted for each size needs its own memory


def select(
    layer: Layer, seen: Candidates, hidden: Tensor, guidance: Guidance | None, counted: Counted = NOTHING_COUNTED,
    text: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Shorten tokens `(B, N, D)` after attention to `(B, N', D)`, or to `(B * T, N', D)` for `pairing="all"`."""
    tokens, prefix = seen.all_tokens, seen.num_prefix_tokens
    patches = tokens.shape[1] - prefix
    if patches < 1:
        raise ValueError(f"block {layer.index} got {tokens.shape[1]} tokens, which leaves no patch to select from")
    whole = counted.num_patches if layer.first and counted.num_patches is not None else patches
    keep = min(num_kept(whole, layer.ratio), patches)  # of the patches of the image, whatever merging has left
    if text is None and guidance is not None:
        text = texts_for(layer, guidance, tokens)
    spread = guidance is not None and guidance.pairing == "all" and layer.first
    copies = text.shape[1] if spread and text is not None else 1
    journey = None if in_backward() else journey_of(layer)
    again = in_backward() and RECORDED.recall(hidden, layer) is not None
    sources = None if journey is None else journey.arrive(layer, tokens.shape[0], patches, tokens.device)
    if keep == patches and not again and (journey is None or not asks(layer.wiring)):
        return tokens if copies == 1 else tokens.repeat_interleave(copies, dim=0)

    weights = _weigh(layer, seen, text, spread)  # 2: (B, n), or (B, T, n) for one selection per image and text
    if keep == patches:
        reduced = _untouched(tokens, patches, copies)
    else:
        where = _places(layer, hidden, journey, sources) if layer.plan.reduction.reads_places else None
        reduced = _reduce(layer, seen, weights, keep, where, counted)  # 3 and 4

    flat = weights.flatten(0, 1) if spread else weights
    if journey is not None and sources is not None:
        rows, recorder = reduced.tokens.shape[0], active_recorder(layer.wiring)
        sources, members = for_rows(sources, rows), None if recorder is None else journey.holders()
        journey.go_on(layer.index, sources, reduced, prefix)
        if layer.plan.follows_sizes and keep < patches:
            journey.sizes = layer.plan.reduction.sizes(for_rows(counted.or_ones(tokens), rows), reduced)
        if recorder is not None:
            RECORDED.note(hidden, layer, True)
            instead = layer.instead_of_reentry() if without_grad_in_training(hidden) else None
            recorder.trace.append(_entry(layer, seen, reduced, flat, sources, journey, members, instead))
    elif again:
        pool(flat, seen.patches)
    return reduced.tokens


def _weigh(layer: Layer, seen: Candidates, text: Tensor | None, spread: bool) -> Tensor:
    """Weigh the patches, `(B, n)` for one selection per image, `(B, T, n)` for one per image and text."""
    tokens = seen.all_tokens
    with torch.autocast("cpu" if tokens.is_meta else tokens.device.type, enabled=False):
        return layer.plan.relevance.weigh(seen, text, spread)


def _reduce(
    layer: Layer, seen: Candidates, weights: Tensor, keep: int, where: Places | None, counted: Counted
) -> Reduced:
    """Let the reduction shorten the sequence; one that reads keys is told how much alike tokens are."""
    reduction, tokens = layer.plan.reduction, seen.all_tokens
    if not reduction.reads_keys:
        return reduction.reduce(tokens, weights, keep, seen.num_prefix_tokens, where)
    with torch.autocast("cpu" if tokens.is_meta else tokens.device.type, enabled=False):
        alike = Alike(seen.mean_keys(), counted.or_ones(tokens))
        return reduction.reduce(tokens, weights, keep, seen.num_prefix_tokens, where, alike)


def _untouched(tokens: Tensor, patches: int, copies: int) -> Reduced:
    """Return the tokens as they are, `copies` times each, as a reduction that removes nothing."""
    after = tokens if copies == 1 else tokens.repeat_interleave(copies, dim=0)
    everything = torch.arange(after.shape[1], device=tokens.device).expand(after.shape[0], -1)
    return Reduced(after, everything[:, :patches], everything)


def _places(layer: Layer, hidden: Tensor, journey: Journey | None, sources: Tensor | None) -> Places:
    """Return where the patches stand in the image; if this is a recomputation, what the first run was told.

    Raises:
        ValueError: nobody knows the grid.
    """
    found = GRIDS.recall(hidden, layer) if in_backward() else None
    if found is None:
        if journey is None or journey.grid is None or sources is None:
            raise ValueError(
                f"fusion={layer.plan.reduction!r} reads the place of each patch in the image, which is not known here: "
                f"call the tower ({type(layer.tower.module).__name__}) as a whole, not its blocks"
            )
        found = Places(sources, journey.grid)
        GRIDS.note(hidden, layer, found)
    return found  # type: ignore[no-any-return]


def _seen(
    layer: Layer, block: nn.Module, attended: Attended, guidance: Guidance | None, counted: Counted, turn: Turn | None
) -> Candidates:
    tower, plan = layer.tower, layer.plan
    tokens, normed = attended.tokens, attended.normed
    if not tower.batch_first:
        tokens, normed = tokens.transpose(0, 1), normed.transpose(0, 1)
    prefix = tower.num_prefix_tokens if attended.num_prefix_tokens is None else attended.num_prefix_tokens
    stash = None if guidance is None else guidance.stash(tower)
    selecting = tuple(index for index in plan.layers if index >= layer.index)
    place = guiding_place(tower, plan.guidance, prefix)
    memory = None if guidance is None else guidance.memory(tower)
    sizes, keys = counted.sizes, attended.keys
    return Candidates(
        tower, layer.index, block, normed, tokens, prefix, place, selecting, stash, sizes, memory, keys, turn
    )


def _entry(
    layer: Layer, seen: Candidates, reduced: Reduced, relevance: Tensor, sources: Tensor, journey: Journey,
    members: Tensor | None, instead: str | None,
) -> Selected:  # fmt: skip
    """Describe one selection; `relevance` `(R, n)` and `sources` `(R, n)` are per row of what came out.

    Where checkpointing keeps no graph of what is recorded, `instead` says what would.
    """
    pooled = pool(relevance, seen.patches)
    return Selected(
        kept=sources.gather(1, reduced.kept),
        relevance=relevance,
        places=sources,
        removed_share=(1 - relevance.detach().gather(1, reduced.kept).sum(dim=1)).clamp(0, 1),
        num_tokens=reduced.tokens.shape[1],
        pooled=pooled if instead is None else without_graph(pooled, instead),
        layer=layer.index,
        num_prefix_tokens=seen.num_prefix_tokens,
        grid=journey.grid,
        fused=reduced.tokens.shape[1] > seen.num_prefix_tokens + reduced.kept.shape[1],
        holders=journey.holders(),
        members=None if members is None else for_rows(members, len(sources)),
    )


def own_arguments(
    layer: Layer, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Guidance | None]:
    """Take out of a block's arguments what `call_block` put in, and put in what the adapter carries."""
    if getattr(block, "_is_replica", False):
        raise ValueError("nn.DataParallel is not supported: use DistributedDataParallel, or call its .module")
    if not hasattr(block, "gradient_checkpointing"):  # else call_block has done it
        kwargs = {**_carried(layer, args, kwargs), **kwargs}
    carried: Guidance | None = kwargs.pop("_patchselect_guidance", None)
    if carried is not None:
        carried = dataclasses.replace(
            carried, text=args[-1], outer=None, memo=(), opened_by=None, stashes={}, memories={}
        )
        args = args[:-1]
    return args, kwargs, carried


def _guidance(layer: Layer, hidden: Tensor, carried: Guidance | None) -> Guidance | None:
    """Return the text of this call; if this is a recomputation, that of the first run.

    Raises:
        ValueError: the selection wants one, and there is none.
    """
    if layer.plan.guidance != "text" or layer.tower.single_stream:
        return None
    if carried is not None:
        return carried
    if in_backward():
        found = recalled_text(hidden, layer, layer.instead_of_reentry)
    else:
        found = current(layer.wiring)
        if found is not None:
            note_text(hidden, layer, found)
    if found is None:
        raise ValueError(
            f"no text guides this call of {type(layer.tower.module).__name__}: give it with `with "
            f"patchselect.guide(model, text_features):`, {where_text_may_come_from(layer.wiring)}or "
            'choose a guidance that needs no text: patchselect.apply(model, guidance="image")'
        )
    if baked_in(found.text):
        raise ValueError(
            "torch.jit.trace would keep this one text for ever, as a constant: trace a function of images and text "
            "features, whose body is `with patchselect.guide(model, text_features):`"
        )
    return found


def _carried(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    hidden = args[0] if args else next(iter(kwargs.values()))
    return carried_over(hidden, layer, lambda: layer.tower.adapter.carry(layer.tower))


def call_block(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Hand the text to a block that checkpoints itself as one of its arguments.

    Reentrant checkpointing passes gradients to tensor arguments alone, so a text that needs one goes in as such.
    """
    layer: Layer = block._patchselect  # type: ignore[assignment]
    if not layer.wiring.patched:
        return original(*args, **kwargs)
    kwargs.update(_carried(layer, args, kwargs))
    if getattr(block, "gradient_checkpointing", False) and block.training and layer.plan.guidance == "text":
        guidance = current(layer.wiring)
        if guidance is not None:
            return original(*args, guidance.text, _patchselect_guidance=guidance, **kwargs)
    return original(*args, **kwargs)
