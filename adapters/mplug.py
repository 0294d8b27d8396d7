"""mPLUG (X-PLUG/mPLUG, alibaba/AliceMind): retrieval, VQA, grounding, captioning, video captioning.

Its vision tower is OpenAI CLIP's ViT with sequence-first blocks. Every block is checkpointed, with
`use_checkpoint=True` as the default in training and in inference, so the text of a selecting block goes into its
checkpoint as an explicit argument: reentrant checkpointing passes gradients to tensor arguments alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from patchselect.adapter import Adapter, Reader, Tower, Wrapper
from patchselect.compat import KEEPS_GRAPH
from patchselect.weights import is_linear, matrix, through_norm
from patchselect.wiring.guidance import current, scope
from patchselect.wiring.recorder import active_recorder

from .heads import BertHead, head_parts
from .openai_clip import OpenAiClip, is_tower

TRANSFORMER_ARGUMENTS = {"self", "x", "text_mask", "use_checkpoint"}


def run_transformer(
    module: Any, name: str, original: Any, x: Tensor, text_mask: Tensor | None = None, use_checkpoint: bool = True
) -> Tensor:
    """Run mPLUG's loop over its blocks; where they are checkpointed, selecting blocks get the text as an argument.

    While recording they are not checkpointed reentrantly, which would keep no graph of what is recorded.
    """
    guidance, recorder = current(module._patchselect), active_recorder(module._patchselect)
    if not use_checkpoint or (guidance is None and recorder is None):
        return original(x, text_mask, use_checkpoint)
    how: dict[str, Any] = {} if recorder is None or KEEPS_GRAPH is None else {"use_reentrant": False}
    for block in module.resblocks:
        run: Any = block
        text: tuple[Tensor, ...] = ()
        if "_patchselect" in vars(block) and guidance is not None:
            run, text = functools.partial(block, _patchselect_guidance=guidance), (guidance.text,)
        x = torch.utils.checkpoint.checkpoint(run, x, text_mask, *text, **how)
    return x


def call_with_frames(model: nn.Module, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a captioning head, which runs no text encoder: a video `(B, frames, 3, H, W)` becomes `B * frames` images.

    A text given for each video guides all of its frames.
    """
    wiring: Any = model._patchselect
    guidance = current(wiring)
    if wiring.plan.guidance == "text" and guidance is None:
        raise ValueError(
            f"{type(model).__name__} runs no text encoder (its answers are labels and guide nothing): give the "
            "features of a prompt with `with patchselect.guide(model, text_features):`, or choose "
            'patchselect.apply(model, guidance="image")'
        )
    frames = kwargs[wiring.towers[0].reader.call[0]] if not args else args[0]
    if guidance is None or guidance.pairing != "paired" or frames.dim() != 5 or len(guidance.text) != len(frames):
        return original(*args, **kwargs)
    with scope(wiring, guidance.text.repeat_interleave(frames.shape[1], dim=0), "paired", exact=1):
        return original(*args, **kwargs)


@dataclass(eq=False)
class MplugHead(BertHead):
    """A head around one of its towers, which may be wider than its texts."""

    bridge: str | None = None
    """The name of the layer from the width of the tower to that of the text, if they differ."""
    bridge_norm: str | None = None
    """The name of the norm behind it."""

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        if self.text_encoder is None:
            return [(self.module, {"forward": call_with_frames})]
        return super().methods(model, towers)

    def as_fused(self, tower: Tower, rows: Tensor) -> Tensor:
        """Narrow the tokens to the width of the text where the tower is wider, as the head does it."""
        for name in (self.bridge, self.bridge_norm):
            rows = rows if name is None else self.module.get_submodule(name)(rows)
        return rows


def bridges(head: BertHead, width: int, count: int) -> list[dict[str, Any]]:
    """Name, for each of `count` towers of this width, the layer that leads to the width of the text, and its norm.

    Raises:
        TypeError: the head has no such layer, and needs one.
    """
    if width == head.width:
        return [{}] * count
    children = list(head.module.children())
    ways = (width, head.width)
    found = [layer for layer in children if is_linear(layer) and (layer.in_features, layer.out_features) == ways]
    if not found:
        raise TypeError(
            f"{type(head.module).__name__} reads text of width {head.width} and images of width {width} and has "
            f"no linear layer from {width} to {head.width} to lift the one to the other: call patchselect.apply on "
            f"its vision tower and give guide() vectors of width {width}"
        )
    names = {id(part): name for name, part in head.module.named_children()}
    named: list[dict[str, Any]] = []
    for index in range(count):
        bridge = found[min(index, len(found) - 1)]
        later: list[Any] = children[children.index(bridge) :]
        norms = (part for part in later if isinstance(part, nn.LayerNorm) and part.normalized_shape == ways[1:])
        norm = next(norms, None)
        named.append({"bridge": names[id(bridge)], "bridge_norm": None if norm is None else names[id(norm)]})
    return named


class Mplug(OpenAiClip):
    """Heads with `visual_encoder.visual` and, where they read text, `text_encoder`; and the tower alone.

    Text features are the text encoder's [CLS]. Where the tower is wider than the text (ViT-L/14), the text goes back
    through the head's `visn_fc`, transposed; the momentum tower has its own.
    """

    name = "mplug"
    default_relevance = "keys"

    def towers(self, model: nn.Module) -> list[Tower]:
        found: list[Any] = [
            module
            for module in model.modules()
            if is_tower(module) and "skip_last_layer" in inspect.signature(type(module).forward).parameters
        ]
        if not found:
            return []
        towers = [self.sequence_first_tower(tower, Reader()) for tower in found]
        alone = found == [model] or found == [getattr(model, "visual", None)]
        parts = None if alone else head_parts(model, found, "mPLUG")
        if parts is not None:
            names = bridges(BertHead(**parts), towers[0].width, len(towers))
            for tower, bridge in zip(towers, names):
                tower.reader = MplugHead(**parts, **bridge)
        return towers

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        methods = list(towers[0].reader.methods(model, towers))
        for tower in towers:
            transformer: Any = tower.module.transformer
            if set(inspect.signature(type(transformer).forward).parameters) == TRANSFORMER_ARGUMENTS:
                methods.append((transformer, {"forward": run_transformer}))
        return methods

    def encode_images(self, model: nn.Module, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        """Return all tokens, `(B, N, D)`, after the last layer and without checkpoints, as the heads read them."""
        return tower.module(images, **{"skip_last_layer": True, "use_checkpoint": False, **kwargs})

    # The tower has a projection into CLIP's joint space, which no head of mPLUG uses.

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        head = tower.reader
        if not isinstance(head, MplugHead) or head.bridge is None:
            return text
        weight = matrix(head.module.get_submodule(head.bridge))  # as it is now, with what came around
        return text.to(weight.dtype) @ weight

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        if not isinstance(tower.reader, MplugHead):
            return through_norm(text, tower.final_norm)
        raise ValueError('relevance="values" is not offered for the heads of mPLUG: use "keys" or "features"')

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        return Adapter.project(self, tower, patches)
