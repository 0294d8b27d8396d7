"""How plain ViTs of Hugging Face transformers are laid out, family by family and release by release.

The tables hold what the families call their parts; a module whose parts have other names is none of them.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from patchselect.weights import is_linear

NORMS = (
    ("layernorm_before", "layernorm_after"),  # ViT, DeiT, ViT-MSN, I-JEPA, FLAVA, ViTMAE
    ("norm1", "norm2"),  # DINOv2, DINOv3, TIPSv2
    ("rms_norm1", "rms_norm2"),  # AIMv2
)
MLPS = (
    {"intermediate", "output"},  # ViT and its kin before transformers 5, FLAVA
    {"mlp"},  # the others
    {"ffn"},  # AIMv2
)
ATTENTION_PARTS = {"query", "key", "value", "dropout", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj"}
AROUND_BRANCHES = {"layer_scale1", "layer_scale2", "drop_path", "drop_path1", "drop_path2", "dropout"}
FINAL_NORMS = ("layernorm", "norm", "rms_norm")
EMBEDDING_PARTS = {"patch_embeddings", "patch_embed", "dropout", "rms_norm", "position_embedding"}
EMBEDDING_TOKENS = {"cls_token", "distillation_token", "register_tokens", "mask_token", "position_embeddings"}
TOWER_PARTS = {"embeddings", "encoder", "model", "layer", "layers", "pooler", "head", "rope_embeddings", "dropout"}


def blocks_of(module: Any) -> list[Any]:
    """Return the blocks of a tower, wherever its release keeps them."""
    for holder in (module, getattr(module, "encoder", None), getattr(module, "model", None)):
        for name in ("layer", "layers"):
            blocks = getattr(holder, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks):
                return list(blocks)
    return []


def linears_of(attention: Any) -> list[Any]:
    """Return query, key, value and output layers of an attention, of any release; `[]` if there are none."""
    inner, output = getattr(attention, "attention", None), getattr(attention, "output", None)
    if {name for name, _ in getattr(inner, "named_children", attention.named_children)()} - ATTENTION_PARTS:
        return []
    if inner is not None:
        found = [getattr(inner, name, None) for name in ("query", "key", "value")] + [getattr(output, "dense", None)]
    else:
        found = [getattr(attention, f"{name}_proj", None) for name in "qkv"]
        found.append(getattr(attention, "o_proj", getattr(attention, "out_proj", None)))
    return found if all(map(is_linear, found)) else []


def norms_of(block: Any) -> tuple[Any, Any] | None:
    """Return the norms before attention and MLP of a block that is laid out as the plain ones; `None` of any other."""
    parts = {name for name, _ in block.named_children()}
    if any(True for _ in block.parameters(recurse=False)) or in_windows(block):
        return None
    for names in NORMS:
        if parts - AROUND_BRANCHES in [{*names, "attention", *mlp} for mlp in MLPS] and linears_of(block.attention):
            return getattr(block, names[0]), getattr(block, names[1])
    return None


def in_windows(block: Any) -> bool:
    """Tell whether a row of the batch is a window of an image, in this block or in the next (RF-DETR)."""
    return any("window" in name for name in vars(block))


def patches_of(embeddings: Any) -> nn.Conv2d | None:
    """Return the convolution that cuts the image into patches, if nothing else does."""
    cut = getattr(embeddings, "patch_embeddings", getattr(embeddings, "patch_embed", None))
    found = list(cut.children()) if isinstance(cut, nn.Module) and not isinstance(cut, nn.Conv2d) else [cut]
    return found[0] if len(found) == 1 and isinstance(found[0], nn.Conv2d) else None


def final_norm_of(module: Any) -> nn.Module | None:
    found = (getattr(module, name, None) for name in FINAL_NORMS)
    return next((norm for norm in found if norm is not None), None)


def is_tower(module: Any) -> bool:
    embeddings, blocks = getattr(module, "embeddings", None), blocks_of(module)
    if not blocks or not isinstance(embeddings, nn.Module) or patches_of(embeddings) is None:
        return False
    if {name for name, _ in module.named_children()} - TOWER_PARTS - {*FINAL_NORMS}:
        return False  # somebody in it may read a dense grid: segmentation (EoMT)
    known = {name for name, _ in embeddings.named_children()} <= EMBEDDING_PARTS
    known = known and {name for name, _ in embeddings.named_parameters(recurse=False)} <= EMBEDDING_TOKENS
    known = known and "pixel_values" in inspect.signature(module.forward).parameters
    return known and final_norm_of(module) is not None and all(norms_of(block) is not None for block in blocks)


def rotary(module: Any) -> bool:
    return getattr(module, "rope_embeddings", None) is not None


def num_prefix(embeddings: Any) -> int:
    tokens = (getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens"))
    return sum(token.shape[1] for token in tokens if token is not None)
