"""timm's `NaFlexVit`, alone and in open_clip: images of several sizes in one batch, cut into patches, or pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Arguments, Attended, Images, Tower, Wrapper, bound
from patchselect.compat import is_compiling
from patchselect.wiring.journey import call_tower, parts_of_call
from patchselect.wiring.padding import knows_padding, mask_over, real_tokens
from patchselect.wiring.text_calls import Original
from patchselect.wiring.wording import refuse_masks

from .eva import OpenClipEva, TimmEva
from .open_clip import OpenClipTimm
from .timm import TimmViT, refuse_grid

BLOCK_CALLS = {True: ("x", "rope", "attn_mask", "is_causal"), False: ("x", "attn_mask", "is_causal")}
"""What blocks of `Eva`, and plain ones, are called with."""


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `patches`, `patch_coord`, `patch_valid` and `attn_mask` of a call, in a mapping or one by one."""
    given = bound(("x", "patch_coord", "patch_valid", "attn_mask"), args, kwargs)
    x = given.pop("x", given.get("patches"))
    return {**given, **x} if isinstance(x, Mapping) else {**given, "patches": x}


def images_in(coord: Tensor, valid: Tensor | None) -> Images:
    """Return the images of patches at `coord` `(B, N, 2)`, of which `valid` `(B, N)` are no padding.

    Raises:
        ValueError: they are not row by row, in front of the padding.
    """
    valid = torch.ones_like(coord[..., 0], dtype=torch.bool) if valid is None else valid.bool()
    height, width = (coord.masked_fill(~valid[..., None], -1).amax(dim=1) + 1).unbind(dim=1)
    places = torch.arange(coord.shape[1], device=coord.device)
    ordered = (coord[..., 0] * width[:, None] + coord[..., 1] == places) | ~valid
    if not bool((ordered & (valid == (places < (height * width)[:, None]))).all()):
        raise ValueError(
            "patch_coord and patch_valid of this batch do not show all patches of each image, row by row and in front "
            "of the padding: give what timm's NaFlexCollator returns of whole images"
        )
    return Images(list(zip(height.tolist(), width.tolist())), padding=not bool(valid.all()))


