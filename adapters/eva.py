"""timm's `Eva`: EVA, EVA-02, Perception Encoder, DINOv3 and ViTs with rotary positions; alone, and in open_clip."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Arguments, Attended, Tower, Turn, bound
from patchselect.weights import Projections, held, is_linear, present, rate
from patchselect.wiring.wording import refuse_masks

from .open_clip import OpenClipTimm
from .rotary import at, turning
from .timm import TimmViT, out_of, prefix_of

BLOCK_PARTS = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
CALL = ("x", "rope", "attn_mask", "is_causal")


def why_not(trunk: Any, embedding: str = "patch_embed") -> str | None:
    """Return what of `trunk` keeps it from being an `Eva`, in words; `None` if it is one."""
    blocks: Any = getattr(trunk, "blocks", None)
    listed = isinstance(blocks, (nn.ModuleList, nn.Sequential))
    if prefix_of(trunk) is None or not hasattr(trunk, embedding) or not listed:
        return "it is not a vision transformer of plain blocks"
    for block in blocks:
        if {name for name, _ in block.named_children()} != BLOCK_PARTS:
            return f"its blocks ({type(block).__name__}) are not those of Eva"
        if getattr(block.attn, "num_kv_groups", 1) != 1:
            return "several of its query heads share one key head"
        if not is_linear(getattr(block.attn, "qkv", None)) and not is_linear(getattr(block.attn, "q_proj", None)):
            return f"its attention ({type(block.attn).__name__}) has no query, key and value layers"
    return None


def scale_of(block: Any, name: str) -> Tensor | None:
    """Return the LayerScale of a branch."""
    return None if getattr(block, name, None) is None else held(block, name)


def normalises_before(block: Any) -> bool:
    """Tell blocks that normalise what attention and MLP read from those (EVA02-E) that normalise what they give."""
    return hasattr(block, "gamma_1")


def why_not_linear(block: Any) -> str | None:
    """Say what keeps the output of an attention from being linear in its values; `None` if it is."""
    if getattr(block.attn, "gate", None) is not None:
        return "its attention output is gated"
    if present(getattr(block.attn, "norm", None)) or not normalises_before(block):
        return "its attention output is normalised"
    return None


class TimmEva(TimmViT):
    """`timm.models.eva.Eva` alone. A table of sines and cosines comes to each block, which turns queries and keys.

    Prefix tokens have no place and are not turned; nor is a fused token, which stands for patches from everywhere.
    """

    name = "timm-eva"

    def why_not(self, trunk: nn.Module) -> str | None:
        return why_not(trunk, self.embedding)

    def tower(self, trunk: Any) -> Tower:
        tower = super().tower(trunk)
        tower.rotary = getattr(trunk, "rope", None) is not None
        return tower

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(CALL, args, kwargs)
        refuse_masks(tower, {name: given.get(name) for name in CALL[2:]})
        normed = block.norm1(given["x"]) if normalises_before(block) else given["x"]
        return Attended(self.residual(tower, block, given["x"], block.attn(normed, rope=given.get("rope"))), normed)

    def attend_sized(self, tower: Tower, block: Any, sizes: Tensor, *args: Any, **kwargs: Any) -> Attended:
        given = bound(CALL, args, kwargs)
        refuse_masks(tower, {name: given.get(name) for name in CALL[2:]})
        return self.with_sizes(tower, block, sizes, given["x"], turn=self.turn(tower, block, *args, **kwargs))

    def residual(self, tower: Tower, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        if not normalises_before(block):
            return hidden + block.drop_path1(block.norm1(attended))
        return hidden + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        if not normalises_before(block):
            return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
        added = block.mlp(block.norm2(tokens))
        return tokens + block.drop_path2(added if block.gamma_2 is None else block.gamma_2 * added)

    def sample_call(self, tower: Tower, block: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not tower.rotary:
            return (tokens,), {}
        weights = self.projections(block)
        shape = tokens.shape[1] - tower.num_prefix_tokens, weights.query.shape[0] // weights.num_heads
        angles = torch.linspace(0, 3, shape[0] * shape[1], device=tokens.device, dtype=tokens.dtype).view(shape)
        return (tokens,), {"rope": torch.cat([angles.sin(), angles.cos()], dim=-1)}

    def turn(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Turn | None:
        table = bound(CALL, args, kwargs).get("rope")
        if table is None:
            return None
        sines, cosines = table.chunk(2, dim=-1)
        return turning(sines, cosines, getattr(block.attn, "rotate_half", False))

    def at_places(self, tower: Tower, block: nn.Module, places: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        given = bound(CALL, args, kwargs)
        table: Tensor | None = given.get("rope")
        if table is not None:
            width = table.shape[-1] // 2
            nowhere = torch.cat([table.new_zeros(width), table.new_ones(width)])  # sines, cosines
            given["rope"] = at(table, places, nowhere)
        return (given.pop("x"),), given

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        normalised, gated = present(getattr(attention, "k_norm", None)), getattr(attention, "gate", None) is not None
        before = normalises_before(block)
        more: dict[str, Any] = dict(
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.norm1 if before else nn.Identity(),
            output_scale=scale_of(block, "gamma_1"),
            query_norm=attention.q_norm if normalised else None,
            key_norm=attention.k_norm if normalised else None,
            nonlinear_values=why_not_linear(block),
            out=None if gated else functools.partial(out_of, attention),
            dropout=rate(attention.attn_drop),
        )
        if attention.qkv is None:
            return Projections.separate(attention.q_proj, attention.k_proj, attention.v_proj, attention.proj, **more)
        found = Projections.packed(attention.qkv, attention.proj, **more)
        if getattr(attention, "q_bias", None) is not None:
            found.query_bias, found.key_bias = held(attention, "q_bias"), held(attention, "k_bias")
            bias = torch.cat([found.query_bias, found.key_bias, held(attention, "v_bias")])
            found.qkv = lambda normed: (attention.qkv(normed) + bias).chunk(3, dim=-1)
        return found


class OpenClipEva(OpenClipTimm, TimmEva):
    """EVA-CLIP, EVA-02-CLIP and PE-Core as open_clip loads them.

    Where attention output is normalised or gated (EVA-02), it cannot be read backwards, and `joint` is the default.
    """

    name = "open_clip-eva"

    def relevance_for(self, tower: Tower) -> str:
        return "values" if all(why_not_linear(block) is None for block in tower.blocks) else "joint"
