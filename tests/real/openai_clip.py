"""openai/CLIP with a small ViT; its own tokenizer and vocabulary come with the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import standins
from .cases import Case, Evaluation
from .checkouts import load

VARIABLE = "OPENAI_CLIP_DIR"


def clip(folder: Path) -> Case:
    package = load(VARIABLE, "clip")
    torch.manual_seed(0)
    model = load(VARIABLE, "clip.model").CLIP(
        embed_dim=64, image_resolution=64, vision_layers=6, vision_width=128, vision_patch_size=16, context_length=77,
        vocab_size=49408, transformer_width=64, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), package.tokenize(standins.sentences(3, seed))), {}

    def zero_shot(head: Any) -> Tensor:
        """As in its README: the classes of a photo, all of them in one selection."""
        classes = head.encode_text(package.tokenize([f"a photo of a {word}" for word in ("dog", "cat", "boat")]))
        features = head.encode_image(standins.pictures(3, 5))
        return 100.0 * F.normalize(features, dim=-1) @ F.normalize(classes, dim=-1).T

    def cosine(image: int, text: int) -> Tensor:
        (pixels, ids), _ = batch(0)
        return model(pixels[image : image + 1], ids[text : text + 1])[0] / model.logit_scale.exp()

    evaluations = {"README, zero-shot prediction": Evaluation(zero_shot, "image")}
    return Case(model, batch, evaluations=evaluations, cosine=cosine)


CASES = {"clip": clip}
