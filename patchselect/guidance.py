"""Which text guides which call: scoped, nested, one per thread or task, and found again by recomputation."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Tuple

import torch
from torch import Tensor, nn

from .checks import PAIRINGS, check_choice
from .compat import address_of, in_functorch, in_graph_task, is_compiling, is_dynamo_compiling, memory_of

if TYPE_CHECKING:
    from .patching import Handle
    from .prefix import Held, Prefix


class Guidance:
    """The text of one call or `with` block, for the towers of one handle."""

    __slots__ = ("exact", "memo", "opened_by", "outer", "owner", "pairing", "prefix", "stashes", "text")

    def __init__(
        self,
        owner: Handle,
        text: Tensor,
        pairing: str,
        outer: Guidance | None = None,
        exact: int = 0,
        memo: tuple[Any, ...] = (),
        prefix: Held | None = None,
    ) -> None:
        self.owner, self.text, self.pairing, self.outer = owner, text, pairing, outer
        self.exact, self.memo, self.prefix = exact, memo, prefix
        self.opened_by: scope | None = None
        self.stashes: dict[int, list[Any]] = {}

    def stash(self, tower: object) -> list[Any] | None:
        """Where an inference pass of `tower` leaves what its later layers need again; `None` while training.

        With gradients, checkpointing may run a layer without the one before it, and must find the same graph.
        """
        if torch.is_grad_enabled() or is_compiling():
            return None
        return self.stashes.setdefault(id(tower), [])


_current: ContextVar[Guidance | None] = ContextVar("patchselect_guidance", default=None)


def current(owner: Handle) -> Guidance | None:
    """The innermost guidance of this thread (or task) for the towers of `owner`."""
    if is_dynamo_compiling() and owner.traced is not None:
        return owner.traced
    found = _current.get()
    while found is not None and found.owner is not owner:
        found = found.outer
    return found


def unlinked(chain: Any, mine: Callable[[Any], bool]) -> Any:
    """A chain of `.outer`s without its innermost link that is `mine`, wherever it stands; as it is if there is none.

    `with` blocks of generators need not end in the order in which they began. Other tasks may hold the links further
    in, so those are copied and not changed.
    """
    if chain is None or mine(chain):
        return chain and chain.outer
    rest = unlinked(chain.outer, mine)
    if rest is chain.outer:
        return chain
    link = copy.copy(chain)
    link.outer = rest
    return link


class scope:
    """Make a text current until the end of the `with` block, whatever ends it.

    A context variable cannot be set inside of a graph that dynamo traces; there the guidance is an attribute for the
    time of the trace, which exists in the tracer alone and never on the real handle. Nothing is kept on this object,
    so several threads may enter one.
    """

    def __init__(
        self, owner: Handle, text: Tensor, pairing: str, exact: int = 0, memo: tuple[Any, ...] = (),
        prefix: Held | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.text, self.pairing, self.exact, self.memo = owner, text, pairing, exact, memo
        self.prefix = prefix

    def __enter__(self) -> None:
        if is_dynamo_compiling():
            outer = self.owner.traced
            self.owner.traced = Guidance(self.owner, self.text, self.pairing, outer, self.exact, self.memo, self.prefix)
        else:
            if not self.owner.patched:
                raise ValueError(
                    "the selection that this text was to guide was removed from the model, or replaced, since guide() "
                    "was called: call patchselect.guide(model, text_features) again after patchselect.apply"
                )
            outer = _current.get()
            opened = Guidance(self.owner, self.text, self.pairing, outer, self.exact, self.memo, self.prefix)
            opened.opened_by = self
            _current.set(opened)

    def __exit__(self, *exception: object) -> None:
        if is_dynamo_compiling():
            inner = self.owner.traced
            self.owner.traced = None if inner is None else inner.outer
        else:
            _current.set(unlinked(_current.get(), lambda guidance: guidance.opened_by is self))


class guide(scope):
    """Give the text that guides the vision towers of `model` until the end of the `with` block.

        with patchselect.guide(model, text_features):
            image_features = model.get_image_features(pixel_values)

    Blocks nest: the innermost wins, and it wins over the text that comes with a call. Threads and asyncio tasks do
    not see each other's text.

    Args:
        model: a model that `patchselect.apply` patched, or one of its towers.
        text_features: what the model's own text side gives (CLIP: text embeddings in the joint space), or vectors of
            the vision width for a bare tower. `(B, D)` for `"paired"`, `(T, D)` for `"shared"` and `"all"`; floating
            point, on the device of the images, normalised or not.
        pairing: `"paired"`: text i guides image i; a batch that is a whole multiple of the texts is paired in tiles
            (`torch.cat([image0, image1])`). `"shared"`: all texts guide every image in one pass, a patch counts by
            the text that needs it most. `"all"`: every image with every text, the encoder returns `B * T` rows,
            image-major. With texts `(B, T, D)` both give every image its own T texts (the candidates of a ranking).
        prefix: what `patchselect.encode_prefix` kept of some images: the blocks before the first selection are
            skipped, and what the encoder is called with counts by its shape alone (`prefix.images` is a stand-in).

    Raises:
        ValueError: the model is not patched or not guided by text, a wrong shape, width or pairing; the model, its
            selection layers or its weights are not those that the prefix was made with.
        TypeError: `text_features` is not a floating-point tensor.

    Entering it raises a `ValueError` if the selection has been removed or replaced in the meantime.
    """

    def __init__(
        self, model: nn.Module, text_features: Tensor, pairing: str = "paired", prefix: Prefix | None = None
    ) -> None:
        from .patching import handle_of

        owner = handle_of(model)
        check_choice("pairing", pairing, PAIRINGS)
        owner.check_text(text_features, per_image=pairing != "paired")
        if prefix is not None:
            prefix.check(owner)
        super().__init__(owner, text_features, pairing, prefix=prefix)


# Gradient checkpointing runs a block a second time, in the backward pass, when its text is long out of scope (and, on
# an accelerator, in another thread). What both runs share is the memory of the block's input: the checkpoint keeps
# it alive for exactly as long as it may be recomputed. So the text is noted under that memory, and dies with it.

_Key = Tuple[int, int, int]
_noted: dict[_Key, tuple[Guidance, bool]] = {}
_recorded: dict[_Key, bool] = {}
_carried: dict[_Key, dict[str, Any]] = {}


def _key(hidden: Tensor, reader: object) -> _Key:
    return address_of(hidden), int(hidden.storage_offset()), id(reader)


def _keep(table: dict[_Key, Any], hidden: Tensor, reader: object, value: Any) -> None:
    """Note `value` for as long as the memory of `hidden` lives."""
    key = _key(hidden, reader)
    if key not in table:
        weakref.finalize(memory_of(hidden), table.pop, key, None)
    table[key] = value


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass: a block that runs there is being recomputed."""
    return not is_compiling() and in_graph_task()


