"""What a patched model does differently: its selecting blocks, and the calls that bring a text along."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

import torch
from torch import Tensor, nn

from . import functional as op
from .adapter import TextRun, Tower
from .guidance import (
    Guidance,
    carried_over,
    current,
    in_backward,
    note_for_recomputation,
    note_recording,
    recalled,
    scope,
    was_recorded,
    without_grad_in_training,
)
from .recording import active_recorder, forget, note_grid, note_selection, pool
from .relevance import combine, relevance_of, separate

if TYPE_CHECKING:
    from .patching import Handle

Original = Callable[..., Any]


@dataclass(eq=False)
class Layer:
    """One selection layer of one tower."""

    handle: Handle
    tower: Tower
    index: int
    """0-based index of the block."""
    first: bool
    ratio: tuple[int, int]

    @property
    def guidance(self) -> str:
        return self.handle.guidance

    @property
    def relevance(self) -> str:
        return self.handle.relevance

    def guided_by(self, hidden: Tensor) -> Guidance:
        """The text of this call; if this is a recomputation, that of the first run."""
        if in_backward():
            found = recalled(hidden, self, self.instead_of_reentry)
        else:
            found = current(self.handle)
            if found is not None:
                note_for_recomputation(hidden, self, found)
        if found is None:
            together = "call the whole model with image and text together, " if self._reads_text() else ""
            raise ValueError(
                f"no text guides this call of {type(self.tower.module).__name__}: give it with `with "
                f"patchselect.guide(model, text_features):`, {together}or "
                'choose a guidance that needs no text: patchselect.apply(model, guidance="image")'
            )
        return found

    def instead_of_reentry(self) -> str:
        """Return what to do in place of reentrant checkpointing, on this host."""
        return self.tower.adapter.instead_of_reentry(self.handle.model, self.tower)

    def _reads_text(self) -> bool:
        """Whether some method of the patched model takes image and text together."""
        changed = (getattr(type(module), "_patchselect_overrides", ()) for module in self.handle.patched)
        return any(wrapper is call_with_text for overrides in changed for _, wrapper in overrides)

    def select(
        self,
        block: nn.Module,
        hidden: Tensor,
        normed: Tensor,
        tokens: Tensor,
        prefix: int,
        guidance: Guidance | None,
    ) -> Tensor:
        """Tokens `(B, N, D)` after attention to the shorter `(B, N', D)`, or `(B * T, N', D)` for `pairing="all"`."""
        patches = tokens.shape[1] - prefix
        if patches < 1:
            raise ValueError(f"block {self.index} got {tokens.shape[1]} tokens, which leaves no patch to select from")
        keep = op.num_kept(patches, self.ratio)
        text = None if guidance is None else self.texts(guidance, tokens)
        spread = guidance is not None and guidance.pairing == "all" and self.first
        copies = text.shape[1] if spread and text is not None else 1
        recorder = None if in_backward() else active_recorder(self.handle)
        again = in_backward() and was_recorded(hidden, self)
        if keep == patches and recorder is None and not again:
            return tokens if copies == 1 else tokens.repeat_interleave(copies, dim=0)
        stash = None if guidance is None or self.handle.relevance != "values" else guidance.stash(self.tower)
        scores = relevance_of(self, block, normed, tokens, prefix, text, stash)
        relevance = separate(self, scores) if spread else combine(self, scores)
        if keep == patches:
            after = tokens if copies == 1 else tokens.repeat_interleave(copies, dim=0)
            chosen = torch.arange(patches, device=tokens.device).expand(after.shape[0], -1)
        else:
            after, chosen = op.keep_and_fuse(tokens, relevance, keep, prefix, self.handle.fusion)
        flat = relevance.flatten(0, 1) if spread else relevance
        if recorder is not None:
            note_recording(hidden, self)
            note_selection(
                recorder, self.tower, self.index, self.first, chosen, flat, after, tokens[:, prefix:], prefix,
                instead=self.instead_of_reentry() if without_grad_in_training(hidden) else None,
            )  # fmt: skip
        elif again:
            pool(flat, tokens[:, prefix:])
        return after

    def texts(self, guidance: Guidance, tokens: Tensor) -> Tensor:
        """Texts of the rows: `(B', 1, D_text)` in tiles, `(B, T, D_text)`, or `(1, T, D_text)` where all share them."""
        # A view of a text that needs a gradient would still claim to need one where none is taken (momentum towers).
        text = guidance.text if torch.is_grad_enabled() else guidance.text.detach()
        rows = tokens.shape[0]
        if text.device != tokens.device:
            raise ValueError(f"text_features are on {text.device}, the images on {tokens.device}: move one of them")
        if text.dim() == 3:
            own = self.first or guidance.pairing == "shared"
            if own and rows != text.shape[0]:
                raise ValueError(
                    f"text_features are (images, texts, width) = {tuple(text.shape)}, but {rows} images came: give "
                    "each image its texts, or all images the same ones as (texts, width)"
                )
            if own:
                return text
            text = text.flatten(0, 1)
        if guidance.pairing == "shared" or (guidance.pairing == "all" and self.first):
            return text.unsqueeze(0)
        if rows % text.shape[0] or (guidance.exact and rows != guidance.exact * text.shape[0]):
            raise ValueError(
                f"{text.shape[0]} texts for {rows} images: text i guides image i, so there must be as many (or, in "
                "guide(), a whole multiple of images). For one selection that serves all texts, or every image with "
                'every text, call the image side under guide(model, text_features, pairing="shared") or "all"'
            )
        return text.unsqueeze(1)


def run_block(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """A selecting block: its attention, the selection, and its MLP on what is left (TRIPS §3.2)."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    if not hasattr(block, "gradient_checkpointing"):  # else call_block has done it
        first = args[0] if args else next(iter(kwargs.values()))
        kwargs = {**carried_over(first, layer, lambda: layer.tower.adapter.carry(layer.tower)), **kwargs}
    if getattr(block, "_is_replica", False):
        raise ValueError("nn.DataParallel is not supported: use DistributedDataParallel, or call its .module")
    carried: Guidance | None = kwargs.pop("_patchselect_guidance", None)
    if carried is not None:
        carried = Guidance(carried.owner, args[-1], carried.pairing, exact=carried.exact, prefix=carried.prefix)
        args = args[:-1]
    hidden = args[0] if args else next(iter(kwargs.values()))
    guidance = None
    tower = layer.tower
    if layer.guidance == "text" and not tower.single_stream:
        guidance = carried or layer.guided_by(hidden)
    held = None if guidance is None else guidance.prefix
    if held is not None and held.skips(layer):
        return tower.adapter.as_output(tower, hidden)
    attended = held.recall(layer, hidden) if held is not None else None
    if attended is None:
        attended = tower.adapter.attend(tower, block, *args, **kwargs)
        if held is not None and held.take(layer, attended):
            return tower.adapter.as_output(tower, hidden)
    tokens, normed = attended.tokens, attended.normed
    if not tower.batch_first:
        tokens, normed = tokens.transpose(0, 1), normed.transpose(0, 1)
    prefix = tower.num_prefix_tokens if attended.num_prefix_tokens is None else attended.num_prefix_tokens
    tokens = layer.select(block, hidden, normed, tokens, prefix, guidance)
    return tower.adapter.finish(tower, block, tokens if tower.batch_first else tokens.transpose(0, 1), attended.rest)


