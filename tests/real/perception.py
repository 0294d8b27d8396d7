"""perception_models: PE's CLIP in small, with a class token and rotary positions, called as its README does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import standins
from .cases import Case, Evaluation
from .checkouts import load

VARIABLE = "PE_DIR"


def clip(folder: Path) -> Case:
    return _clip("attn")


def class_token(folder: Path) -> Case:
    return _clip("tok", ls_init_value=0.3, drop_path=0.1)


def _clip(pool: str, **more: Any) -> Case:
    module, config = load(VARIABLE, "core.vision_encoder.pe"), load(VARIABLE, "core.vision_encoder.config")
    torch.manual_seed(0)
    sizes = dict(patch_size=16, width=64, layers=6, heads=4, mlp_ratio=2.0, output_dim=32, image_size=64)
    vision = config.PEConfig(**sizes, use_cls_token=True, pool_type=pool, attn_pooler_heads=4, **more)
    text = config.PETextConfig(context_length=16, width=32, heads=2, layers=2, output_dim=32, vocab_size=99)
    model = module.CLIP(vision, text)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max() < 100:  # its text half leaves weights uninitialised
                parameter.normal_(std=0.1)

    def batch(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, 98, (3, 16), generator=generator)
        tokens[:, 9] = 98
        return (standins.pictures(3, seed), tokens), {}

    def zero_shot(head: Any) -> Tensor:
        """As in its README: probabilities of captions, in a call with both."""
        features, texts, scale = head(*batch(5)[0])
        return (scale * features @ texts.T).softmax(dim=-1)

    def cosine(image: int, text: int) -> Tensor:
        (pixels, tokens), _ = batch(0)
        features, texts, _ = model(pixels[image : image + 1], tokens[text : text + 1])
        return features @ texts.T

    evaluations = {"README, zero-shot": Evaluation(zero_shot)}
    return Case(model, batch, pairing="paired", evaluations=evaluations, cosine=cosine)


CASES = {"clip": clip, "class_token": class_token}