def _may_be_recomputed(hidden: Tensor, *others: Tensor) -> bool:
    if is_compiling() or torch.is_inference_mode_enabled():
        return False
    if in_functorch():  # their tensors have no memory of their own
        return False
    # The weights of the block itself may be the first that train, so the input need not ask for a gradient.
    return torch.is_grad_enabled() or any(tensor.requires_grad for tensor in (hidden, *others))


def without_grad_in_training(hidden: Tensor) -> bool:
    """Whether a block runs without gradients on an input that has one: the first run of reentrant checkpointing."""
    return _may_be_recomputed(hidden) and not torch.is_grad_enabled()


def note_for_recomputation(hidden: Tensor, reader: object, guidance: Guidance) -> None:
    if not _may_be_recomputed(hidden, guidance.text):
        return
    kept = Guidance(guidance.owner, guidance.text, guidance.pairing, exact=guidance.exact, prefix=guidance.prefix)
    earlier = _noted.get(_key(hidden, reader))
    if earlier is not None and earlier[0].text is not guidance.text:
        kept.pairing = "ambiguous"
    _keep(_noted, hidden, reader, (kept, torch.is_grad_enabled()))


def note_recording(hidden: Tensor, reader: object) -> None:
    """What is recorded is part of the graph: a recomputation has to compute it again."""
    if _may_be_recomputed(hidden):
        _keep(_recorded, hidden, reader, True)


def was_recorded(hidden: Tensor, reader: object) -> bool:
    return _key(hidden, reader) in _recorded


def carried_over(hidden: Tensor, reader: object, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` says of this call of a block; in a recomputation, what it said of the first run."""
    if in_backward():
        again = _carried.get(_key(hidden, reader))
        if again is not None:
            return again
    found = find()
    if found and _may_be_recomputed(hidden):
        _keep(_carried, hidden, reader, found)
    return found


def recalled(hidden: Tensor, reader: object, instead: Callable[[], str]) -> Guidance | None:
    """The guidance that was current when this block first ran on this input.

    Raises:
        RuntimeError: the first run kept no graph of a text that needs a gradient; `instead` says what would.
    """
    found = _noted.get(_key(hidden, reader))
    if found is None:
        return None
    guidance, had_grad = found
    if guidance.pairing == "ambiguous":
        raise RuntimeError(
            "one block input was guided by two texts under gradient checkpointing, so its recomputation cannot tell "
            "them apart: clone the tokens before each guided run, or turn checkpointing off for them"
        )
    if not had_grad and guidance.text.requires_grad:
        raise RuntimeError(
            "reentrant gradient checkpointing cannot carry a gradient to the text that guides the selection: "
            f"{instead()}, or give guide() detached text features"
        )
    return guidance
