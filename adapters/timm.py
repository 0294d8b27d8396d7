"""timm's plain `VisionTransformer`: class token, register tokens, average or attention pooling.

Guidance by text takes vectors of the vision width: a timm tower has no text side of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, Tower, Wrapper
from patchselect.weights import (
    Projections,
    held,
    is_linear,
    matrix,
    pool_cost,
    present,
    rate,
    thirds,
    through_norm,
)
from patchselect.wiring.journey import call_tower
from patchselect.wiring.text_calls import Original
from patchselect.wiring.wording import refuse_masks

from .joint import pooled_alone
from .switches import advice_of_set_grad_checkpointing

BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}


OLD_BLOCK_PARTS = {"norm1", "attn", "drop_path", "norm2", "mlp"}
"""Before timm 0.6."""


def prefix_of(trunk: Any) -> Any:
    """Return the number of prefix tokens; before timm 0.8 it had another name."""
    return getattr(trunk, "num_prefix_tokens", getattr(trunk, "num_tokens", None))


def branch(block: Any, number: int, x: Tensor) -> Tensor:
    """Apply LayerScale and stochastic depth of one branch."""
    if hasattr(block, "drop_path"):
        return block.drop_path(x)
    return getattr(block, f"drop_path{number}")(getattr(block, f"ls{number}")(x))


def out_of(attention: Any, heads: Tensor) -> Tensor:
    """Return the output of an attention of timm (or ALBEF: it has no norm), from what its heads read, `(B, N, D)`."""
    branch = attention.proj(attention.norm(heads) if present(getattr(attention, "norm", None)) else heads)
    return attention.proj_drop(branch) if hasattr(attention, "proj_drop") else branch


def why_not(trunk: nn.Module, embedding: str = "patch_embed") -> str | None:
    """Say what of `trunk` keeps it from being a plain ViT of timm; `None` if it is one."""
    blocks: Any = getattr(trunk, "blocks", None)
    if (
        prefix_of(trunk) is None
        or not hasattr(trunk, embedding)
        or not isinstance(blocks, (nn.Sequential, nn.ModuleList))
    ):
        return "it is not a vision transformer of plain blocks"
    if getattr(trunk, "rope", None) is not None:
        return "it uses rotary positions per patch"
    for block in blocks:
        if {name for name, _ in block.named_children()} not in (BLOCK_PARTS, OLD_BLOCK_PARTS) or not hasattr(
            block.attn, "qkv"
        ):
            return f"its blocks ({type(block).__name__}) are not plain pre-norm attention blocks"
        if hasattr(block.attn, "lambda_q1"):
            return f"its attention ({type(block.attn).__name__}) is the difference of two"
        if getattr(block.attn, "rel_pos", None) is not None or hasattr(block.attn, "relative_position_bias_table"):
            return "its attention has relative positions per patch"
    if getattr(trunk, "shared_rel_pos", None) is not None:
        return "its attention has relative positions per patch"
    return None


def refuse_grid(module: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse `forward_intermediates` in NCHW: it reshapes tokens to a dense grid, which a shorter sequence corrupts.

    Raises:
        ValueError: the call asks for a grid; names the ways out.
    """
    given = inspect.signature(original).bind(*args, **kwargs)
    wanted = given.arguments.get("output_fmt", "NCHW")
    if wanted != "NLC" and module._patchselect.plan.selects:  # type: ignore[union-attr]
        raise ValueError(
            f"{type(module).__name__}.{name}(output_fmt={wanted!r}) reshapes the tokens to a dense grid, but selection "
            'removed some: use output_fmt="NLC", or handle.record() and patchselect.restore(tokens, trace)'
        )
    return call_tower(module, name, original, *args, **kwargs)


def partial_methods(trunk: nn.Module) -> dict[str, Wrapper]:
    """Return methods that run the blocks of a tower without its `forward`."""
    methods: dict[str, Wrapper] = {"forward_intermediates": refuse_grid, "forward_features": call_tower}
    return {name: wrapper for name, wrapper in methods.items() if hasattr(trunk, name)}


