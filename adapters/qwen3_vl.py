"""Qwen3-VL of transformers: as Qwen2-VL, and layers of its language model read earlier layers of the tower (DeepStack).

What is read before a selection is gathered: a square that stays has its own feature, a fused one the mean of the
features of the squares that it was made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .qwen2_vl import Qwen2Vl


class Qwen3Vl(Qwen2Vl):
    """`Qwen3VLModel` and its head; positions in the image are learned, too, before the first block."""

    name = "transformers-qwen3-vl"
    reads = ("Qwen3VLModel",)

    def final_norm(self, visual: Any) -> nn.Module:
        return visual.merger.norm  # type: ignore[no-any-return]

    def mergers(self, visual: Any) -> list[nn.Module]:
        return [visual.merger, *visual.deepstack_merger_list]
