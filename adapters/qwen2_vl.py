"""Qwen2-VL of transformers: images of any size packed into one sequence, with rotary positions in tower and prompt.

The tokens of 2 x 2 patches follow each other and are merged into one after the tower, so whole squares stay or go. In
the prompt a patch has three positions (time, height, width), which stay those of the whole image.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from patchselect.adapter import Arguments, Attended, Images, Tower, Turn, Wrapper, bound
from patchselect.prompts.calls import call_prompted, generate_prompted
from patchselect.prompts.encoded import takes_encoded
from patchselect.prompts.host import Prompted
from patchselect.prompts.packed import (
    call_merger,
    call_packed_features,
    raise_for_videos,
    refuse_videos,
    sources_in_prompt,
    uncompiled_tower,
)
from patchselect.weights import Projections, rate, thirds
from patchselect.wiring.journey import Journey

from .readers import check_release, core_of, names_of
from .rotary import turning
from .switches import advice_of_transformers

BLOCK_CALL = ("hidden_states", "cu_seqlens", "position_embeddings")
BLOCK_PARTS = {"norm1", "norm2", "attn", "mlp"}


class Qwen2Vl(Prompted):
    """`Qwen2VLModel` and its head."""

    name = "transformers-qwen2-vl"
    reads: tuple[str, ...] = ("Qwen2VLModel",)
    image_arguments = ("pixel_values", "image_grid_thw")
    squares_together = True
    renumbers = False

    def core(self, model: nn.Module) -> Any:
        return core_of(model)

    def towers(self, model: nn.Module) -> list[Tower]:
        core = core_of(model)
        if not set(names_of(core)) & set(self.reads):
            return []
        check_release(model, core)
        visual = core.visual
        if any({name for name, _ in block.named_children()} != BLOCK_PARTS for block in visual.blocks):
            raise TypeError(f"{type(model).__name__} cannot be patched: blocks of its tower have other parts")
        return [
            Tower(
                self, visual, list(visual.blocks), 0, False, visual.blocks[0].attn.proj.in_features, rotary=True,
                packed=True, final_norm=self.final_norm(visual), parts={"side": int(visual.spatial_merge_size)},
            )
        ]  # fmt: skip

    def final_norm(self, visual: Any) -> nn.Module:
        return visual.merger.ln_q

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        core: Any = core_of(model)
        inner: dict[str, Wrapper] = {"forward": call_prompted, "get_image_features": call_packed_features}
        found: list[tuple[nn.Module, Mapping[str, Wrapper]]] = [
            (core, {**inner, "get_video_features": refuse_videos}),
            (core.visual, {"forward": uncompiled_tower()}),
            *((merger, {"forward": call_merger}) for merger in self.mergers(core.visual)),
        ]
        if core is not model:
            outer: dict[str, Wrapper] = {"forward": call_prompted}
            found.append((model, {**outer, "generate": generate_prompted} if hasattr(model, "generate") else outer))
        return found

    def mergers(self, visual: Any) -> list[nn.Module]:
        """Return what joins the tokens of squares."""
        return [visual.merger]

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(BLOCK_CALL, args, kwargs)
        hidden_states = given.pop("hidden_states")
        normed = block.norm1(hidden_states)
        return Attended(hidden_states + block.attn(normed, **given), normed)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + block.mlp(block.norm2(tokens))

    def sample_call(self, tower: Tower, block: Any, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length, width = tokens.shape[-2], tower.width // block.attn.num_heads
        angles = torch.linspace(0, 3, length * width, device=tokens.device, dtype=torch.float32).view(length, width)
        ends = torch.tensor([0, length], dtype=torch.int32, device="cpu" if tokens.is_meta else tokens.device)
        return (tokens[0],), {"cu_seqlens": ends, "position_embeddings": (angles.cos(), angles.sin())}

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        return Projections.packed(
            attention.qkv,
            attention.proj,
            num_heads=attention.num_heads,
            scale=attention.scaling,
            norm=block.norm1,
            qkv=thirds(attention.qkv),
            out=attention.proj,
            dropout=rate(attention.attention_dropout),
        )

    # Packed images, and their places.

    def images(self, tower: Tower, *args: Any, **kwargs: Any) -> Images:
        grids: Tensor = bound(("hidden_states", "grid_thw"), args, kwargs)["grid_thw"]
        sizes = [(height, width) for frames, height, width in grids.tolist() for _ in range(frames)]
        return Images(sizes, padding=False)

    def order(self, tower: Tower, grid: tuple[int, int]) -> Tensor:
        side, places = tower.parts["side"], torch.arange(grid[0] * grid[1])
        return places.view(grid[0] // side, side, grid[1] // side, side).transpose(1, 2).flatten()

    def turn(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Turn | None:
        cosine, sine = bound(BLOCK_CALL, args, kwargs)["position_embeddings"]
        return turning(sine, cosine, half=True)

    def turn_of_rows(self, tower: Tower, block: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Turn:
        cosine, sine = (table[rows].unsqueeze(1) for table in bound(BLOCK_CALL, args, kwargs)["position_embeddings"])
        return turning(sine, cosine, half=True)

    def at_rows(
        self, tower: Tower, block: nn.Module, rows: Tensor, counts: list[int], *args: Any, **kwargs: Any
    ) -> Arguments:
        given = bound(BLOCK_CALL, args, kwargs)
        gone = (rows < 0).unsqueeze(-1)
        cosine, sine = (table[rows.clamp(min=0)] for table in given["position_embeddings"])
        given["position_embeddings"] = cosine.masked_fill(gone, 1), sine.masked_fill(gone, 0)
        lengths = self.lengths(tower, block, rows, counts, given["cu_seqlens"])
        given["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(given["cu_seqlens"])
        if "max_seqlen" in given:
            given["max_seqlen"] = None  # kernels that want it count again
        return (given.pop("hidden_states"),), given

    def lengths(self, tower: Tower, block: nn.Module, rows: Tensor, counts: list[int], ends: Tensor) -> Tensor:
        """Return how many tokens each piece has that attends to itself alone: here an image."""
        return torch.tensor(counts, device=ends.device)

    def grid(self, tower: Tower, images: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
        side = int(tower.module.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
        return (images.shape[-2] // side, images.shape[-1] // side) if images.dim() == 4 else None

    def own_patches(self, tower: Tower) -> None:
        return None

    def patch_embedding(self, tower: Tower) -> nn.Module:
        return tower.module.patch_embed.proj  # type: ignore[union-attr, return-value]

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_transformers(model, tower.module) or super().instead_of_reentry(model, tower)

    # The prompt.

    def side(self, core: Any) -> int:
        return int(core.visual.spatial_merge_size)

    def projector_of(self, core: Any) -> nn.Module:
        return core.visual.merger  # type: ignore[no-any-return]

    def left(self, core: Any, journeys: Sequence[Journey]) -> list[Tensor]:
        return [image for journey in journeys for image in sources_in_prompt(journey, self.side(core))]

    def sizes(self, tower: Tower, core: Any, given: Mapping[str, Any]) -> list[int]:
        grids, pixels = given.get("image_grid_thw"), given["pixel_values"]
        if given.get("pixel_values_videos") is not None:
            raise_for_videos(core)
        if grids is None or bool((grids[:, 0] != 1).any()) or int(grids.prod(dim=-1).sum()) != len(pixels):
            found = None if grids is None else grids.tolist()
            raise ValueError(
                f"image_grid_thw must be (images, 3) = one frame, height and width in patches of each image, and as "
                f"many patches as pixel_values has rows ({len(pixels)}); got {found}: give what the processor returns"
            )
        return [count // self.side(core) ** 2 for count in grids.prod(dim=-1).tolist()]

    def positions(self, core: Any, given: Mapping[str, Any], rows: int, length: int, device: Any) -> Tensor:
        if not hasattr(core, "compute_3d_position_ids"):  # up to transformers 4.57
            mask = given.get("attention_mask")
            mask = torch.ones(rows, length, dtype=torch.long, device=device) if mask is None else mask
            ids, grids = given.get("input_ids"), given.get("image_grid_thw")
            return core.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask)[0]  # type: ignore[no-any-return]
        parameters = inspect.signature(core.compute_3d_position_ids).parameters
        found = core.compute_3d_position_ids(**{name: given.get(name) for name in parameters})
        return super().positions(core, given, rows, length, device) if found is None else found

    def counted(self, model: nn.Module, given: Mapping[str, Any], positions: Tensor | None) -> Tensor | None:
        if not hasattr(model, "_prepare_position_ids_for_generation"):  # up to transformers 4.57
            return None
        kwargs = {name: value for name, value in given.items() if value is not None}
        prompt = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        return model._prepare_position_ids_for_generation(prompt, kwargs)  # type: ignore[operator, no-any-return]

    def settle(self, core: Any, cut: dict[str, Any]) -> Tensor | None:
        seen: Tensor = cut["attention_mask"] != 0
        positions: Tensor = cut["position_ids"]
        count = seen.long().cumsum(dim=-1)
        if positions.dim() == 2:
            return None
        if len(positions) == 4:  # the first are columns, by which masks are made
            positions = cut["position_ids"] = torch.cat([(count - 1).clamp(min=0)[None], positions[1:]])
        following = positions[-3:].amax(dim=0).masked_fill(~seen, -1).amax(dim=-1, keepdim=True) + 1
        ahead: Tensor = following - count[:, -1:]
        # Up to transformers 4.57 hosts go on from columns, padding included.
        core.rope_deltas = ahead if takes_encoded(core) else following - count.shape[1]
        return ahead
