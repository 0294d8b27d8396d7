"""Plain ViTs of transformers: alone, and as the image side of a dual encoder."""

from __future__ import annotations

import importlib
from typing import Any

from since import needs

from .case import VOCABULARY, Case, pixels, pooled

SIZES = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=16)
WIDE = dict(SIZES, intermediate_size=96)


def transformers_with(*features: str) -> Any:
    """Return transformers, or skip what needs a feature that this release lacks."""
    needs("transformers", *features)
    return importlib.import_module("transformers")


def bare(model: Any, prefix: int) -> Case:
    """A tower alone, which pools its class token."""
    return Case(
        model=model,
        image_side=lambda m, x: m(pixel_values=x).pooler_output,
        text_width=48,
        images=pixels(),
        tower=lambda m: m,
        prefix=prefix,
        patches=16,
        grid=(4, 4),
    )


def vit() -> Case:
    transformers = transformers_with()
    return bare(transformers.ViTModel(transformers.ViTConfig(**WIDE)), 1)


def dinov2_registers() -> Case:
    """Build a DINOv2 with all that its layers may have: registers, LayerScale, stochastic depth and a gated MLP."""
    transformers = transformers_with("DINOv2 with registers")
    more = dict(mlp_ratio=2, use_swiglu_ffn=True, drop_path_rate=0.1, layerscale_value=0.5)
    config = transformers.Dinov2WithRegistersConfig(**SIZES, **more, num_register_tokens=3)
    return bare(transformers.Dinov2WithRegistersModel(config), 4)


def dual_encoder() -> Case:
    """Build a ViT and a BERT with projections of their own."""
    transformers = transformers_with("dual encoders")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**WIDE), transformers.BertConfig(**text), projection_dim=24
    )
    return Case(
        model=transformers.VisionTextDualEncoderModel(config),
        image_side=lambda m, x: pooled(m.get_image_features(pixel_values=x)),
        text_side=lambda m, t: pooled(m.get_text_features(input_ids=t)),
        pair=lambda m, x, t: m(input_ids=t, pixel_values=x).logits_per_image,
        text_width=24,
        images=pixels(),
        tower=lambda m: m.vision_model,
        prefix=1,
        patches=16,
        grid=(4, 4),
    )


def dinov3() -> Case:
    """Build a DINOv3 with all that its layers may have; its grid is not square."""
    transformers = transformers_with("DINOv3")
    more = dict(num_register_tokens=3, use_gated_mlp=True, layerscale_value=0.5, drop_path_rate=0.1)
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**{**WIDE, "image_size": (48, 80)}, **more))
    case = bare(model, 4)
    case.images, case.patches, case.grid = pixels(48, 80), 15, (3, 5)
    return case
