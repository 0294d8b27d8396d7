"""mPLUG (X-PLUG/mPLUG, alibaba/AliceMind): retrieval, VQA, grounding, captioning, video captioning.

Its vision tower is OpenAI CLIP's ViT with sequence-first blocks. Every block is checkpointed, with
`use_checkpoint=True` as the default in training and in inference, so the text of a selecting block goes into its
checkpoint as an explicit argument: reentrant checkpointing passes gradients to tensor arguments alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from patchselect.adapter import Tower, Wrapper
from patchselect.compat import KEEPS_GRAPH
from patchselect.weights import is_linear, matrix
from patchselect.wiring.guidance import current, scope
from patchselect.wiring.recorder import active_recorder

from .heads import Heads
from .openai_clip import SequenceFirst, is_tower

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
    frames = kwargs[wiring.towers[0].parts["call"][0]] if not args else args[0]
    if guidance is None or guidance.pairing != "paired" or frames.dim() != 5 or len(guidance.text) != len(frames):
        return original(*args, **kwargs)
    with scope(wiring, guidance.text.repeat_interleave(frames.shape[1], dim=0), "paired", exact=1):
        return original(*args, **kwargs)


class Mplug(SequenceFirst, Heads):
    """Heads with `visual_encoder.visual` and, where they read text, `text_encoder`; and the tower alone.

    Text features are the text encoder's [CLS]. Where the tower is wider than the text (ViT-L/14), the text goes back
    through the head's `visn_fc`, transposed; the momentum tower has its own.
    """

    name = "mplug"

    def towers(self, model: nn.Module) -> list[Tower]:
        found: list[Any] = [
            module
            for module in model.modules()
            if is_tower(module) and "skip_last_layer" in inspect.signature(type(module).forward).parameters
        ]
        if not found:
            return []
        alone = found == [model] or found == [getattr(model, "visual", None)]
        parts = {} if alone else self.head_parts(model, found, "mPLUG")
        towers = [self.sequence_first_tower(tower, dict(parts)) for tower in found]
        if parts:
            self._find_bridges(parts, towers)
        return towers

    def _find_bridges(self, parts: dict[str, Any], towers: list[Tower]) -> None:
        """Give each tower the layer that leads from its width to that of the text, and its norm, if it needs one."""
        ways = (towers[0].width, parts["text_width"])
        if ways[0] == ways[1]:
            return
        children = list(parts["head"].children())
        bridges = [layer for layer in children if is_linear(layer) and (layer.in_features, layer.out_features) == ways]
        if not bridges:
            raise TypeError(
                f"{type(parts['head']).__name__} reads text of width {ways[1]} and images of width {ways[0]} and has "
                f"no linear layer from {ways[0]} to {ways[1]} to lift the one to the other: call patchselect.apply on "
                f"its vision tower and give guide() vectors of width {ways[0]}"
            )
        for index, tower in enumerate(towers):
            bridge = bridges[min(index, len(bridges) - 1)]
            later: list[Any] = children[children.index(bridge) :]
            norms = (part for part in later if isinstance(part, nn.LayerNorm) and part.normalized_shape == ways[1:])
            names = {id(part): name for name, part in parts["head"].named_children()}
            norm = next(norms, None)
            tower.parts.update(bridge=names[id(bridge)], bridge_norm=None if norm is None else names[id(norm)])

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        parts = towers[0].parts
        methods = super().methods(model, towers)
        if parts and parts["text_encoder"] is None:
            methods.append((parts["head"], {"forward": call_with_frames}))
        for tower in towers:
            transformer: Any = tower.module.transformer
            if set(inspect.signature(type(transformer).forward).parameters) == TRANSFORMER_ARGUMENTS:
                methods.append((transformer, {"forward": run_transformer}))
        return methods

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        if not tower.parts:
            return super().read_back(tower, text)
        raise ValueError('relevance="values" is not offered for the heads of mPLUG: use "keys" or "features"')

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        if tower.parts.get("bridge") is None:
            return text
        weight = matrix(tower.parts["head"].get_submodule(tower.parts["bridge"]))  # as it is now, with what came around
        return text.to(weight.dtype) @ weight

    def as_fused(self, tower: Tower, rows: Tensor) -> Tensor:
        """Narrow the tokens to the width of the text where the tower is wider, as the head does it."""
        for name in (tower.parts.get("bridge"), tower.parts.get("bridge_norm")):
            rows = rows if name is None else tower.parts["head"].get_submodule(name)(rows)
        return rows
