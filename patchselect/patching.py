"""`apply` and `remove`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Tower, Wrapper
from .blocks import Layer, call_block, call_tower, call_with_text, recall_text, run_block
from .checks import GUIDANCES, RELEVANCES, check_choice, check_fusion, check_layers, check_rates
from .functional import Fusion, as_ratio
from .guidance import Guidance
from .hosts import find_towers, unwrapped
from .recording import Trace, recording
from .relevance import check_values
from .swapping import swap, unswap

_STATE = "_patchselect"


@dataclass(eq=False)
class Handle:
    """What `apply` returns: the selection in one model, and the way to take it out again."""

    model: nn.Module = field(repr=False)
    towers: list[Tower] = field(repr=False)
    guidance: str
    relevance: str
    fusion: Fusion
    keep_rates: tuple[float, ...]
    layers: tuple[int, ...]
    """0-based block indices of the selection layers."""
    patched: list[nn.Module] = field(default_factory=list, repr=False)
    traced: Guidance | None = field(default=None, repr=False)

    def remove(self) -> None:
        """Take the selection out: every module is again the object, of the class, that it was. Idempotent."""
        for module in self.patched:
            if _STATE in vars(module):
                unswap(module)
                delattr(module, _STATE)
        self.patched = []

    def record(self) -> AbstractContextManager[Trace]:
        """`with handle.record() as trace:` collects one `Selected` per selection layer and call, in order.

        Only calls of this thread (or task) are recorded, recomputation by gradient checkpointing is not, and nothing
        is stored outside of the `with` block.
        """
        if not self.patched:
            raise ValueError("the selection was removed from this model: call patchselect.apply again to record it")
        return recording(self)

    def check_text(self, text: Any, per_image: bool = False) -> None:
        """Raise what `guide` promises for a text that cannot guide these towers."""
        if self.guidance != "text":
            raise ValueError(
                f'this model is guided by {self.guidance!r} and reads no text: apply(model, guidance="text") first'
            )
        if not isinstance(text, Tensor) or not text.is_floating_point():
            found = text.dtype if isinstance(text, Tensor) else type(text).__name__
            raise TypeError(f"text_features must be a floating-point tensor (features, not token ids), got {found}")
        width = self.towers[0].adapter.text_width(self.towers[0])
        if text.dim() not in ((2, 3) if per_image else (2,)) or 0 in text.shape or text.shape[-1] != width:
            wanted = f"(texts, {width})" + (f" or (images, texts, {width})" if per_image else "")
            own = text.dim() == 3 and not per_image
            more = '; several texts for each image need guide(..., pairing="shared") or "all"' if own else ""
            raise ValueError(f"text_features must be {wanted} for this model, got {tuple(text.shape)}{more}")


def apply(
    model: nn.Module,
    keep_rate: float | Sequence[float] = 0.7,
    layers: Sequence[int] | None = None,
    guidance: str = "text",
    relevance: str | None = None,
    fusion: Fusion = "mean",
    adapter: str | Adapter | None = None,
) -> Handle:
    """Put text-relevant patch selection into the vision tower(s) of `model` (TRIPS, EMNLP 2022).

    Inside each selection layer, between attention and MLP, the most relevant patches and all prefix tokens stay and
    the others become one token. No parameter or buffer is added, `state_dict` does not change, and
    `handle.remove()` gives back the very model that came in. Applying twice replaces.

    Args:
        model: a whole model or a bare vision tower of a supported host.
        keep_rate: share of the patches that stay, in (0, 1]; one, or one per selection layer.
        layers: ascending 0-based block indices; `None` is the paper's 5th and 10th of 12 blocks, `[4, 9]`, scaled to
            the depth of the tower.
        guidance: `"text"` (TRIPS), `"image"` (EViT: the image [CLS] or, where there is none, the mean patch) or
            `"random"` (the baseline; draws from torch's global generator).
        relevance: how a text meets a patch: `"keys"`, `"features"`, `"values"` or `"joint"`; `None` is the default of
            the adapter for text (`"values"` for CLIP-like hosts) and `"keys"` for an image. Random guidance uses none.
        fusion: what the others become: `"mean"` (weighted), `"sum"` (the paper's) or `"none"` (they are dropped).
        adapter: name of the adapter to use; `None` asks each in turn.

    Returns:
        The handle; `handle.record()` shows what was kept, `handle.remove()` undoes everything.

    Raises:
        TypeError: the model is not supported, compiled, scripted or data-parallel, or a wrapper has replaced the
            `forward` of a block, of the tower or of the model; an argument of a wrong type.
        ValueError: an argument outside of its range; blocks inside of a wrapper (torch's `checkpoint_wrapper` is
            looked through). The model is unchanged after either.
    """
    host = unwrapped(model)
    towers = find_towers(host, adapter)
    kind = towers[0].adapter
    check_choice("guidance", guidance, GUIDANCES)
    if relevance is None:
        relevance = kind.default_relevance if guidance == "text" else "keys"
    check_choice("relevance", relevance, RELEVANCES)
    chosen = check_layers(layers, min(len(tower.blocks) for tower in towers))
    rates = check_rates(keep_rate, len(chosen))
    handle = Handle(host, towers, guidance, relevance, check_fusion(fusion), rates, chosen)
    for tower in towers:
        _check_reachable(handle, tower)
        _check_relevance(handle, tower)
    methods: dict[nn.Module, dict[str, Wrapper]] = {tower.module: {"forward": call_tower} for tower in towers}
    for module, wrappers in kind.methods(host, towers):
        methods.setdefault(module, {}).update(wrappers)
    _check_methods(handle, methods)
    for old in handles_in(host):
        old.remove()
    for tower in towers:
        for position, (index, rate) in enumerate(zip(chosen, rates)):
            block = tower.blocks[index]
            overrides: dict[str, Wrapper] = {"forward": run_block}
            if hasattr(block, "gradient_checkpointing"):
                overrides["__call__"] = call_block
            patch(handle, block, overrides, Layer(handle, tower, index, position == 0, as_ratio(rate)))
    for module, wrappers in methods.items():
        patch(handle, module, wrappers, handle)
    if _STATE not in vars(host):
        patch(handle, host, {}, handle)
    return handle


def remove(model: nn.Module) -> None:
    """Take every selection out of `model` and whatever it contains. Nothing happens if there is none."""
    for handle in handles_in(model):
        handle.remove()


def handle_of(model: nn.Module) -> Handle:
    """The handle of the selection in `model`, a part of it, or a wrapper around it (deep copies have their own).

    Raises:
        ValueError: there is none, or there are several.
    """
    state = getattr(model, _STATE, None)
    if isinstance(state, Handle):
        return state
    found = handles_in(model)
    if len(found) != 1:
        name = type(model).__name__
        raise ValueError(
            f"{name} holds {len(found)} separate selections: name the part that is meant"
            if found
            else f"{name} is not patched: call patchselect.apply(model) first"
        )
    return found[0]


def handles_in(model: nn.Module) -> list[Handle]:
    states = (vars(module).get(_STATE) for module in model.modules())
    handles = (state.handle if isinstance(state, Layer) else state for state in states if state is not None)
    return list(dict.fromkeys(handles))


def patch(handle: Handle, module: nn.Module, overrides: dict[str, Wrapper], state: Layer | Handle) -> None:
    if overrides:
        swap(module, overrides)
    setattr(module, _STATE, state)
    handle.patched.append(module)


def _check_reachable(handle: Handle, tower: Tower) -> None:
    """A `forward` on the object itself goes before that of its class, and would leave the selection out unseen."""
    for index in handle.layers:
        block = tower.blocks[index]
        if "forward" in vars(block):
            raise TypeError(
                f"block {index} of {type(tower.module).__name__} carries a forward of its own (gradient checkpointing, "
                "accelerate or another wrapper put it there), which would hide the selection: call patchselect.apply "
                "first and wrap after it"
            )


def _check_methods(handle: Handle, methods: dict[nn.Module, dict[str, Wrapper]]) -> None:
    """The same for the tower and for the methods that bring a text along; what was wrapped after `apply` is fine."""
    for module, wrappers in methods.items():
        for name, wrapper in wrappers.items():
            of_text = wrapper in (call_with_text, recall_text)
            unused = name == "forward_features" or (of_text and handle.guidance != "text")
            if name in vars(module) and _STATE not in vars(module) and not unused:
                raise TypeError(
                    f"this {type(module).__name__} carries a {name} of its own (accelerate or another wrapper put it "
                    "there), which would hide that of the selection: call patchselect.apply first and wrap after it"
                )


def _check_relevance(handle: Handle, tower: Tower) -> None:
    """Find out now, not in the first batch, that this host cannot be read this way."""
    kind = tower.adapter
    for index in handle.layers:
        kind.projections(tower.blocks[index])
    attends = handle.relevance in ("keys", "features")
    if handle.guidance == "random" or (attends and (tower.single_stream or handle.guidance == "image")):
        return
    if handle.relevance == "values":
        check_values(kind, tower)
    weight = next(tower.blocks[0].parameters())
    with torch.no_grad():
        probe = torch.zeros(1, kind.text_width(tower), device=weight.device, dtype=weight.dtype)
        if handle.guidance == "text":
            kind.lift(tower, probe)
        if handle.relevance == "values":
            kind.read_back(tower, probe)
        if handle.relevance == "joint" or handle.guidance == "image":
            _check_projects(handle, tower, probe.new_zeros(1, 1, tower.width))


def _check_projects(handle: Handle, tower: Tower, patch: Tensor) -> None:
    try:
        tower.adapter.project(tower, patch)
    except ValueError as error:
        if handle.guidance != "image":
            raise
        raise ValueError(
            f'guidance="image" with relevance={handle.relevance!r} reads the image token in the joint image-text '
            f"space, into which {type(tower.module).__name__} has no way for one token: use relevance="
            '"keys" or "features"'
        ) from error
