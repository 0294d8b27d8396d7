"""haotian-liu/LLaVA: its wrapper of CLIP's tower. The text is given; its reader, the projector, takes any number.

`apply(CLIPVisionTower)` is refused, because who reads a wrapper's tokens is not known; `apply(tower.vision_tower)` is
the way, and the wrapper then returns fewer patches.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchselect

from . import standins
from .cases import Case, Evaluation
from .checkouts import load

VARIABLE = "LLAVA_DIR"


@dataclass
class Wrapped(Case):
    """A tower inside of LLaVA's wrapper, which is what is called."""

    wrapper: Any = None

    def call(self, batch: Any = None, model: nn.Module | None = None, seed: int = 7, text: Tensor | None = None) -> Any:
        args, _ = self.batch(0) if batch is None else batch
        if "_patchselect" not in vars(self.model):
            return self.wrapper(*args)
        with patchselect.guide(self.model, self.text_features() if text is None else text):
            return self.wrapper(*args)


def clip_tower(folder: Path, feature: str) -> Case:
    module = load(VARIABLE, "llava.model.multimodal_encoder.clip_encoder")
    transformers = load(VARIABLE, "transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, image_size=64, patch_size=16,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    given = types.SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature=feature)
    wrapper = module.CLIPVisionTower(str(folder), given).eval()
    with pytest.raises(
        TypeError, match=r"CLIPVisionTower only wraps.*patchselect\.apply\(model\.vision_tower(\.vision_model)?\)"
    ):
        patchselect.apply(wrapper)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed),), {}

    def one_by_one(model: Any) -> Any:
        """Images of several sizes come as a list."""
        return wrapper(list(standins.pictures(3, 5)))

    evaluations = {"a list of images": Evaluation(one_by_one, "image")}
    return Wrapped(
        wrapper.vision_tower, batch, captions=True, trains=False, evaluations=evaluations, wrapper=wrapper
    )  # fmt: skip


CASES = {
    "clip_tower_patches": lambda folder: clip_tower(folder, "patch"),
    "clip_tower_all": lambda folder: clip_tower(folder, "cls_patch"),
}