def call_features(trunk: Any, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Leave out a mask that hides nothing, and return which of the tokens that are left are no padding.

    A compiled graph cannot look at the mask, and its first selecting block refuses it.
    """
    given = given_to(args, kwargs)
    if given.get("patch_coord") is None or not trunk._patchselect.plan.selects:
        return call_tower(trunk, name, original, *args, **kwargs)
    tower, valid = trunk._patchselect.towers[0], given.get("patch_valid")
    refuse_masks(tower, {"attn_mask": given.get("attn_mask")})
    if valid is not None and not is_compiling() and bool(valid.all()):
        given["patch_valid"] = None

    def run(**given: Any) -> dict[str, Tensor]:
        found = original(**given)
        tokens, parts = found["patches"], parts_of_call(tower)
        real = torch.ones_like(tokens[..., 0], dtype=torch.bool) if parts is None else real_tokens(parts, tower, tokens)
        return {**found, "patch_valid": real[:, tower.num_prefix_tokens :]}

    return call_tower(trunk, name, run, **given)


def call_intermediates(trunk: Any, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse intermediates of patches that are cut already, whose one mask cannot fit tokens before and after."""
    if trunk._patchselect.plan.selects and given_to(args[:1], kwargs).get("patch_coord") is not None:
        raise ValueError(
            f"{type(trunk).__name__}.{name} returns one patch_valid for tokens of several blocks, of which selection "
            "removed some: call the model with handle.record(), and patchselect.restore(tokens, trace)"
        )
    return refuse_grid(trunk, name, original, *args, **kwargs)


class Naflex(TimmViT):
    """What a `NaFlexVit` is asked beside what its blocks are asked."""

    embedding = "embeds"
    of_eva = False
    """Whether its blocks are those of `Eva`: rotary positions, gated MLPs."""

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", model)
        trunk = getattr(visual, "trunk", getattr(visual, "timm_model", visual))
        blocks = getattr(trunk, "blocks", None)
        if not hasattr(trunk, self.embedding) or not isinstance(blocks, nn.Sequential) or not len(blocks):
            return []
        return super().towers(model) if hasattr(blocks[0], "gamma_1") == self.of_eva else []

    def tower(self, trunk: Any) -> Tower:
        tower = super().tower(trunk)
        tower.padded, tower.has_class_token = True, trunk.has_class_token
        return tower

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        own: Mapping[str, Wrapper] = {"forward_features": call_features, "forward_intermediates": call_intermediates}
        others = [(part, found) for part, found in super().methods(model, towers) if part is not towers[0].module]
        return [*others, (towers[0].module, own)]

    def images(self, tower: Tower, *args: Any, **kwargs: Any) -> Images | None:
        given = given_to(args, kwargs)
        if given.get("patch_coord") is None or is_compiling():
            return None
        found, trunk = images_in(given["patch_coord"], given.get("patch_valid")), tower.module
        if found.padding and trunk.training and getattr(trunk, "patch_drop", None) is not None:
            raise ValueError(
                f"{type(trunk).__name__} drops patches of a padded batch, padding and patches alike, so that nobody "
                "knows how many an image has left: build it with patch_drop_rate=0, or batch images of one size"
            )
        return found if found.padding or len(set(found.sizes)) > 1 else None

    def fit_masks(self, tower: Tower, block: nn.Module, real: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        given = bound(BLOCK_CALLS[self.of_eva], args, kwargs)
        if given.get("attn_mask") is not None:
            given["attn_mask"] = mask_over(real, given["attn_mask"])
        return (given.pop("x"),), given

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(BLOCK_CALLS[self.of_eva], args, kwargs)
        mask = given.get("attn_mask")
        if mask is not None and block._patchselect.plan.selects and not knows_padding(tower):
            refuse_masks(tower, {"attn_mask": mask})
        refuse_masks(tower, {"is_causal": given.get("is_causal")})
        more = {name: given[name] for name in ("rope", "attn_mask") if given.get(name) is not None}
        normed = block.norm1(given["x"])
        return Attended(self.residual(tower, block, given["x"], block.attn(normed, **more)), normed)

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        if hasattr(model, "encode_image") and kwargs.get("patch_coord") is not None:
            images, kwargs = {"patches": images, **kwargs}, {}
        return super().encode_images(model, tower, images, **kwargs)

    def patch_embedding(self, tower: Tower) -> nn.Module | None:
        return tower.module.embeds.proj  # type: ignore[union-attr, return-value]

    def own_patches(self, tower: Tower) -> int | None:
        grid: Any = tower.module.embeds.pos_embed_grid_size  # type: ignore[union-attr]
        return None if grid is None else int(grid[0] * grid[1])

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> tuple[int, int]:
        given = given_to(args, kwargs)
        if given.get("patch_coord") is not None:
            return images_in(given["patch_coord"], given.get("patch_valid")).sizes[0]
        height, width = tower.module.embeds.dynamic_feat_size(tuple(given["patches"].shape[-2:]))  # type: ignore
        return int(height), int(width)


class TimmNaflex(Naflex):
    """`timm.models.naflexvit.NaFlexVit` of plain blocks."""

    name = "timm-naflex"


class TimmNaflexEva(Naflex, TimmEva):
    """One of EVA's blocks, where every image has its own table of sines and cosines."""

    name = "timm-naflex-eva"
    of_eva = True


class OpenClipNaflex(Naflex, OpenClipTimm):
    """SigLIP 2 NaFlex and others of open_clip, whose images are what timm's collator returns, or pixels."""

    name = "open_clip-naflex"


class OpenClipNaflexEva(Naflex, OpenClipEva):
    """The same on EVA's blocks."""

    name = "open_clip-naflex-eva"
    of_eva = True
