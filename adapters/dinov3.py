"""DINOv3's ViT of Hugging Face transformers: a plain ViT with rotary positions and registers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Arguments, Attended, Tower, Turn, bound
from patchselect.calls import refuse_extras

from .layouts import is_tower, rotary
from .plain import TransformersPlain
from .rotary import at, turning


class TransformersDinov3(TransformersPlain):
    """`DINOv3ViTModel` and its backbone. Cosines and sines of every patch come to each block.

    The class token and the registers have no place and are not turned; nor is a fused token.
    """

    name = "transformers-dinov3"

    def knows(self, module: Any) -> bool:
        return is_tower(module) and rotary(module)

    def towers(self, model: nn.Module) -> list[Tower]:
        found = super().towers(model)
        for tower in found:
            tower.rotary = True
        return found

    def attend_sized(self, tower: Tower, block: Any, sizes: Tensor, *args: Any, **kwargs: Any) -> Attended:
        given = bound(tower.parts["block_call"], args, kwargs)
        turn = self.turn(tower, block, **given)
        hidden = given.pop("hidden_states")
        refuse_extras((), {k: v for k, v in given.items() if k not in ("position_embeddings", "output_hidden_states")})
        return self.with_sizes(tower, block, sizes, hidden, turn=turn)

    def sample_call(self, tower: Tower, block: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = tokens.shape[1] - tower.num_prefix_tokens, tower.width // self.projections(block).num_heads
        angles = torch.linspace(0, 3, shape[0] * shape[1], device=tokens.device, dtype=tokens.dtype).view(shape)
        return (tokens,), {"position_embeddings": (angles.cos(), angles.sin())}

    def turn(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Turn | None:
        tables = bound(tower.parts["block_call"], args, kwargs).get("position_embeddings")
        return None if tables is None else turning(tables[1], tables[0], half=True)

    def at_places(self, tower: Tower, block: nn.Module, places: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        given = bound(tower.parts["block_call"], args, kwargs)
        cosine, sine = given["position_embeddings"]
        ones, zeros = cosine.new_ones(cosine.shape[-1]), cosine.new_zeros(cosine.shape[-1])
        given["position_embeddings"] = at(cosine, places, ones), at(sine, places, zeros)
        return (given.pop("hidden_states"),), given

    def own_patches(self, tower: Tower) -> int:
        rope: Any = tower.module.rope_embeddings
        return int(rope.num_patches_h * rope.num_patches_w)
