"""Hosts of Hugging Face transformers: CLIP and its relatives, SigLIP, bare towers, BLIP."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from since import needs
from torch import Tensor, nn

from .case import VOCABULARY, Case, pixels, pooled

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY)
VISION = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=16
)
CLIP_TEXT = dict(TEXT, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=1)
ROBERTA_TEXT = dict(TEXT, pad_token_id=1, max_position_embeddings=40, project_dim=24)


def _needs(feature: str) -> Any:
    needs(feature)
    return importlib.import_module("transformers")


def clip_config(text: Any, vision: Any, **more: Any) -> Any:
    """Return the configuration of a CLIP; the first releases call its parts by other names."""
    kind = _needs("transformers").CLIPConfig
    old = "text_config_dict" in inspect.signature(kind).parameters and (
        "text_config" not in inspect.signature(kind).parameters
    )
    return kind(**{"text_config_dict" if old else "text_config": text,
                   "vision_config_dict" if old else "vision_config": vision}, **more)  # fmt: skip


def _dual(model: nn.Module, width: int, prefix: int = 1, **extra: Any) -> Case:
    return Case(
        model=model,
        image_side=lambda m, x: pooled(m.get_image_features(pixel_values=x)),
        text_side=lambda m, t: pooled(m.get_text_features(input_ids=t)),
        pair=lambda m, x, t: m(input_ids=t, pixel_values=x).logits_per_image,
        text_width=width,
        images=pixels(),
        tower=lambda m: m.vision_model,
        prefix=prefix,
        patches=16,
        grid=(4, 4),
        **extra,
    )


def clip() -> Case:
    transformers = _needs("transformers")
    config = clip_config(CLIP_TEXT, VISION, projection_dim=24)
    return _dual(transformers.CLIPModel(config), 24)


def chinese_clip() -> Case:
    transformers = _needs("Chinese CLIP")
    text = dict(ROBERTA_TEXT, max_position_embeddings=40)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    case = _dual(transformers.ChineseCLIPModel(config), 24)
    # get_text_features of 4.57 projects a pooler output that the model does not have.
    case.text_side = lambda m, t: m.text_projection(m.text_model(input_ids=t).last_hidden_state[:, 0])
    return case


def alt_clip() -> Case:
    transformers = _needs("AltCLIP")
    config = transformers.AltCLIPConfig(text_config=ROBERTA_TEXT, vision_config=VISION, projection_dim=24)
    return _dual(transformers.AltCLIPModel(config), 24)


def metaclip2() -> Case:
    transformers = _needs("MetaCLIP 2")
    config = transformers.MetaClip2Config(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=24)
    return _dual(transformers.MetaClip2Model(config), 24)


def siglip() -> Case:
    transformers = _needs("SigLIP")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, max_position_embeddings=7, projection_size=48)
    return _dual(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION)), 48, 0)


def _patchified(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(batch, 15, 3 * 16 * 16, generator=generator),
        "pixel_attention_mask": torch.ones(batch, 15, dtype=torch.long),
        "spatial_shapes": torch.tensor([[3, 5]] * batch),
    }


def siglip2() -> Case:
    transformers = _needs("SigLIP 2")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, max_position_embeddings=7, projection_size=48)
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    case = _dual(model, 48, 0)
    case.images, case.patches, case.grid = _patchified, 15, (3, 5)
    case.image_side = lambda m, x: pooled(m.get_image_features(**x))
    case.pair = lambda m, x, t: m(input_ids=t, **x).logits_per_image
    return case


def clip_vision() -> Case:
    transformers = _needs("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    tower = model.vision_model if hasattr(model, "vision_model") else model
    size = dict(images=pixels(), prefix=1, patches=16, grid=(4, 4))
    path = "vision_model" if tower is not model else ""
    return Case(model, lambda m, x: m(x).pooler_output, 48, tower=lambda m: m.get_submodule(path), **size)


def clip_vision_projected() -> Case:
    transformers = _needs("projected tower")
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24))
    size = dict(images=pixels(), prefix=1, patches=16, grid=(4, 4))
    return Case(model, lambda m, x: m(x).image_embeds, 24, tower=lambda m: m.vision_model, **size)


def blip() -> Case:
    transformers = _needs("BLIP")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, encoder_hidden_size=48, max_position_embeddings=40)
    tokens = dict(bos_token_id=VOCABULARY - 2, sep_token_id=VOCABULARY - 1, pad_token_id=0)
    config = transformers.BlipConfig(
        text_config={**text, **tokens, "initializer_range": 0.2},
        vision_config={**VISION, "initializer_range": 0.2},
        image_text_hidden_size=24,
    )
    case = _dual(transformers.BlipForImageTextRetrieval(config), 48)
    case.image_side = lambda m, x: m.vision_model(pixel_values=x).last_hidden_state[:, 0]
    case.text_side = lambda m, t: m.text_encoder(input_ids=t).last_hidden_state[:, 0]
    case.pair = lambda m, x, t: m(input_ids=t, pixel_values=x, use_itm_head=False).itm_score
    case.relevances = ("keys", "features", "values")
    return case
