"""The layers of a tower that a host reads: selections come before the last of them, and all are of one length."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..wiring.journey import Journey, call_tower, followed, for_rows
from ..wiring.state import Wiring

_evened: ContextVar[bool] = ContextVar("patchselect_evened", default=False)


def last_read(depth: int, asked: int | Sequence[int]) -> int:
    """Return the last block (0-based) of `depth` whose output is read, from indices into `hidden_states`."""
    indices = [asked] if isinstance(asked, int) else list(asked)
    return max(index + depth + 1 if index < 0 else index for index in indices) - 1


def check_read(layers: Sequence[int], depth: int, asked: int | Sequence[int]) -> None:
    """Raise a ValueError if a selection layer comes after the last block whose output is read."""
    last = last_read(depth, asked)
    unread = [layer for layer in layers if layer > last]
    if unread:
        raise ValueError(
            f"layers={list(layers)} select in block {unread[0]}, and the language model reads the vision tower after "
            f"block {last} (vision_feature_layer={asked!r}), so it would get tokens that nobody has selected: use "
            f"layers up to {last}"
        )


@contextmanager
def evening(wanted: bool) -> Iterator[None]:
    """Let all hidden states that the tower returns be of the length of the last, until the end of the `with` block."""
    token = _evened.set(wanted)
    try:
        yield
    finally:
        _evened.reset(token)


def call_tower_evenly(module: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a tower, or the module around it that collects its hidden states, some of which will be put side by side."""
    wiring: Wiring = module._patchselect  # type: ignore[assignment]

    def run() -> Any:
        if all(tower.module is not module for tower in wiring.towers):
            return original(*args, **kwargs)
        return call_tower(module, name, original, *args, **kwargs)

    if not _evened.get() or not wiring.plan.selects:
        return run()
    with followed(wiring) as journeys:
        output = run()
    prefix = journeys[-1].tower.num_prefix_tokens
    output.hidden_states = tuple(
        state if state is None else even(state, index - 1, journeys[-1], prefix)  # some releases keep those asked for
        for index, state in enumerate(output.hidden_states)
    )
    return output


def even(state: Tensor, block: int, journey: Journey, prefix: int) -> Tensor:
    """Return what block `block` gave, `(B, P + n, D)`, as the tokens `(B, P + m, D)` that the last block gives.

    A token of then is the mean, over the patches of the image that it stands for, of the tokens that they were in: a
    patch that stays is its own token, a fused one the mean of those that it was made of.
    """
    last, done = journey.within, [index for index in journey.stages if index <= block]
    if last is None or journey.sources is None or len(done) == len(journey.stages):
        return state
    rows, places = last.shape
    state = for_rows(state, rows)
    patches = state[:, prefix:]
    then = journey.stages[max(done)] if done else torch.arange(places, device=state.device).expand(rows, -1)
    then = for_rows(then, rows)
    wide = torch.promote_types(state.dtype, torch.float32)
    known = ((then >= 0) & (last >= 0)).to(wide)
    to = last.clamp(min=0)
    each = patches.gather(1, then.clamp(min=0).unsqueeze(-1).expand(-1, -1, state.shape[-1])).to(wide)
    count = torch.zeros(rows, journey.sources.shape[1], dtype=wide, device=state.device).scatter_add(1, to, known)
    total = torch.zeros(*count.shape, state.shape[-1], dtype=wide, device=state.device)
    total = total.scatter_add(1, to.unsqueeze(-1).expand_as(each), each * known.unsqueeze(-1))
    mean = total / count.clamp(min=1).unsqueeze(-1)
    return torch.cat([state[:, :prefix], mean.to(state.dtype)], dim=1)
