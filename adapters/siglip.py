"""SigLIP and SigLIP 2 of Hugging Face transformers: no class token, a pool by attention, padded batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Arguments, Images, Tower, Wrapper, bound
from patchselect.compat import is_compiling
from patchselect.weights import is_linear, pool_cost, through_norm
from patchselect.wiring.journey import call_tower, parts_of_call
from patchselect.wiring.padding import mask_over, real_tokens
from patchselect.wiring.text_calls import Original

from .joint import pooled_alone, through_pool
from .transformers import TransformersClip


def given_to_siglip2(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """Return mask and sizes that the tower of SigLIP 2 is called with; the mask has two names."""
    given = bound(("pixel_values", "attention_mask", "spatial_shapes"), args, kwargs)
    return given.get("pixel_attention_mask", given.get("attention_mask")), given.get("spatial_shapes")


def call_without_full_mask(module: Any, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Leave out a mask that hides nothing: SigLIP 2 sends a padding mask through all blocks and the head.

    A real one follows the tokens. A compiled graph cannot look at the mask, and its first selecting block refuses it.
    """
    mask, _ = given_to_siglip2(args, kwargs)
    key = "pixel_attention_mask" if "pixel_attention_mask" in kwargs else "attention_mask"
    selects = module._patchselect.plan.selects
    if selects and mask is not None and not is_compiling() and bool(mask.all()):
        if len(args) > 1:
            args = (args[0], None, *args[2:])
        else:
            kwargs[key] = None
    return call_tower(module, name, original, *args, **kwargs)


def call_head(head: Any, name: str, original: Original, hidden_state: Tensor, attention_mask: Any = None) -> Any:
    """Run the pooling head of SigLIP 2 on the tokens that are left, with a mask over these."""
    tower = head._patchselect.towers[0]
    parts = None if attention_mask is None else parts_of_call(tower)
    if parts is not None:
        attention_mask = real_tokens(parts, tower, hidden_state).to(attention_mask.dtype)
    return original(hidden_state, attention_mask)


class TransformersSiglip(TransformersClip):
    """`SiglipModel`, `Siglip2Model` and their vision towers: no [CLS], an attention-pooling head after the tower.

    The text has the width of the tower already, but for `VisionTextDualEncoderModel`, whose own `visual_projection`
    follows the head and leads into its joint space. For `values` it is read backwards through the value-output path of
    the pooling head's attention, which is one more attention over the patches; for `joint` each patch goes through
    the head alone.
    """

    name = "transformers-siglip"
    pools = True

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        masked: list[tuple[nn.Module, Mapping[str, Wrapper]]] = [
            (tower.module, {"forward": call_without_full_mask}) for tower in towers if self.takes_flat_patches(tower)
        ]
        heads = [getattr(tower.module, "head", None) for tower in towers if tower.padded]
        masked += [(head, {"forward": call_head}) for head in heads if head is not None]
        return masked + super().methods(model, towers)

    def towers(self, model: nn.Module) -> list[Tower]:
        found = super().towers(model)
        for tower in found:
            tower.padded = self.takes_flat_patches(tower)
        return found

    def images(self, tower: Tower, *args: Any, **kwargs: Any) -> Images | None:
        mask, shapes = given_to_siglip2(args, kwargs)
        if shapes is None or is_compiling():
            return None
        sizes = [(int(height), int(width)) for height, width in shapes.tolist()]
        if mask is None or bool(mask.all()):
            return Images(sizes, padding=False) if len(set(sizes)) > 1 else None
        found = Images(sizes, padding=True)
        counts = torch.tensor(found.counts, device=mask.device)
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < counts[:, None]):
            raise ValueError(
                f"the mask of this padded batch does not show the {counts.tolist()} patches that spatial_shapes says, "
                "in front of the padding: give what the processor returns"
            )
        return found

    def fit_masks(self, tower: Tower, block: nn.Module, real: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        given = bound(tower.parts["block_call"], args, kwargs)
        if given.get("attention_mask") is not None:
            given["attention_mask"] = mask_over(real, given["attention_mask"])
        return (given.pop("hidden_states"),), given

    def takes_flat_patches(self, tower: Tower) -> bool:
        """Tell SigLIP 2, which is called with patches `(N, n, values)` that its processor has cut out, from SigLIP."""
        return is_linear(tower.module.embeddings.patch_embedding)  # type: ignore[union-attr]

    def patch_embedding(self, tower: Tower) -> nn.Module | None:
        return tower.module.embeddings.patch_embedding  # type: ignore[union-attr, return-value]

    def pooling_cost(self, tower: Tower) -> tuple[int, int]:
        return pool_cost(getattr(tower.module, "head", None))

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        text = self.lift(tower, text)
        head = getattr(tower.module, "head", None)
        return through_norm(text if head is None else through_pool(head.attention, text), tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        normed = tower.final_norm(patches)  # type: ignore[misc]
        head = getattr(tower.module, "head", None)
        if head is not None:
            normed = pooled_alone(head, normed)
        return normed if tower.head is None else tower.head.visual_projection(normed)  # type: ignore

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> tuple[int, int]:
        shapes = kwargs.get("spatial_shapes", args[2] if len(args) > 2 else None)
        if shapes is None:
            return super().grid(tower, *args, **kwargs)
        first, *others = shapes.tolist()
        if any(other != first for other in others):
            raise ValueError("record() needs images of one grid in a batch, got " + str(shapes.tolist()))
        return int(first[0]), int(first[1])