def call_block(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Hand the text to a block that checkpoints itself as one of its arguments.

    Reentrant checkpointing passes gradients to tensor arguments alone, so a text that needs one goes in as such.
    """
    layer: Layer = block._patchselect  # type: ignore[assignment]
    hidden = args[0] if args else next(iter(kwargs.values()))
    kwargs.update(carried_over(hidden, layer, lambda: layer.tower.adapter.carry(layer.tower)))
    if getattr(block, "gradient_checkpointing", False) and block.training and layer.guidance == "text":
        guidance = current(layer.handle)
        if guidance is not None:
            return original(*args, guidance.text, _patchselect_guidance=guidance, **kwargs)
    return original(*args, **kwargs)


def call_tower(module: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """While recording, remember the grid of what the tower is called with, for the time of the call."""
    handle: Handle = module._patchselect  # type: ignore[assignment]
    recorder = active_recorder(handle)
    if recorder is None:
        return original(*args, **kwargs)
    towers = [tower for tower in handle.towers if tower.module is module]
    try:
        for tower in towers:
            note_grid(recorder, tower, tower.adapter.grid(tower, *args, **kwargs))
        return original(*args, **kwargs)
    finally:
        for tower in towers:
            forget(recorder, tower)


def call_with_text(model: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """A method of the whole model that gets image and text together: the text guides the image.

    The text is encoded first; when the host comes to its own text encoder with the same arguments, `recall_text`
    answers from memory. A text given by `guide` wins over the one of the call.
    """
    handle: Handle = model._patchselect  # type: ignore[assignment]
    if handle.guidance != "text" or current(handle) is not None:
        return original(*args, **kwargs)
    call = handle.towers[0].adapter.text_of_call(model, handle.towers[0], name, args, kwargs)
    if call is None:
        return original(*args, **kwargs)
    handle.check_text(call.features)
    with scope(handle, call.features, "paired", exact=call.images_per_text, memo=call.remembered):
        return original(*args, **kwargs)


def remembered(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TextRun | None:
    """The run of this text encoder that `call_with_text` has made already, if this call would repeat it."""
    guidance = current(module._patchselect)  # type: ignore[arg-type]
    for run in () if guidance is None else guidance.memo:
        if run.module is module and run.method == name and run.matches(args, kwargs):
            return run
    return None


def recall_text(module: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """A text encoder that `call_with_text` has run already answers the same call from memory."""
    run = remembered(module, name, args, kwargs)
    if run is None:
        return original(*args, **kwargs)
    # Hosts write into the outputs that they get: each gets its own container.
    return type(run.result)(**run.result) if isinstance(run.result, dict) else run.result


def refuse_grid(module: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """`forward_intermediates` reshapes tokens to a dense grid, which a shortened sequence would corrupt silently."""
    handle: Handle = module._patchselect  # type: ignore[assignment]
    given = inspect.signature(original).bind(*args, **kwargs)
    wanted = given.arguments.get("output_fmt", "NCHW")
    if wanted != "NLC" and min(handle.keep_rates) < 1:
        raise ValueError(
            f"{type(module).__name__}.{name}(output_fmt={wanted!r}) reshapes the tokens to a dense grid, but selection "
            'removed some: use output_fmt="NLC", or handle.record() and patchselect.restore(tokens, trace)'
        )
    return call_tower(module, name, original, *args, **kwargs)
