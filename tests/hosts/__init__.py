"""The table of supported hosts: real classes of each package, tiny, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from since import SLOW
from torch import Tensor

from . import of_doubles, of_open_clip, of_plain, of_prompts, of_transformers
from .case import Case, ids
from .of_open_clip import vision_transformer
from .of_transformers import VISION, clip_config

__all__ = [
    "HOSTS",
    "PROMPTED",
    "VISION",
    "Case",
    "build",
    "clip_config",
    "ids",
    "of_dtype",
    "take",
    "texts",
    "vision_transformer",
]

HOSTS: dict[str, Callable[[], Case]] = {
    builder.__name__: builder
    for builder in (
        of_transformers.clip,
        of_transformers.chinese_clip,
        of_transformers.alt_clip,
        of_transformers.metaclip2,
        of_transformers.siglip,
        of_transformers.siglip2,
        of_transformers.clip_vision,
        of_transformers.clip_vision_projected,
        of_open_clip.open_clip,
        of_open_clip.open_clip_custom_average,
        of_open_clip.open_clip_pooler,
        of_open_clip.open_clip_normalised_keys,
        of_open_clip.coca,
        of_open_clip.open_clip_siglip,
        of_open_clip.timm_class_token,
        of_open_clip.timm_registers,
        of_open_clip.timm_average,
        of_doubles.openai_clip,
        of_doubles.albef,
        of_doubles.albef_tower,
        of_doubles.mplug,
        of_doubles.meter,
        of_transformers.blip,
        of_plain.vit,
        of_plain.dinov2_registers,
        of_plain.dinov3,
        of_open_clip.timm_eva02,
    )
}
SELDOM: dict[str, Callable[[], Case]] = {
    builder.__name__: builder
    for builder in (
        of_plain.dual_encoder,
        of_open_clip.open_clip_perception,
        of_open_clip.timm_naflex,
        of_open_clip.timm_naflex_rotary,
        of_open_clip.open_clip_naflex,
        of_doubles.perception,
        of_doubles.meter_tower,
        of_doubles.lavis_clip_vit,
    )
}
"""Hosts whose blocks are those of others above: every promise is tested on them with PATCHSELECT_SLOW=1."""
if SLOW:
    HOSTS.update(SELDOM)
PROMPTED: dict[str, Callable[[], Case]] = {
    builder.__name__: builder
    for builder in (
        of_prompts.llava,
        of_prompts.llava_siglip,
        of_prompts.llava_full,
        of_prompts.vipllava,
        of_prompts.paligemma,
        of_prompts.smolvlm,
        of_prompts.idefics3,
        of_prompts.internvl,
        of_prompts.qwen2_vl,
        of_prompts.qwen2_5_vl,
        of_prompts.qwen3_vl,
    )
}
"""Language models that read images: what they promise beside is in test_multimodal*.py."""


def build(name: str, seed: int = 0) -> Case:
    """A host of the table in eval mode; norms, biases and scales are random too, so that nothing is hidden by ones."""
    torch.manual_seed(seed)
    case = {**HOSTS, **SELDOM, **PROMPTED}[name]()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if not parameter.abs().max() < 100:  # open_clip leaves some parameters uninitialised
                parameter.normal_(generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    case.model.eval()
    return case


def take(images: Any, rows: Any) -> Any:
    """Rows of a batch of images, whatever the host calls images."""
    return {key: value[rows] for key, value in images.items()} if isinstance(images, dict) else images[rows]


def of_dtype(images: Any, dtype: torch.dtype) -> Any:
    """Return images whose pixels have this type."""
    if isinstance(images, dict):
        return {**images, "pixel_values": images["pixel_values"].to(dtype)}
    return images.to(dtype)


def texts(case: Case, *shape: int, seed: int = 3) -> Tensor:
    """Text features `(*shape, width)` that this host takes."""
    return torch.randn(*shape, case.text_width, generator=torch.Generator().manual_seed(seed))
