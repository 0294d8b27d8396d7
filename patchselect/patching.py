"""`apply` and `remove`: put the selection into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import nn

from .adapter import Adapter, Tower, Wrapper
from .hooked import unheard
from .prompts.checks import check_prompts, plan_for_prompts
from .reduction import Reduction
from .relevance import Relevance
from .wiring.blocks import call_block, run_block
from .wiring.changes import check_heard, places_of
from .wiring.checks import check_counting, check_methods, check_pairing, check_reachable
from .wiring.guard import check_blocks
from .wiring.journey import call_tower
from .wiring.merging import run_counting, run_placed
from .wiring.outside import check_objects
from .wiring.places import follows
from .wiring.plan import Plan
from .wiring.recorder import Trace, recording
from .wiring.state import STATE, Layer, Wiring, forget, wiring_of
from .wiring.text_sides import join_text_side
from .wiring.towers import find_towers, unwrapped


@dataclass(frozen=True)
class Handle:
    """What `apply` returns: the selection in one model, and the verbs on it."""

    wiring: Wiring = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The model that was patched."""
        return self.wiring.model

    @property
    def towers(self) -> list[Tower]:
        """Its vision towers."""
        return self.wiring.towers

    @property
    def guidance(self) -> str:
        """`"text"`, `"image"` or `"random"`."""
        return self.wiring.plan.guidance

    @property
    def plan(self) -> Plan:
        """What was asked for, with the relevance and the reduction as objects."""
        return self.wiring.plan

    @property
    def relevance(self) -> str:
        """How patches are ranked, by name."""
        return self.wiring.plan.relevance.name

    @property
    def fusion(self) -> str:
        """What becomes of the patches that do not stay, by name."""
        return self.wiring.plan.reduction.name

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The share of patches that stays at each selection layer, in (0, 1]."""
        return self.wiring.plan.keep_rates

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based block indices of the selection layers."""
        return self.wiring.plan.layers

    def remove(self) -> None:
        """Take the selection out: every module is again the object, of the class, that it was. Idempotent."""
        self.wiring.unpatch()

    def record(self) -> AbstractContextManager[Trace]:
        """Collect one `Selected` per selection layer and call, in order: `with handle.record() as trace:`.

        Only calls of this thread (or task) are recorded, recomputation by gradient checkpointing is not, and nothing
        is stored outside of the `with` block.

        Raises:
            ValueError: the selection was removed.
        """
        if not self.wiring.patched:
            raise ValueError("the selection was removed from this model: call patchselect.apply again to record it")
        return recording(self.wiring)

    def __repr__(self) -> str:
        plan, name = self.wiring.plan, type(self.wiring.model).__name__
        where = f"keep_rate={list(plan.keep_rates)}, layers={list(plan.layers)}, guidance={plan.guidance!r}"
        more = f", merge={plan.merge}, sizes={plan.sizes}" if plan.merge or plan.sizes else ""
        return f"Handle({name}, {where}, relevance={plan.relevance!r}, fusion={plan.reduction!r}{more})"


