"""Plain ViTs of Hugging Face transformers, alone, under a classifier, or as the image side of a dual encoder.

ViT, DeiT, DINOv2 (with and without registers), TIPSv2, ViT-MSN, I-JEPA, AIMv2, FLAVA's image side,
VisionTextDualEncoder; they are found by their structure (`layouts.py`): embeddings with a convolution and known prefix
tokens, pre-norm blocks, a final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import Attended, Tower, Wrapper, bound, patch_grid
from patchselect.weights import Projections, held, matrix, rate
from patchselect.wiring.journey import call_tower
from patchselect.wiring.text_calls import Original
from patchselect.wiring.wording import refuse_masks

from .joint import pooled_alone
from .layouts import blocks_of, final_norm_of, is_tower, linears_of, norms_of, num_prefix, patches_of, rotary
from .strangers import refuse_strangers
from .transformers import TransformersClip, calls_of

HEADS = {"classifier", "cls_classifier", "distillation_classifier"}
DUAL_PARTS = {"vision_model", "text_model", "visual_projection", "text_projection"}
DENSE = "{} reshapes the states of {} to a dense grid (reshape_hidden_states), but selection removed patches: set {} = \
False, or take last_hidden_state from the model, handle.record() and patchselect.restore(tokens, trace)"


def call_backbone(module: Any, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse feature maps on a dense grid, which a shorter sequence corrupts.

    Raises:
        ValueError: the backbone would reshape; names the ways out.
    """
    if module.config.reshape_hidden_states and module._patchselect.plan.selects:
        kind = type(module).__name__
        raise ValueError(DENSE.format(kind, "its blocks", "backbone.config.reshape_hidden_states"))
    return call_tower(module, name, original, *args, **kwargs)


