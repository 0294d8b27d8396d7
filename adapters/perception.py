"""Perception Encoder of Meta's perception_models (`core.vision_encoder.pe`): its `CLIP`, and its tower alone.

Each attention of a tower turns queries and keys by angles for the whole grid, which the tower keeps from its call.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchselect.adapter import Arguments, Attended, Tower, Turn, patch_grid
from patchselect.compat import fused_attention
from patchselect.weights import Projections, held, pool_cost, through_norm
from patchselect.wiring.text_calls import Original

from .joint import into_joint, joint_width, out_of_joint, pooled_alone, through_pool
from .open_clip import Paired
from .rotary import at, turning

BLOCK_PARTS = {"attn", "ls_1", "ls_2", "ln_1", "ln_2", "drop_path1", "drop_path2", "mlp"}


def is_tower(module: Any) -> bool:
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(module, "pool_type"):
        return False
    return all(
        {name for name, _ in block.named_children()} == BLOCK_PARTS
        and hasattr(block.attn, "in_proj_weight")
        and hasattr(getattr(block.attn, "rope", None), "update_grid")
        for block in blocks
    )


def attention_at(attention: Any, x: Tensor, angles: Tensor) -> Tensor:
    """Run an attention with angles `(B, 1, n, E)` of the patches that are left, where the grid's own do not fit.

    Raises:
        ValueError: somebody has hooked the attention, which is not called as a module here.
    """
    if attention._forward_hooks or attention._forward_pre_hooks:
        raise ValueError(
            f"the {type(attention).__name__} of a block after the first selection has hooks, which would not be "
            "called: its tower turns by angles of the whole grid alone. Hook the block, or attn.out_proj"
        )
    turn = turning(angles.sin(), angles.cos(), half=False)
    whole = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (part.unflatten(-1, (attention.num_heads, -1)) for part in whole.chunk(3, dim=-1))
    query, key, value = (part.transpose(1, 2) for part in (turn(query), turn(key), value))
    read = fused_attention(query, key, value, mask=None, scale=attention.scale, dropout=0.0)
    return attention.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PerceptionEncoder(Paired):
    """`CLIP` and `VisionTransformer` of perception_models, whatever they pool by."""

    name = "perception-encoder"

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", model)
        if not is_tower(visual):
            return []
        return [
            Tower(
                adapter=self,
                module=visual,
                blocks=list(visual.transformer.resblocks),
                num_prefix_tokens=int(visual.use_cls_token),
                has_class_token=visual.use_cls_token,
                width=visual.width,
                rotary=True,
                final_norm=visual.ln_post,
            )
        ]

    def attend(
        self, tower: Tower, block: Any, x: Tensor, attn_mask: Any = None, angles: Tensor | None = None
    ) -> Attended:
        normed = block.ln_1(x)
        branch = block.attn(normed) if angles is None else attention_at(block.attn, normed, angles)
        return Attended(self.residual(tower, block, x, branch), normed)

    def attend_sized(self, tower: Tower, block: Any, sizes: Tensor, *args: Any, **kwargs: Any) -> Attended:
        return self.with_sizes(tower, block, sizes, args[0], turn=self.turn(tower, block, *args, **kwargs))

    def residual(self, tower: Tower, block: Any, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + block.drop_path1(block.ls_1(branch))

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + block.drop_path2(block.ls_2(block.mlp(block.ln_2(tokens))))

    def run(self, tower: Tower, block: nn.Module, original: Original, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("angles") is None:
            return original(*args, **kwargs)
        return self.finish(tower, block, self.attend(tower, block, *args, **kwargs).tokens, None)

    def sample_call(self, tower: Tower, block: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        block.attn.rope.update_grid(tokens.device, tokens.shape[1] - tower.num_prefix_tokens, 1)
        return (tokens,), {}

    def _angles(self, tower: Tower, block: Any) -> Tensor:
        """Return `(n, E)` of the grid that the tower is called with."""
        return block.attn.rope.freq[0, tower.num_prefix_tokens :]  # type: ignore[no-any-return]

    def turn(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Turn:
        given = kwargs.get("angles")
        angles = self._angles(tower, block) if given is None else given
        return turning(angles.sin(), angles.cos(), half=False)

    def at_places(self, tower: Tower, block: nn.Module, places: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        angles = self._angles(tower, block)
        return args[:1], {"angles": at(angles, places, angles.new_zeros(angles.shape[-1]))}

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        return Projections.fused(
            held(attention, "in_proj_weight"),
            held(attention, "in_proj_bias"),
            output=held(attention.out_proj, "weight"),
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.ln_1,
            output_scale=held(block.ls_1, "gamma") if hasattr(block.ls_1, "gamma") else None,
            out=attention.out_proj,
        )

    def pooling_cost(self, tower: Tower) -> tuple[int, int]:
        return pool_cost(tower.module.attn_pool)  # type: ignore[arg-type]

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        return None if tower.module.pool_type == "tok" else "this model pools or returns all tokens"

    def text_width(self, tower: Tower) -> int:
        return joint_width(tower.module, tower.width)

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        return out_of_joint(tower.module, text)

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        pool: Any = tower.module.attn_pool
        text = self.lift(tower, text)
        return through_norm(text if pool is None else through_pool(pool.attn, text), tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        visual: Any = tower.module
        normed = visual.ln_post(patches)
        if visual.attn_pool is not None:
            normed = pooled_alone(visual.attn_pool, normed).squeeze(2)
        return into_joint(visual, normed)

    def grid(self, tower: Tower, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(x, tower.module.get_submodule("conv1"))
