"""BLIP and ViLT of transformers, tiny, with random weights: how they are built, called and told to select."""

from __future__ import annotations

import importlib

import torch
from since import needs

import patchselect
from patchselect.functional import num_kept

LAYERS = [1, 3]
BLIP_TEXT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=120,
    projection_dim=32, max_position_embeddings=32, bos_token_id=110, eos_token_id=2, sep_token_id=102, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
BLIP_VISION = dict(
    num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=16,
    initializer_range=0.2,
)  # fmt: skip
VILT = dict(
    hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, vocab_size=120, image_size=64,
    patch_size=16, max_position_embeddings=32, initializer_range=0.2, num_images=2, modality_type_vocab_size=3,
)  # fmt: skip
BLIP = ("BlipModel", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipForConditionalGeneration")
VILTS = (
    "ViltModel",
    "ViltForQuestionAnswering",
    "ViltForImageAndTextRetrieval",
    "ViltForImagesAndTextClassification",
    "ViltForMaskedLM",
    "ViltForTokenClassification",
)


def build(name: str, vision_width: int = 64):
    needs(name if name == "ViltForTokenClassification" else "ViLT" if name in VILTS else "BLIP")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    if name in VILTS:
        return getattr(transformers, name)(transformers.ViltConfig(**VILT)).eval()
    text = {**BLIP_TEXT, "encoder_hidden_size": vision_width}
    vision = {**BLIP_VISION, "hidden_size": vision_width}
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32
    )
    return getattr(transformers, name)(config).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = dict(pixel_values=torch.randn(3, 3, 64, 64, generator=generator), input_ids=ids, attention_mask=mask)
    if name in VILTS:
        given["pixel_mask"] = torch.ones(3, 64, 64, dtype=torch.long)
    if name == "ViltForImagesAndTextClassification":
        given["pixel_values"] = torch.stack([given["pixel_values"], given["pixel_values"].flip(0)], dim=1)
        given["pixel_mask"] = given["pixel_mask"].unsqueeze(1).expand(-1, 2, -1, -1)
    if name == "BlipForQuestionAnswering":
        given["labels"] = ids[:, :4]
    return given


def selecting(model, rate, **options):
    """`BlipModel` compares all images with all texts: here text i belongs to image i."""
    if type(model).__name__ == "BlipModel":
        options["pairing"] = "paired"
    return patchselect.apply(model, rate, LAYERS, **options)


def call(model, given, **more):
    torch.manual_seed(5)  # ViLT shuffles its patches
    return [part for part in model(**{**given, **more}).to_tuple() if isinstance(part, torch.Tensor)]


def lengths(prefix: int) -> list[int]:
    first = num_kept(16, 0.5) + 1
    return [prefix + first, prefix + num_kept(first, 0.5) + 1]