def apply(
    model: nn.Module,
    keep_rate: float | Sequence[float] = 0.7,
    layers: Sequence[int] | None = None,
    guidance: str = "text",
    relevance: str | Relevance | None = None,
    fusion: str | Reduction = "mean",
    adapter: str | Adapter | None = None,
    pairing: str | None = None,
    *,
    merge: float = 0.0,
    sizes: bool | None = None,
    text_side: nn.Module | None = None,
    positions: str = "original",
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
        relevance: how a text meets a patch: `"keys"`, `"features"`, `"values"`, `"joint"` or a `patchselect.Relevance`;
            `None` is the default of the adapter for text (`"values"` for CLIP-like hosts) and `"keys"` for an image.
            Random guidance uses none.
        fusion: what the others become: `"mean"` (weighted), `"sum"` (the paper's), `"none"` (they are dropped) or a
            `patchselect.Reduction`.
        adapter: a `patchselect.Adapter`, or the name of one; `None` asks each in turn.
        pairing: what a call `model(images, texts)` of a dual encoder (CLIP, SigLIP) means, which compares every image
            with every text: `"paired"`: text i belongs to image i, and chooses its patches (contrastive training);
            `"shared"`: the texts are candidates (class prompts), one selection per image serves all of them. `None`:
            such a call with several texts is an error that asks. Heads that match text i with image i by
            construction need none, and text given by `guide` has its own.
        merge: share in [0, 1) of the removed patches that leaves by merging with similar ones in the blocks before the
            first selection, without a text (docs/merging.md); 0 merges none. Above 0, `layers=None` is the paper's
            first layer alone, `[4]` of 12 blocks, and the first selection keeps `ceil(keep_rate * n)` of the n patches
            of the IMAGE, so the number of tokens after it does not depend on `merge`.
        sizes: whether attention counts how many patches a token stands for, from the first reduction on; `None` means
            where `merge` is above 0.
        text_side: for a vision tower that has lost its text half (LLaVA's CLIP, …): the dual encoder that it came
            from. Its projection and final norm are read, so that `guide` takes its text features; nothing of it
            becomes a part of the model. Without it such hosts take vectors of the vision width.
        positions: of a language model that reads the patches in its prompt: `"original"`, each patch keeps the position
            that it had in the whole prompt, and so does the text after it; `"renumbered"`, positions are counted over
            what is left.

    Returns:
        The handle; `handle.record()` shows what was kept, `handle.remove()` undoes everything.

    Raises:
        TypeError: the model is not supported, compiled, scripted or data-parallel, or a wrapper has replaced the
            `forward` of a block, of the tower or of the model; an argument of a wrong type.
        ValueError: an argument outside of its range; a `pairing` that the model has no call for; blocks inside of a
            wrapper (torch's `checkpoint_wrapper` is looked through). The model is unchanged after either.
    """
    host = unwrapped(model)
    towers = find_towers(host, adapter)
    kind = towers[0].adapter
    depth, chosen = min(len(tower.blocks) for tower in towers), kind.relevance_for(towers[0])
    plan = Plan.of(depth, keep_rate, layers, guidance, relevance, fusion, chosen, pairing, merge, sizes, positions)
    plan = plan_for_prompts(plan, host, towers[0])
    join_text_side(towers, text_side)
    check_prompts(plan, host, towers)
    places = []
    for tower in towers:
        with unheard():
            check_reachable(plan, tower)
            check_counting(plan, tower)
            places.append(places_of(tower, check_blocks(plan, tower)))
            check_heard(tower, places[-1])
            plan.relevance.check(tower, plan.layers, guidance)
            check_objects(plan, tower)
    methods: dict[nn.Module, dict[str, Wrapper]] = {tower.module: {"forward": call_tower} for tower in towers}
    for module, wrappers in kind.methods(host, towers):
        methods.setdefault(module, {}).update(wrappers)
    check_methods(plan, methods)
    check_pairing(plan, type(host).__name__, methods)
    remove(host)
    wiring = Wiring(plan, host, towers, places)
    _patch(wiring, methods)
    return Handle(wiring)


def _patch(wiring: Wiring, methods: Mapping[nn.Module, Mapping[str, Wrapper]]) -> None:
    plan = wiring.plan
    for tower in wiring.towers:
        ratios = dict(zip(plan.layers, plan.ratios))
        for index, block in enumerate(tower.blocks):
            if index not in ratios and not plan.counts(index) and not follows(plan, tower, index):
                continue
            other = run_counting if plan.counts(index) else run_placed
            overrides: dict[str, Wrapper] = {"forward": run_block if index in ratios else other}
            if hasattr(block, "gradient_checkpointing"):
                overrides["__call__"] = call_block
            ratio = ratios.get(index, (1, 1))
            wiring.patch(block, overrides, Layer(wiring, tower, index, index == plan.layers[0], ratio))
    for module, wrappers in methods.items():
        wiring.patch(module, wrappers, wiring)
    if STATE not in vars(wiring.model):
        wiring.patch(wiring.model, {}, wiring)


def remove(model: nn.Module) -> None:
    """Take every selection out of `model` and whatever it contains. Nothing happens if there is none."""
    forget(model)


def handle_of(model: nn.Module) -> Handle:
    """Return the handle of the selection in `model`, a part of it, or a wrapper around it.

    Deep copies have a selection, and so a handle, of their own.

    Raises:
        ValueError: there is none, or there are several.
    """
    return Handle(wiring_of(model))