class TransformersPlain(TransformersClip):
    """`ViTModel`, `DeiTModel`, `Dinov2Model`, `ViTMSNModel`, `IJepaModel`, `Aimv2Model`, `FlavaImageModel` and heads.

    A text has the width of the tower, or is in the joint space of `VisionTextDualEncoderModel` and `Aimv2Model`. On its
    way from there it goes backwards through the pooler of the tower, if it has one, whose tanh counts as its slope at
    0, which is 1.
    """

    name = "transformers-plain"
    default_relevance = "keys"

    def towers(self, model: nn.Module) -> list[Tower]:
        core, head = self.core(model)
        if core is None:
            return []
        block, norms = blocks_of(core)[0], norms_of(blocks_of(core)[0])
        assert norms is not None
        return [
            Tower(
                adapter=self,
                module=core,
                blocks=blocks_of(core),
                num_prefix_tokens=num_prefix(core.embeddings),
                has_class_token=getattr(core.embeddings, "cls_token", None) is not None,
                width=linears_of(block.attention)[0].in_features,
                head=head,
                final_norm=final_norm_of(core),
                parts=calls_of(model, block),
            )
        ]

    def core(self, model: Any) -> tuple[Any, nn.Module | None]:
        """Return the tower of `model`, and the model if it has a joint space; `None` twice if it is not of this kind.

        Raises:
            TypeError: something beside the tower may read a fixed number of patches, or the tower is known not to work.
        """
        if self.knows(model):
            return model, None
        names = {name for name, _ in model.named_children()}
        found = [name for name, part in model.named_children() if self.knows(part)]
        if len(found) != 1:
            refuse_strangers(model)
            return None, None
        if names == DUAL_PARTS:
            return getattr(model, found[0]), model
        if names == {"vision_model", "text_model"} == {found[0], "text_model"}:
            return getattr(model, found[0]), None  # TIPSv2: texts and images are compared as they leave their towers
        if names - {found[0]} <= HEADS:
            return getattr(model, found[0]), None
        others = ", ".join(sorted(names - {found[0]}))
        raise TypeError(
            f"{type(model).__name__} cannot be patched as a whole: its {others} may read a fixed number of patches. "
            f"Call patchselect.apply(model.{found[0]}) if what reads its tokens takes any number"
        )

    def knows(self, module: Any) -> bool:
        """Tell whether a module is a tower of this family."""
        return is_tower(module) and not hasattr(module.embeddings, "random_masking") and not rotary(module)

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        core = towers[0].module
        backbone: list[tuple[nn.Module, Mapping[str, Wrapper]]] = [(core, {"forward": call_backbone})]
        reshapes = hasattr(core, "out_features") and hasattr(getattr(core, "config", None), "reshape_hidden_states")
        return super().methods(model, towers) + (backbone if reshapes else [])

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(tower.parts["block_call"], args, kwargs)
        masks = {name: value for name, value in given.items() if name.endswith("_mask") and value is not None}
        if masks and block._patchselect.plan.selects:
            refuse_masks(tower, masks)
        hidden = given.pop("hidden_states")
        normed = norms_of(block)[0](hidden)  # type: ignore[index]
        attended = block.attention(normed, **given)
        attended, *maps = (attended,) if isinstance(attended, Tensor) else attended
        shown = maps[0] if maps and tower.parts["returns_tuple"] and given.get("output_attentions") else None
        return Attended(self.residual(tower, block, hidden, attended), normed, shown)

    def residual(self, tower: Tower, block: Any, hidden: Tensor, branch: Tensor) -> Tensor:
        """Add in the order of the host: a sum has the memory layout of its first part, and norms round by that."""
        return hidden + branch if hasattr(block, "ffn") else self._around(block, 1, branch) + hidden

    def attend_sized(self, tower: Tower, block: Any, sizes: Tensor, *args: Any, **kwargs: Any) -> Attended:
        """Leave out the hidden states that a backbone asks its blocks for, which they leave to others."""
        kwargs.pop("output_hidden_states", None)
        return super().attend_sized(tower, block, sizes, *args, **kwargs)

    @staticmethod
    def _around(block: Any, number: int, branch: Tensor) -> Tensor:
        """Apply LayerScale, stochastic depth and dropout of one branch. Releases with `drop_path1` never call it."""
        for name in (f"layer_scale{number}", "drop_path", "dropout"):
            if hasattr(block, name):
                branch = getattr(block, name)(branch)
        return branch

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Any:
        normed = norms_of(block)[1](tokens)  # type: ignore[index]
        if hasattr(block, "intermediate"):
            tokens = block.output(block.intermediate(normed), tokens)
        else:
            ffn = getattr(block, "ffn", None)
            tokens = self._around(block, 2, block.mlp(normed)) + tokens if ffn is None else tokens + ffn(normed)
        if not tower.parts["returns_tuple"]:
            return tokens
        return (tokens,) if rest is None else (tokens, rest)

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        if model is tower.module:
            return "this model returns last_hidden_state for its user"
        classifier: Any = getattr(model, "classifier", None)
        of_class_token = tower.has_class_token and getattr(classifier, "in_features", tower.width) == tower.width
        return None if of_class_token else "its head reads the mean of all patches, or an attention over them"

    def projections(self, block: Any) -> Projections:
        attention, (query, key, value, output) = block.attention, linears_of(block.attention)
        inner = getattr(attention, "attention", attention)
        num_heads = getattr(inner, "num_attention_heads", None) or inner.num_heads
        dropouts = (getattr(inner, name, 0.0) for name in ("attention_dropout", "dropout"))
        scale: Any = getattr(block, "layer_scale1", None)
        return Projections.separate(
            query,
            key,
            value,
            output,
            num_heads=num_heads,
            scale=(query.out_features // num_heads) ** -0.5,
            norm=norms_of(block)[0],  # type: ignore[index]
            output_scale=None if scale is None else held(scale, "lambda1"),
            out=(lambda heads: attention.output(heads, None)) if hasattr(attention, "output") else output,
            dropout=max(map(rate, dropouts)),
        )

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        text, dense = super().lift(tower, text), self._dense(tower)
        return text if dense is None else text.to(matrix(dense).dtype) @ matrix(dense)

    @staticmethod
    def _dense(tower: Tower) -> nn.Module | None:
        """Return the linear layer of the pooler between the class token and a joint space."""
        pooler: Any = getattr(tower.module, "pooler", None)
        return None if tower.head is None or pooler is None else pooler.dense

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        normed = tower.final_norm(patches)  # type: ignore[misc]
        if tower.head is None:
            return normed
        for name in ("pooler", "head"):
            pool: Any = getattr(tower.module, name, None)
            if pool is not None:
                normed = pooled_alone(pool, normed)
        return tower.head.visual_projection(normed)  # type: ignore[operator, no-any-return]

    def patch_embedding(self, tower: Tower) -> nn.Module | None:
        return patches_of(tower.module.embeddings)

    def own_patches(self, tower: Tower) -> int | None:
        embeddings: Any = tower.module.embeddings
        count = getattr(getattr(embeddings, "patch_embeddings", None), "num_patches", None)
        places = getattr(embeddings, "position_ids", None)
        return int(count) if count else None if places is None else places.shape[-1]

    def grid(self, tower: Tower, pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(pixel_values, patches_of(tower.module.embeddings))
