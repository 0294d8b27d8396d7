"""What a block does that does not select: merge before the first selection; count sizes, follow places after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Attended
from ..weights import mean_key
from .blocks import Original, own_arguments
from .guidance import current
from .journey import journey_of
from .places import at_places
from .recomputation import in_backward
from .sizes import Counted, attend, counted_for
from .state import Layer


def run_counting(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a block that merges or counts sizes: attention, merging where it comes before the first selection, MLP."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    tower, adapter = layer.tower, layer.tower.adapter
    if not layer.wiring.patched:  # a copy of a block, which outlived the selection
        return original(*args, **kwargs)
    args, kwargs, guidance = own_arguments(layer, block, args, kwargs)
    hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
    if guidance is None and layer.plan.guidance == "text" and not in_backward():
        guidance = current(layer.wiring)
    if guidance is not None and guidance.prefix is not None and guidance.prefix.skips(layer):
        return adapter.as_output(tower, hidden)
    args, kwargs = at_places(layer, block, args, kwargs)
    counted = counted_for(layer, hidden)
    attended = attend(layer, block, counted, args, kwargs)
    tokens = attended.tokens
    if layer.index < layer.plan.layers[0]:
        tokens = merge(layer, block, attended, counted)
    return adapter.finish(tower, block, tokens, attended.rest)


def run_placed(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a block of a rotary tower that neither selects nor counts, on the positions of the patches that are left."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    if not layer.wiring.patched:
        return original(*args, **kwargs)
    args, kwargs, guidance = own_arguments(layer, block, args, kwargs)
    if guidance is None and layer.plan.guidance == "text" and not in_backward():
        guidance = current(layer.wiring)
    if guidance is not None and guidance.prefix is not None and guidance.prefix.skips(layer):
        hidden = args[0] if args else next(iter(kwargs.values()))
        return layer.tower.adapter.as_output(layer.tower, hidden)
    args, kwargs = at_places(layer, block, args, kwargs)
    return layer.tower.adapter.run(layer.tower, block, original, *args, **kwargs)


def merge(layer: Layer, block: nn.Module, attended: Attended, counted: Counted) -> Tensor:
    """Merge as many patches as the schedule says; return the tokens in the host's own layout."""
    tower, merging = layer.tower, layer.plan.merging
    tokens, normed = attended.tokens, attended.normed
    if not tower.batch_first:
        tokens, normed = tokens.transpose(0, 1), normed.transpose(0, 1)
    prefix = tower.num_prefix_tokens if attended.num_prefix_tokens is None else attended.num_prefix_tokens
    patches = tokens.shape[1] - prefix
    whole = patches if counted.num_patches is None else counted.num_patches
    count = merging.schedule(whole)[layer.index]
    journey = None if in_backward() else journey_of(layer)
    sources = None if journey is None else journey.arrive(layer, tokens.shape[0], patches, tokens.device)
    if count == 0:
        return attended.tokens
    with torch.autocast("cpu" if tokens.is_meta else tokens.device.type, enabled=False):
        keys = mean_key(tower.adapter.projections(block), normed) if attended.keys is None else attended.keys
        reduced, sizes = merging.reduce(tokens, counted.or_ones(tokens), keys, count, prefix)
    if journey is not None and sources is not None:
        journey.go_on(layer.index, sources, reduced, prefix)
        journey.sizes = sizes
    return reduced.tokens if tower.batch_first else reduced.tokens.transpose(0, 1)