class TimmViT(Adapter):
    """`timm.models.vision_transformer.VisionTransformer` alone, or in a `TimmWrapperModel` of transformers."""

    name = "timm"
    embedding = "patch_embed"
    """What the part is called that makes tokens of pixels."""

    def towers(self, model: nn.Module) -> list[Tower]:
        model = getattr(
            model, "timm_model", model
        )  # transformers' TimmWrapperModel and TimmWrapperForImageClassification
        reason = self.why_not(model)
        if not type(model).__module__.startswith("timm.") and reason is not None:
            return []
        if reason is not None:
            raise TypeError(f"{type(model).__name__} cannot be patched: {reason}")
        return [self.tower(model)]

    def why_not(self, trunk: nn.Module) -> str | None:
        """Return what keeps `trunk` from being a tower of this family, in words; `None` if it is one."""
        return why_not(trunk, self.embedding)

    def tower(self, trunk: Any) -> Tower:
        return Tower(
            adapter=self,
            module=trunk,
            blocks=list(trunk.blocks),
            num_prefix_tokens=prefix_of(trunk),
            has_class_token=getattr(trunk, "cls_token", None) is not None,
            width=trunk.embed_dim,
            final_norm=trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm,
        )

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        return [(tower.module, partial_methods(tower.module)) for tower in towers]

    def attend(
        self, tower: Tower, block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Attended:
        refuse_masks(tower, {"attn_mask": attn_mask, "is_causal": is_causal})
        normed = block.norm1(x)
        return Attended(self.residual(tower, block, x, block.attn(normed)), normed)

    def residual(self, tower: Tower, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        return hidden + branch(block, 1, attended)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + branch(block, 2, block.mlp(block.norm2(tokens)))

    def pooling_cost(self, tower: Tower) -> tuple[int, int]:
        return pool_cost(getattr(tower.module, "attn_pool", None))

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        trunk: Any = tower.module
        by_token = getattr(trunk, "global_pool", "token") == "token" and getattr(trunk, "attn_pool", None) is None
        return None if by_token else "this model pools over all patches"

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_set_grad_checkpointing(tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        normalised = present(getattr(attention, "k_norm", None))
        nonlinear = None
        if present(getattr(attention, "norm", None)):
            nonlinear = "its attention output is normalised"
        elif getattr(attention, "gate", None) is not None:
            nonlinear = "its attention output is gated"
        return Projections.packed(
            attention.qkv,
            attention.proj,
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.norm1,
            output_scale=held(block.ls1, "gamma") if hasattr(getattr(block, "ls1", None), "gamma") else None,
            query_norm=attention.q_norm if normalised else None,
            key_norm=attention.k_norm if normalised else None,
            nonlinear_values=nonlinear,
            qkv=thirds(attention.qkv),
            out=None if getattr(attention, "gate", None) is not None else functools.partial(out_of, attention),
            dropout=rate(attention.attn_drop),
        )

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        pool: Any = getattr(tower.module, "attn_pool", None)
        if pool is None:
            return through_norm(text, tower.final_norm)
        if not hasattr(pool, "kv") or not is_linear(pool.proj):
            raise ValueError(f'relevance="values" cannot read {type(pool).__name__} backwards; use relevance="keys"')
        value = matrix(pool.kv).chunk(2)[1]
        return through_norm(text.to(value.dtype) @ matrix(pool.proj) @ value, tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        trunk: Any = tower.module
        normed = tower.final_norm(patches)  # type: ignore[misc]
        if getattr(trunk, "attn_pool", None) is None:
            return normed
        return pooled_alone(trunk.attn_pool, normed)

    def grid(self, tower: Tower, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        embed: Any = tower.module.patch_embed
        if hasattr(embed, "dynamic_feat_size"):
            height, width = embed.dynamic_feat_size(tuple(x.shape[-2:]))
        else:
            height, width = x.shape[-2] // embed.patch_size[0], x.shape[-1] // embed.patch_size[1]
        return int(height), int(width)
