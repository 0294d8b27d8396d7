"""The vision encoder that `resolution` and `last_block` measure: a ViT-B/16 of real size, and one call of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import patchselect


def vit(size: int, depth: int = 12) -> nn.Module:
    """Build a ViT-B/16 of real size with random weights, as in CLIP and (up to its norms) in ALBEF."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=depth, num_attention_heads=12, patch_size=16,
        image_size=size, projection_dim=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(config).eval()


def call_of(model: nn.Module, batch: int, size: int, guided: bool, device: torch.device | None) -> Callable[[], Any]:
    """Run one forward; without a device its inputs are made inside of it, as the FLOP counter wants."""
    home = device or torch.device("cpu")

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch, 3, size, size, device=home), torch.zeros(batch, 512, device=home)

    ready = None if device is None else (torch.randn_like(made()[0]), torch.randn_like(made()[1]))

    def call() -> None:
        images, text = ready or made()
        with torch.no_grad():
            if guided:
                with patchselect.guide(model, text):
                    model(images, interpolate_pos_encoding=True)
            else:
                model(images, interpolate_pos_encoding=True)

    return call
