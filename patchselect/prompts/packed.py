"""Hosts that pack images into one sequence and join its tokens square by square: what they join is spread, then picked.

What such a host does with the tokens of squares (order them, split them by image) counts on all that an image had. So
each token is put in every place of the image that it stands for, and what the host made of that is picked up: a square
that stayed as it is, a fused one as the mean over its squares. Of layers that are read before a later selection this
gathers the tokens too (DeepStack).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Callable, NoReturn, Sequence

import torch
from torch import Tensor, nn

from ..compat import uncompiled
from ..wiring.journey import Journey, call_tower, followed, parts_of_call
from ..wiring.packing import begins_of, in_order
from ..wiring.state import Wiring
from .encoded import features_in_call, has_layers
from .squares import squares_of

_featuring: ContextVar[bool] = ContextVar("patchselect_featuring", default=False)
"""Whether what the tower returns will be split by image before it is picked up."""


def call_merger(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Join the tokens of squares; put the token `(m, D)` of each in all of its places `(M, D)` in the sequence."""
    wiring: Wiring = module._patchselect  # type: ignore[assignment]
    tower = wiring.towers[0]
    joined, parts = original(*args, **kwargs), parts_of_call(tower)
    if parts is None or not wiring.plan.selects or any(part.journey.within is None for part in parts):
        return joined
    size, held, begins = tower.parts["side"] ** 2, [], begins_of(parts)
    for part in parts:
        within: Tensor = part.journey.within  # type: ignore[assignment]
        first = begins[part.rows].unsqueeze(1).to(within.device)
        inside = within[:, ::size]
        held.append(torch.where(inside < 0, -1, (inside + first) // size))
    which = in_order(parts, held)
    return joined[which.clamp(min=0)].masked_fill((which < 0).unsqueeze(-1), 0)


_eager: list[Callable[..., Any]] = []
"""What `call_packed_tower` runs; made at `apply`, since it brings all of dynamo along."""


def uncompiled_tower() -> Callable[..., Any]:
    """Return `call_packed_tower`; from now on no graph holds it: how many patches an image has is data."""
    if not _eager:
        _eager.append(uncompiled(_call_packed_tower))
    return call_packed_tower


def call_packed_tower(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the tower as `_call_packed_tower` does, outside of compiled graphs."""
    run = _eager[0] if _eager else _call_packed_tower
    return run(module, name, original, *args, **kwargs)


def _call_packed_tower(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the tower; what it returns of squares is as long as the selection left it."""
    wiring: Wiring = module._patchselect  # type: ignore[assignment]
    with followed(wiring) as journeys:
        output = call_tower(module, name, original, *args, **kwargs)
    return left_of(output, journeys[-1], wiring) if wiring.plan.selects and not _featuring.get() else output


def call_packed_features(module: Any, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Encode images: the tokens `(m_i, D)` of each that are left."""
    encoded = features_in_call(module, args, kwargs)
    if encoded is not None:
        return encoded
    wiring: Wiring = module._patchselect
    if not wiring.plan.selects:
        return original(*args, **kwargs)
    token = _featuring.set(True)
    try:
        with followed(wiring) as journeys:
            output = original(*args, **kwargs)
    finally:
        _featuring.reset(token)
    return left_of(output, journeys[-1], wiring)


def refuse_videos(module: Any, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Raise a ValueError where patches are selected: videos are whole."""
    if not module._patchselect.plan.selects:
        return original(*args, **kwargs)
    raise_for_videos(module)


def raise_for_videos(core: nn.Module) -> NoReturn:
    raise ValueError(
        f"{type(core).__name__} got a video, from whose frames nothing is selected: give images, or call it without a "
        "selection (patchselect.remove(model))"
    )


def left_of(output: Any, journey: Journey, wiring: Wiring) -> Any:
    """Return what a host returns of squares, of one sequence or image by image, as long as the selection left it."""
    sizes = sizes_of(journey, wiring.towers[0].parts["side"])

    def left(joined: Any) -> Any:
        if isinstance(joined, Tensor):
            return torch.cat(picked(joined.split(sizes), journey, wiring))
        return picked(joined, journey, wiring)

    if has_layers(output):
        return left(output[0]), [left(layer) for layer in output[1]]
    if not hasattr(output, "pooler_output"):  # up to transformers 4.57
        return left(output)
    output.pooler_output = left(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [left(layer) for layer in output.deepstack_features]
    return output


def sizes_of(journey: Journey, side: int) -> list[int]:
    """Return how many squares each image of a call had."""
    assert journey.parts is not None
    counts = {row: part.journey.grid[0] * part.journey.grid[1] for part in journey.parts for row in part.rows}  # type: ignore[index]
    return [counts[row] // side**2 for row in sorted(counts)]


def picked(tokens: Sequence[Tensor], journey: Journey, wiring: Wiring) -> list[Tensor]:
    """Return what is left `(m_i, D)` of the tokens `(M_i, D)` of each image, which stand in all of their places."""
    found: dict[int, Tensor] = {}
    for part in journey.parts or ():
        together = torch.stack([tokens[row] for row in part.rows])
        found.update(zip(part.rows, gathered(together, part.journey, wiring.towers[0].parts["side"])))
    return [found[row] for row in sorted(found)]


def gathered(tokens: Tensor, journey: Journey, side: int) -> Tensor:
    """Return the tokens `(R, m, D)` of the squares that are left: the mean of those `(R, M, D)` of their places."""
    holders, left = journey.holders(), squares_of(journey, side)
    assert holders is not None and journey.grid is not None
    height, width = journey.grid
    held = holders.view(-1, height // side, side, width // side, side)[:, :, 0, :, 0].flatten(1)
    if left is None:
        return tokens
    rank = in_prompt(left).argsort(dim=1)  # the token of the tower to that of the prompt
    to = rank.gather(1, held.clamp(min=0) // side**2)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    known = (held >= 0).to(wide)
    count = torch.zeros(left.shape, dtype=wide, device=tokens.device).scatter_add(1, to, known)
    total = torch.zeros(*left.shape, tokens.shape[-1], dtype=wide, device=tokens.device)
    total = total.scatter_add(1, to.unsqueeze(-1).expand_as(tokens), tokens.to(wide) * known.unsqueeze(-1))
    return (total / count.clamp(min=1).unsqueeze(-1)).to(tokens.dtype)


def in_prompt(squares: Tensor) -> Tensor:
    """Return the order of a prompt: squares row by row of the image, fused ones at the end."""
    last = torch.iinfo(squares.dtype).max
    return squares.masked_fill(squares < 0, last).argsort(dim=1, stable=True)


def sources_in_prompt(journey: Journey, side: int) -> list[Tensor]:
    """Return which placeholder of its image each token of the prompt is `(m_i,)`, of each image of a call."""
    found: dict[int, Tensor] = {}
    for part in journey.parts or ():
        left = squares_of(part.journey, side)
        if left is None:
            squares = torch.arange(part.count // side**2)
            found.update(dict.fromkeys(part.rows, squares))
        else:
            found.update(zip(part.rows, left.gather(1, in_prompt(left))))
    return [found[row] for row in sorted(found)]
