"""Which text guides which call: scoped, nested, one per thread or task."""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable, Protocol

import torch
from torch import Tensor

from ..adapter import Attended
from ..compat import in_functorch, is_compiling, is_dynamo_compiling, watched
from .state import Layer, Wiring


class Held(Protocol):
    """A prefix that is being taken or used, as the blocks of a tower meet it."""

    def skips(self, layer: Layer) -> bool:
        """Tell whether this block need not run."""

    def recall(self, layer: Layer, hidden: Tensor) -> Attended | None:
        """Return what this block's attention gave, if that is known already; in the host's own layout."""

    def take(self, layer: Layer, attended: Attended) -> bool:
        """Take what this block's attention gave; tell whether it was what was wanted, and the rest need not run."""


@dataclass(frozen=True, eq=False)
class Guidance:
    """The text of one call or `with` block, for the towers of one selection."""

    owner: Wiring
    text: Tensor
    pairing: str
    """`"paired"`, `"shared"` or `"all"`; `"prefix"` while a prefix is taken, `"ambiguous"` where a recomputation
    cannot tell two texts apart."""
    outer: Guidance | None = None
    exact: int = 0
    """How many images each text must have; 0 where `repeat` may have any whole multiple."""
    repeat: str | None = None
    """How the images of a text lie in a batch of several per text: `"each"` in a row, `"tile"` batch after batch."""
    memo: tuple[Any, ...] = ()
    """Runs of text encoders that need not be repeated."""
    prefix: Held | None = None
    opened_by: object = None
    stashes: dict[int, list[Any]] = field(default_factory=dict)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)

    def stash(self, tower: object) -> list[Any] | None:
        """Return where an inference pass of `tower` leaves what its later layers need again; `None` while training.

        With gradients, checkpointing may run a layer without the one before it, and must find the same graph.
        """
        if torch.is_grad_enabled() or is_compiling():
            return None
        return self.stashes.setdefault(id(tower), [])

    def memory(self, tower: object) -> dict[str, Any] | None:
        """Return what lasts from one call of `tower` to the next, until the `with` block ends.

        `None` where what is kept could go stale or be wanted as a step: with gradients, in a graph that is being made,
        and while something counts, fakes or transforms the operations.
        """
        if torch.is_grad_enabled() or is_compiling() or torch.jit.is_tracing() or watched() or in_functorch():
            return None
        return self.memories.setdefault(id(tower), {})


_current: ContextVar[Guidance | None] = ContextVar("patchselect_guidance", default=None)


def current(owner: Wiring) -> Guidance | None:
    """Return the innermost guidance of this thread (or task) for the towers of `owner`."""
    if is_dynamo_compiling() and owner.traced is not None:
        return owner.traced  # type: ignore[no-any-return]
    found = _current.get()
    while found is not None and found.owner is not owner:
        found = found.outer
    return found


def unlinked(chain: Any, mine: Callable[[Any], bool]) -> Any:
    """Return a chain of `.outer`s without its innermost link that is `mine`; as it is if there is none.

    `with` blocks of generators need not end in the order in which they began. Other tasks may hold the links further
    in, so those are copied and not changed.
    """
    if chain is None or mine(chain):
        return chain and chain.outer
    rest = unlinked(chain.outer, mine)
    return chain if rest is chain.outer else dataclasses.replace(chain, outer=rest)


class scope:
    """Make a text current until the end of the `with` block, whatever ends it.

    A context variable cannot be set inside of a graph that dynamo traces; there the guidance is an attribute for the
    time of the trace, which exists in the tracer alone and never on the real object. Nothing is kept on this object,
    so several threads may enter one.
    """

    def __init__(
        self, owner: Wiring, text: Tensor, pairing: str, exact: int = 0, memo: tuple[Any, ...] = (),
        prefix: Held | None = None, repeat: str | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.text, self.pairing, self.exact, self.memo = owner, text, pairing, exact, memo
        self.prefix, self.repeat = prefix, repeat

    def _guidance(self, outer: Guidance | None, opened_by: object = None) -> Guidance:
        return Guidance(
            self.owner, self.text, self.pairing, outer, self.exact, self.repeat, self.memo, self.prefix, opened_by
        )

    def __enter__(self) -> None:
        if is_dynamo_compiling():
            self.owner.traced = self._guidance(self.owner.traced)
        else:
            if not self.owner.patched:
                raise ValueError(
                    "the selection that this text was to guide was removed from the model, or replaced, since guide() "
                    "was called: call patchselect.guide(model, text_features) again after patchselect.apply"
                )
            _current.set(self._guidance(_current.get(), opened_by=self))

    def __exit__(self, *exception: object) -> None:
        if is_dynamo_compiling():
            inner = self.owner.traced
            self.owner.traced = None if inner is None else inner.outer
        else:
            _current.set(unlinked(_current.get(), lambda guidance: guidance.opened_by is self))


def check_text(wiring: Wiring, text: Any, per_image: bool = False) -> None:
    """Raise if a text cannot guide these towers.

    Args:
        wiring: the selection.
        text: what is to be `(texts, width)`.
        per_image: whether `(images, texts, width)` is fine too.

    Raises:
        ValueError: the selection reads no text, or another shape or width.
        TypeError: not a floating-point tensor.
    """
    guidance = wiring.plan.guidance
    if guidance != "text":
        raise ValueError(f'this model is guided by {guidance!r} and reads no text: apply(model, guidance="text") first')
    if not isinstance(text, Tensor) or not text.is_floating_point():
        found = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"text_features must be a floating-point tensor (features, not token ids), got {found}")
    width = wiring.towers[0].text_width()
    if text.dim() not in ((2, 3) if per_image else (2,)) or 0 in text.shape or text.shape[-1] != width:
        wanted = f"(texts, {width})" + (f" or (images, texts, {width})" if per_image else "")
        own = text.dim() == 3 and not per_image
        more = '; several texts for each image need guide(..., pairing="shared") or "all"' if own else ""
        raise ValueError(f"text_features must be {wanted} for this model, got {tuple(text.shape)}{more}")
