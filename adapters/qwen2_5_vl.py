"""Qwen2.5-VL of transformers: as Qwen2-VL, and most blocks of its tower attend in windows.

Tokens stand window by window. After a selection what is left of a window attends to itself, as before; the fused
squares of an image are a window of their own, since they are made of patches of many. Blocks with full attention see
each image whole, fused squares included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchselect.adapter import Tower

from .qwen2_vl import Qwen2Vl


class Qwen2Point5Vl(Qwen2Vl):
    """`Qwen2_5_VLModel` and its head."""

    name = "transformers-qwen2.5-vl"
    reads = ("Qwen2_5_VLModel",)

    def order(self, tower: Tower, grid: tuple[int, int]) -> Tensor:
        side, edge = tower.parts["side"], self._edge(tower)
        rows, columns = torch.arange(grid[0] // side), torch.arange(grid[1] // side)
        windows = rows.unsqueeze(1) // edge * len(columns) + columns // edge  # ascend as the windows of the host do
        return super().order(tower, grid).view(-1, side**2)[windows.flatten().argsort(stable=True)].flatten()

    def lengths(self, tower: Tower, block: nn.Module, rows: Tensor, counts: list[int], ends: Tensor) -> Tensor:
        images = super().lengths(tower, block, rows, counts, ends)
        if self._is_full(tower, next(index for index, each in enumerate(tower.blocks) if each is block)):
            return images
        image = torch.arange(len(counts), device=rows.device).repeat_interleave(images)
        window = torch.searchsorted(ends.to(rows.dtype), rows, right=True)
        return torch.where(rows < 0, len(ends) + 1 + image, window).unique_consecutive(return_counts=True)[1]

    def span(self, tower: Tower, index: int, tokens: int) -> int:
        whole = (self._edge(tower) * tower.parts["side"]) ** 2
        return tokens if self._is_full(tower, index) else min(tokens, whole)

    def _is_full(self, tower: Tower, index: int) -> bool:
        return index in tower.module.fullatt_block_indexes  # type: ignore[operator]

    def _edge(self, tower: Tower) -> int:
        """Return how many squares high and wide a window is."""
        visual = tower.module
        return int(visual.window_size // visual.spatial_merge_size // visual.patch_size)  # type: ignore[operator]
