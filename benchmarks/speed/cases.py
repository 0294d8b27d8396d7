"""What is compared: the same model unpatched, guided in three ways, merged before one selection, and merged alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.common.objects import name_of
from benchmarks.common.tome import front, token_merging
from benchmarks.models.host import Host, Tokens, autocast
from patchselect.wiring.towers import find_towers

PASSES = ("forward", "train", "checkpointed")
VIEWS = ("tower", "pair")
GUIDED = ("text", "image", "random")
MERGED = "merged"
"""Merging without a text, then one selection by it, whose sizes attention counts (docs/merging.md)."""
AGAIN = "again"
"""Guided by a text that has guided an image before: from the second image of a `guide` block on."""
SELECTING = (*GUIDED, AGAIN, MERGED)
TOME = {
    "tome": "ToMe as published",
    "fused tome": "ToMe, fused attention",
    "tome front": "ToMe-front, fused attention",
}
"""Merging alone; "front" does all of it in the first third of the blocks."""


@dataclass(frozen=True)
class Setting:
    """What all cases of one comparison share."""

    image_size: int
    batch: int
    precision: str
    work: str = "forward"
    """`forward` under `inference_mode`; `train`: forward and backward; `checkpointed`: with gradient checkpointing."""
    view: str = "tower"
    """`tower`: the vision encoder; `pair`: one call of the whole model with images and texts."""

    def __str__(self) -> str:
        return f"{self.image_size} px, batch {self.batch}, {self.precision}, {self.work}, {self.view}"


@dataclass(frozen=True)
class Case:
    """One way to run the model."""

    method: str
    """`unpatched`, one of `SELECTING` or of `TOME`, or `text encoder`."""
    keep_rate: float = 1.0
    """Of the two selections whose FLOPs this case has."""
    removed: int = 0
    """Patches that ToMe removes in all."""
    own_rate: float = 1.0
    """Keep rate of the one selection of `MERGED`."""

    def __str__(self) -> str:
        return self.method if self.keep_rate == 1.0 else f"{self.method} {self.keep_rate:g}"


@dataclass(frozen=True)
class Selection:
    """What all selecting cases share, as `patchselect.apply` takes it; `None` lets the adapter choose."""

    layers: Sequence[int] | None = None
    relevance: Any = None
    """Of text guidance: a name or an object."""
    fusion: Any = "mean"
    """Of what is not kept, likewise."""
    merge: float = 0.5
    """Of `MERGED`: the share of the removed patches that leaves by merging."""

    def label(self, method: str) -> str:
        """Name a method with the relevance and the fusion that were asked for."""
        relevance = name_of(self.relevance) if method in ("text", AGAIN, MERGED) else None
        fusion = f"fusion {name_of(self.fusion)}" if method in SELECTING and self.fusion != "mean" else None
        names = {MERGED: f"text, merge {self.merge:g}", AGAIN: "text, from its second image on", **TOME}
        name = names.get(method, method)
        return ", ".join(part for part in (name, relevance, fusion) if part)


@dataclass
class Inputs:
    """One batch on the device, and the text features that guide it, encoded before the clock starts."""

    images: Tensor
    tokens: Tokens
    text: Tensor
    """`(B, E)`"""

    def first(self) -> Inputs:
        """Return the first image and its text alone."""
        return Inputs(self.images[:1], {name: ids[:1] for name, ids in self.tokens.items()}, self.text[:1])

    def fake(self) -> Inputs:
        """Return zeros of the same shapes, made where they are needed (for counting FLOPs)."""

        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=x.dtype, device=x.device)

        return Inputs(zeros(self.images), {k: zeros(v) for k, v in self.tokens.items()}, zeros(self.text))


@contextmanager
def patched(host: Host, case: Case, selection: Selection) -> Any:
    """Let the model be as this case wants it, and as it was afterwards."""
    if case.method in TOME:
        first = front(len(find_towers(host.model)[0].blocks)) if case.method == "tome front" else None
        with token_merging(host.model, case.removed, fused=case.method != "tome", first=first):
            yield
    elif case.method in SELECTING:
        guidance = "text" if case.method in (AGAIN, MERGED) else case.method
        chosen = selection.relevance if guidance == "text" else None
        rate, layers, merge = case.keep_rate, selection.layers, 0.0
        if case.method == MERGED:
            rate, layers, merge = case.own_rate, layers and layers[:1], selection.merge
        handle = patchselect.apply(
            host.model, rate, layers, guidance, chosen, selection.fusion, pairing="paired", merge=merge
        )
        try:
            yield
        finally:
            handle.remove()
    else:
        yield


def runner(host: Host, case: Case, setting: Setting, inputs: Inputs, compiled: bool = False) -> Callable[[], Any]:
    """Return what is timed: one call with all that this case costs, but for the encoding of the text (see `Inputs`)."""

    def guided() -> AbstractContextManager[Any]:
        explicit = case.method in ("text", MERGED) and setting.view == "tower"
        return patchselect.guide(host.model, inputs.text) if explicit else nullcontext()

    def features() -> Any:
        with autocast(setting.precision, inputs.images.device):
            if case.method == "text encoder":
                return host.encode_text(inputs.tokens)
            with guided():
                if setting.view == "pair":
                    return host.both(inputs.images, inputs.tokens)
                return host.encode_image(inputs.images)

    run = made_fast(features) if compiled else features
    without_gradients = torch.no_grad if compiled else torch.inference_mode  # dynamo cannot trace inference tensors

    def forward() -> Any:
        with without_gradients():
            return run()

    def train() -> None:
        image, text = (F.normalize(x.float(), dim=-1) for x in (run(), inputs.text))
        F.cross_entropy(100.0 * image @ text.T, torch.arange(len(image), device=image.device)).backward()
        host.model.zero_grad(set_to_none=True)

    return forward if setting.work == "forward" else train


def made_fast(call: Callable[[], Any]) -> Callable[[], Any]:
    """Compile a call; an error rather than silence where dynamo would give up, for all cases share one code object."""
    dynamo: Any = torch._dynamo
    dynamo.config.cache_size_limit = 1000
    dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(call, dynamic=False)  # type: ignore[no-any-return]


@contextmanager
def mode(host: Host, work: str) -> Any:
    """Put the model into evaluation or training, with or without gradient checkpointing; evaluation afterwards."""
    try:
        host.model.train(work != "forward")
        if work == "checkpointed":
            host.checkpoint(True)
        yield
    finally:
        if work == "checkpointed":
            host.checkpoint(False)
        host.model.eval()


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
