"""Language models that read patches in their prompts, tiny, and prompts for them."""

from __future__ import annotations

import importlib
from typing import Any, Sequence

import torch
from packaging.version import Version
from since import installed, needs
from torch import Tensor, nn

from .case import Case, pixels
from .of_transformers import VISION

IMAGE, PAD, WORDS = 98, 0, 90
"""The token of an image, that of padding, and how many words there are."""
LANGUAGE = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    initializer_range=0.3,
)  # fmt: skip


def _needs() -> Any:
    needs("short prompts")
    return importlib.import_module("transformers")


def is_old() -> bool:
    """Tell whether models take no encoded images, and return those of `get_image_features` bare."""
    release = installed("transformers")
    return release is not None and release < Version("5")


def read(found: Any) -> Any:
    """Return the tokens of images, from what `get_image_features` returns in any release."""
    if isinstance(found, tuple) and isinstance(found[-1], list):  # with those of other layers
        return found[0]
    return getattr(found, "pooler_output", found)


def _case(model: nn.Module, prefix: int, tower: str = "model.vision_tower") -> Case:
    def image_side(m: Any, x: Tensor) -> Tensor:
        found = read(m.get_image_features(pixel_values=x))
        return torch.stack([each.mean(dim=0) for each in found])

    core = model.get_submodule(tower)
    path = tower + (".vision_model" if hasattr(core, "vision_model") else "")
    return Case(model, image_side, 48, pixels(), lambda m: m.get_submodule(path), prefix, 16, (4, 4))


def _llava(kind: str, vision: Any, **more: Any) -> nn.Module:
    transformers = _needs()
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=transformers.LlamaConfig(**LANGUAGE), image_token_id=IMAGE, **more
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def llava() -> Case:
    return _case(_llava("Llava", _needs().CLIPVisionConfig(**VISION)), 1)


def llava_siglip() -> Case:
    """Build one that reads the [CLS] too where there is one, and the last layer."""
    vision = _needs().SiglipVisionConfig(**VISION, vision_use_head=False)
    strategy = dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
    return _case(_llava("Llava", vision, **strategy), 0)


def llava_full() -> Case:
    vision = _needs().CLIPVisionConfig(**VISION)
    return _case(_llava("Llava", vision, vision_feature_select_strategy="full"), 1)


def vipllava() -> Case:
    layers = {"vision_feature_layers" if is_old() else "vision_feature_layer": [-1, -2, 3, 1]}
    return _case(_llava("VipLlava", _needs().CLIPVisionConfig(**VISION), **layers), 1)


def paligemma() -> Case:
    transformers = _needs()
    language = {**LANGUAGE, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=transformers.GemmaConfig(**language), image_token_id=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return _case(transformers.PaliGemmaForConditionalGeneration(config), 0)


SQUARES = {**VISION, "image_size": 96}
"""Six by six patches, which are nine squares."""


def _squares(model: nn.Module, tower: str, prefix: int, side: int = 2) -> Case:
    case = _case(model, prefix, tower)
    case.images, case.patches, case.grid = pixels(96, 96), 36, (6, 6)
    case.extra.update(side=side, size=36 // side**2)
    return case


def _idefics(kind: str) -> Case:
    transformers = _needs()
    vision = {**SQUARES, "initializer_range": 0.2}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=transformers.LlamaConfig(**LANGUAGE), image_token_id=IMAGE, scale_factor=2,
        pad_token_id=PAD,
    )  # fmt: skip
    case = _squares(getattr(transformers, f"{kind}ForConditionalGeneration")(config), "model.vision_model", 0)
    images = case.images
    case.images = lambda batch: images(batch).unsqueeze(1)
    return case


def smolvlm() -> Case:
    return _idefics("SmolVLM")


def idefics3() -> Case:
    return _idefics("Idefics3")


def internvl() -> Case:
    transformers = _needs()
    vision = {**SQUARES, "image_size": [96, 96], "patch_size": [16, 16], "layer_scale_init_value": 0.7}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision), text_config=transformers.LlamaConfig(**LANGUAGE),
        image_token_id=IMAGE, downsample_ratio=0.5,
    )  # fmt: skip
    return _squares(transformers.InternVLForConditionalGeneration(config), "model.vision_tower", 1)


VIDEO, START = 97, 95
"""The token of a video, and the one before each image."""
PACKED = dict(depth=6, num_heads=4, patch_size=8, temporal_patch_size=2, spatial_merge_size=2, initializer_range=0.3)
"""Towers that pack images into one sequence."""


