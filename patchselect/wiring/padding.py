"""Padded batches: every image is selected from by its own number of patches, as if it had come alone.

Rows of one size are selected from together, without their padding; what is left of each goes in front of new padding,
and masks follow. A batch is as long as its largest image needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter import Tower, Turn
from ..relevance import Candidates
from ..relevance.kernels import in_tiles
from .guidance import Guidance
from .journey import Part, for_rows, journey_of, parts_of_call, within
from .recomputation import PARTS, in_backward
from .recorder import Selected, active_recorder
from .state import Layer
from .texts import texts_for

Choose = Callable[[Candidates, "Tensor | None"], Tensor]
"""Select from rows of one size: their candidates and texts to what is left, `(R, N', D)`."""


def knows_padding(tower: Tower) -> bool:
    """Tell whether this run of a block knows which tokens are padding."""
    return in_backward() or parts_of_call(tower) is not None


def parts_for(layer: Layer, hidden: Tensor) -> list[Part] | None:
    """Return the images of a padded or packed batch by their size; in a recomputation, those of the first run.

    Raises:
        ValueError: what the plan asks of a padded batch cannot be done; nobody knows the images of a packed one.
    """
    if not layer.tower.padded and not layer.tower.packed:
        return None
    if in_backward():
        return PARTS.recall(hidden, layer)  # type: ignore[no-any-return]
    journey = journey_of(layer)
    if journey is None or journey.parts is None:
        if layer.tower.packed:
            raise ValueError(
                f"block {layer.index} selects from each image of one packed sequence, and where they begin travels "
                f"with a call of the whole tower: call {type(layer.tower.module).__name__}, not its blocks"
            )
        return None
    if layer.tower.packed:
        return noted(layer, hidden, journey.parts)
    if layer.plan.merge or layer.plan.sizes:
        raise ValueError(
            f"{type(layer.tower.module).__name__} got a padded batch, in which patches are not merged and sizes not "
            "counted: use merge=0 without sizes, or batch images of one size"
        )
    if layer.plan.reduction.reads_places:
        raise ValueError(
            f"fusion={layer.plan.reduction!r} reads the place of each patch in one grid, and a padded batch has "
            "several: batch images of one size"
        )
    return noted(layer, hidden, journey.parts)


def noted(layer: Layer, hidden: Tensor, parts: list[Part]) -> list[Part]:
    """Return the parts, after a note of them for a recomputation."""
    PARTS.note(hidden, layer, [dataclasses.replace(part) for part in parts])
    return parts


def real_tokens(parts: list[Part], tower: Tower, tokens: Tensor) -> Tensor:
    """Return which of the tokens `(B, N, D)` of a padded batch are no padding, `(B, N)`."""
    counts = torch.zeros(sum(len(part.rows) for part in parts), dtype=torch.long)
    for part in parts:
        counts[part.rows] = part.count
    places = torch.arange(tokens.shape[1])
    return (places < counts[:, None] + tower.num_prefix_tokens).to(tokens.device)


def mask_over(real: Tensor, mask: Tensor) -> Tensor:
    """Return `real` `(B, N)`, which tokens are no padding, in the kind of the host's own `mask`.

    That is `(B, N)` like it, or `(B, 1, 1, N)` where it has four dimensions; floats are added to attention.
    """
    shown = real if mask.dim() == 2 else real[:, None, None]
    if not mask.is_floating_point():
        return shown.to(mask.dtype)
    return torch.zeros_like(shown, dtype=mask.dtype).masked_fill(~shown, torch.finfo(mask.dtype).min)


def places_in(parts: list[Part], tokens: Tensor) -> Tensor:
    """Return the place `(B, N)` of each of the first N patch tokens in the grid of its image; -1 is none, or padding.

    `tokens` is `(B, N, …)`.
    """
    found = torch.full(tokens.shape[:2], -1, dtype=torch.long, device=tokens.device)
    for part in parts:
        if part.journey.sources is not None:
            found[part.rows, : part.count] = for_rows(part.journey.sources, len(part.rows))
    return found


def turn_of(turn: Turn | None, part: Part, tokens: Tensor) -> Turn | None:
    """Return how the keys `(R, n, H, E)` of one part are turned, where `turn` turns those of all patches."""
    if turn is None:
        return None

    def turned(heads: Tensor) -> Tensor:
        whole = heads.new_zeros(*tokens.shape[:2], *heads.shape[2:])
        whole[part.rows, : heads.shape[1]] = heads
        return turn(whole)[part.rows, : heads.shape[1]]

    return turned


def select_parts(
    layer: Layer, seen: Candidates, guidance: Guidance | None, parts: list[Part], choose: Choose
) -> Tensor:
    """Shorten a padded batch `(B, N, D)`; return what is left `(B, N', D)`, or `(B * T, N', D)` for `pairing="all"`."""
    prefix, tokens = seen.num_prefix_tokens, seen.all_tokens
    texts = None if guidance is None else in_tiles(texts_for(layer, guidance, tokens), len(tokens))
    start = entries_of(layer)
    left: list[Tensor] = []
    for part in parts:
        rows = torch.tensor(part.rows, device=tokens.device)
        own = [whole[rows, : prefix + part.count] for whole in (seen.all_normed, tokens)]
        turn = turn_of(seen.turn, part, seen.patches)
        found = dataclasses.replace(seen, all_normed=own[0], all_tokens=own[1], stash=None, turn=turn)
        with within(part):
            left.append(choose(found, texts if texts is None or len(texts) == 1 else texts[rows]))
    order = follow_parts(layer, parts, left, prefix, start)
    longest = max(some.shape[1] for some in left)
    together = torch.cat([F.pad(some, (0, 0, 0, longest - some.shape[1])) for some in left])
    back = torch.tensor([row for rows in order for row in rows], device=tokens.device).argsort()
    return together[back]


def entries_of(layer: Layer) -> int:
    """Return how many entries a record has, where there is one."""
    recorder = active_recorder(layer.wiring)
    return 0 if recorder is None else len(recorder.trace)


def follow_parts(layer: Layer, parts: list[Part], left: list[Tensor], prefix: int, start: int) -> list[list[int]]:
    """Note what a selection left of each part `(R, N', D)`; return the rows of each that came out of its rows.

    What was recorded of the parts from entry `start` on becomes one entry.
    """
    recorder, outer = active_recorder(layer.wiring), None if in_backward() else journey_of(layer)
    copies = len(left[0]) // len(parts[0].rows)
    order = [[row * copies + copy for row in part.rows for copy in range(copies)] for part in parts]
    if outer is not None:
        outer.parts = [Part(rows, some.shape[1] - prefix, part.journey) for rows, some, part in zip(order, left, parts)]
    if recorder is not None and outer is not None and not (layer.tower.packed and len(parts) == 1):
        entries = recorder.trace[start:]
        recorder.trace[start:] = [as_one(entries, order)]
    return order


def as_one(entries: list[Selected], order: list[list[int]]) -> Selected:
    """Put what was recorded of each size together: padded, and image by image in `images`."""
    images: dict[int, Selected] = {}
    for entry, rows in zip(entries, order):
        for place, row in enumerate(rows):
            images[row] = _of_row(entry, place)
    found = [images[row] for row in sorted(images)]

    def padded(name: str, value: float) -> Tensor:
        tensors = [getattr(image, name)[0] for image in found]
        longest = max(map(len, tensors))
        return torch.stack([F.pad(tensor, (0, longest - len(tensor)), value=value) for tensor in tensors])

    return dataclasses.replace(
        entries[0],
        kept=padded("kept", -2),
        relevance=padded("relevance", 0),
        places=padded("places", -2),
        removed_share=torch.cat([image.removed_share for image in found]),
        num_tokens=max(image.num_tokens for image in found),
        pooled=torch.cat([image.pooled for image in found]),
        grid=None,
        fused=any(image.fused for image in found),
        holders=None,
        members=None,
        images=tuple(found),
    )


def _of_row(entry: Selected, row: int) -> Selected:
    tensors: dict[str, Any] = {
        name: value[row : row + 1] for name, value in vars(entry).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(entry, **tensors)
