"""ALBEF (salesforce/ALBEF): pretraining, retrieval, VQA, NLVR2, visual entailment, and its ViT alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, Reader, Tower, Wrapper, patch_grid
from patchselect.weights import Projections, is_linear, matrix, rate, thirds, through_norm
from patchselect.wiring.journey import call_tower
from patchselect.wiring.text_calls import Original
from patchselect.wiring.wording import refuse_masks

from .heads import BertHead, head_parts
from .timm import out_of

BLOCK_PARTS = {"norm1", "attn", "drop_path", "norm2", "mlp"}


def is_tower(module: Any) -> bool:
    """Tell whether this is ALBEF's ViT: plain pre-norm blocks with a fused `qkv`, one [CLS] in front."""
    blocks: Any = getattr(module, "blocks", None)
    embed, positions = getattr(module, "patch_embed", None), getattr(module, "pos_embed", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0 or not hasattr(module, "cls_token"):
        return False
    if not hasattr(module, "norm"):
        return False
    if positions is None or positions.shape[1] != getattr(embed, "num_patches", -1) + 1:
        return False
    parts: list[Any] = list(blocks)
    return all(
        {name for name, _ in block.named_children()} == BLOCK_PARTS
        and is_linear(getattr(block.attn, "qkv", None))
        and is_linear(getattr(block.attn, "proj", None))
        and not any(True for _ in block.attn.parameters(recurse=False))
        for block in parts
    )


def joint_of(head: nn.Module) -> tuple[nn.Module, ...]:
    """Return the projections of text and image into the joint space of a head; `()` if it has none."""
    joint = tuple(getattr(head, name, None) for name in ("text_proj", "vision_proj"))
    return joint if all(map(is_linear, joint)) else ()  # type: ignore[return-value]


def takes_regions(tower: Any) -> bool:
    """Return whether the last blocks of a tower attend within regions of the image (X-VLM)."""
    return "image_atts" in inspect.signature(type(tower).forward).parameters


def call_without_regions(module: Any, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse the regions of X-VLM, whose masks and rows are made for all patches before the first block runs.

    Raises:
        ValueError: the call brings regions; names the arguments, and the ways out.
    """
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if module._patchselect.plan.selects:
        tower = next(tower for tower in module._patchselect.towers if tower.module is module)
        refuse_masks(tower, {name: given.get(name) for name in ("image_atts", "idx_to_group_img")})
    return call_tower(module, name, original, *args, **kwargs)


def check_bridge(head: BertHead, width: int) -> None:
    """Raise a `TypeError` if texts of a head cannot reach towers of this width."""
    if head.width != width and not joint_of(head.module):
        raise TypeError(
            f"{type(head.module).__name__} reads text of width {head.width} and images of width {width} "
            "and has no text_proj and vision_proj to lift the one to the other: call patchselect.apply on its "
            f"vision tower and give guide() vectors of width {width}"
        )


class Albef(Adapter):
    """Heads with `visual_encoder` and `text_encoder` (and their momentum twins), and the bare `VisionTransformer`."""

    name = "albef"

    def towers(self, model: nn.Module) -> list[Tower]:
        found: list[Any] = [module for module in model.modules() if is_tower(module)]
        if not found:
            return []
        parts = head_parts(model, found, "ALBEF")
        if parts is None:
            return self.vit_towers(found, Reader())
        head = BertHead(**parts)
        check_bridge(head, found[0].norm.normalized_shape[0])
        return self.vit_towers(found, head)

    def vit_towers(self, found: list[Any], reader: Reader) -> list[Tower]:
        """Return each ViT of ALBEF's code taken apart, all with one reader."""
        return [
            Tower(
                adapter=self,
                module=tower,
                blocks=list(tower.blocks),
                num_prefix_tokens=1,
                has_class_token=True,
                width=tower.norm.normalized_shape[0],
                final_norm=tower.norm,
                reader=reader,
            )
            for tower in found
        ]

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        """Add what goes past `forward`: LAVIS calls its towers by `forward_features`; X-VLM's take regions."""
        named = [tower.module for tower in towers if hasattr(tower.module, "forward_features")]
        regional = [tower.module for tower in towers if takes_regions(tower.module)]
        return [
            *super().methods(model, towers),
            *((tower, {"forward_features": call_tower}) for tower in named),
            *((tower, {"forward": call_without_regions}) for tower in regional),
        ]

    def attend(self, tower: Tower, block: Any, x: Tensor, *register_hook: Any, **kwargs: Any) -> Attended:
        masks = {name: value for name, value in kwargs.items() if name != "register_hook" and value is not None}
        if masks and block._patchselect.plan.selects:
            refuse_masks(tower, masks)
        normed = block.norm1(x)
        if register_hook:
            kwargs["register_hook"] = register_hook[0]
        return Attended(self.residual(tower, block, x, block.attn(normed, **kwargs)), normed)

    def residual(self, tower: Tower, block: Any, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + block.drop_path(branch)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + block.drop_path(block.mlp(block.norm2(tokens)))

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        return Projections.packed(
            attention.qkv,
            attention.proj,
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.norm1,
            qkv=thirds(attention.qkv),
            out=functools.partial(out_of, attention),
            dropout=rate(getattr(attention, "attn_drop", None)),
        )

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        """Lift a text: as it is where its width is the image's (the published sizes), else through the joint space."""
        if self.text_width(tower) == tower.width:
            return text
        if not joint_of(tower.reader.module):
            raise ValueError(
                f"{type(tower.reader.module).__name__} reads text of width {self.text_width(tower)} and images of "
                f"width {tower.width} and has no text_proj and vision_proj to lift the one to the other: use "
                f'guidance="image", or call patchselect.apply on its vision tower and give guide() vectors of width '
                f"{tower.width}"
            )
        return self._through_joint(tower, text)

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        if not isinstance(tower.reader, BertHead):
            return through_norm(text, tower.final_norm)
        if not joint_of(tower.reader.module):
            name = type(tower.reader.module).__name__
            raise ValueError(f'relevance="values" needs a joint space, which this {name} does not have: use "keys"')
        return through_norm(self._through_joint(tower, text), tower.final_norm)

    def _through_joint(self, tower: Tower, text: Tensor) -> Tensor:
        into, out = map(matrix, joint_of(tower.reader.module))  # as they are now: LoRA may have come since `apply`
        return text.to(into.dtype) @ into.T @ out

    def grid(self, tower: Tower, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(x, tower.module.get_submodule("patch_embed.proj"))