def _packed(model: nn.Module) -> Case:
    grids = torch.tensor([[1, 6, 8]])

    def image_side(m: Any, images: dict[str, Tensor]) -> Tensor:
        found = read(m.get_image_features(images["pixel_values"].flatten(0, 1), images["image_grid_thw"]))
        return torch.stack([each.mean(dim=0) for each in found])

    def images(batch: int) -> dict[str, Tensor]:
        pixels = torch.randn(batch, 48, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(7))
        return {"pixel_values": pixels, "image_grid_thw": grids.expand(batch, -1)}

    return Case(
        model, image_side, 48, images, lambda m: m.model.visual, 0, 48, (6, 8), relevances=("keys", "features"),
        extra={"side": 2},
    )  # fmt: skip


def _qwen(kind: str, vision: dict[str, Any], language: dict[str, Any], **more: Any) -> Case:
    transformers = _needs()
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**PACKED, **vision}, text_config={**LANGUAGE, **language}, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=96, **more,
    )  # fmt: skip
    return _packed(getattr(transformers, f"{kind}ForConditionalGeneration")(config))


def _rotary() -> dict[str, Any]:
    sections: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    if is_old():
        return {"rope_scaling": sections, "rope_theta": 10000.0}
    return {"rope_parameters": {**sections, "rope_theta": 10000.0}}


def qwen2_vl() -> Case:
    return _qwen("Qwen2VL", {"embed_dim": 48, "hidden_size": 32, "mlp_ratio": 2}, _rotary())


def qwen2_5_vl() -> Case:
    vision = dict(hidden_size=48, out_hidden_size=32, intermediate_size=96)
    return _qwen("Qwen2_5_VL", {**vision, "window_size": 32, "fullatt_block_indexes": [2, 5]}, _rotary())


def qwen3_vl() -> Case:
    vision = dict(hidden_size=48, out_hidden_size=32, intermediate_size=96, num_position_embeddings=25)
    language = {"num_hidden_layers": 4, "head_dim": 8, **_rotary()}
    return _qwen("Qwen3VL", {**vision, "deepstack_visual_indexes": [0, 2, 4]}, language)


def packed_prompts(
    grids: Sequence[Sequence[tuple[int, int]]], words: Sequence[int], side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Return prompts as `prompts` does, of images with `grids` (height, width) in patches, row by row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for sizes, count in zip(grids, words):
        text = torch.randint(3, WORDS, (count,), generator=generator)
        text[: len(sizes)] = START
        parts = [text[:1]]
        for image, (height, width) in enumerate(sizes):
            parts += [torch.full((height * width // 4,), IMAGE), text[1 + image : 2 + image]]
        made.append(torch.cat([*parts, text[1 + len(sizes) :]]))
    length = max(map(len, made))
    ids, mask = torch.full((len(made), length), PAD), torch.zeros(len(made), length, dtype=torch.long)
    for row, each in enumerate(made):
        place = slice(length - len(each), None) if side == "left" else slice(None, len(each))
        ids[row, place], mask[row, place] = each, 1
    flat = [(1, *size) for sizes in grids for size in sizes]
    found = {"input_ids": ids, "attention_mask": mask}
    if not is_old():
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    if flat:
        found["image_grid_thw"] = torch.tensor(flat)
        count = sum(height * width for _, height, width in flat)
        found["pixel_values"] = torch.randn(count, 3 * 2 * 8 * 8, generator=generator)
    return found


def prompts(
    rows: Sequence[int],
    words: Sequence[int],
    tokens: int = 16,
    side: str = "left",
    seed: int = 0,
    pixels: int = 64,
    **more: Any,
) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `pixel_values` of prompts with so many images and words a row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for images, count in zip(rows, words):
        text = torch.randint(3, WORDS, (count,), generator=generator)
        parts = [text[:1]]
        for image in range(images):
            parts += [torch.full((tokens,), IMAGE), text[1 + image : 2 + image]]
        made.append(torch.cat([*parts, text[1 + images :]]))
    length = max(map(len, made))
    ids = torch.full((len(made), length), PAD)
    mask = torch.zeros(len(made), length, dtype=torch.long)
    for row, each in enumerate(made):
        place = slice(length - len(each), None) if side == "left" else slice(None, len(each))
        ids[row, place], mask[row, place] = each, 1
    found = {"input_ids": ids, "attention_mask": mask}
    if sum(rows):
        found["pixel_values"] = torch.randn(sum(rows), 3, pixels, pixels, generator=generator)
    return {**found, **more}
