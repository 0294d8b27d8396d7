"""Structural doubles of hosts that no package ships: OpenAI CLIP, LAVIS' `clip_vit`, PE, ALBEF, mPLUG and METER."""

from __future__ import annotations

from typing import Any

from doubles.albef import Retrieval, Vit
from doubles.clip import BareTower, Clip
from doubles.meter import Fusing, Tower
from doubles.mplug import Answering
from doubles.perception import Clip as PerceptionClip
from torch import nn

from .case import Case, pixels


def _double(model: nn.Module, tower: str, text_width: int, image_side: Any, *relevances: str) -> Case:
    size = dict(images=pixels(32, 32), prefix=1, patches=16, grid=(4, 4), relevances=relevances)
    return Case(model, image_side, text_width, tower=lambda m: m.get_submodule(tower), **size)


def openai_clip() -> Case:
    relevances = ("keys", "features", "values", "joint")
    case = _double(Clip(), "visual", 24, lambda m, x: m.encode_image(x), *relevances)
    case.text_side, case.pair = lambda m, t: m.encode_text(t), lambda m, x, t: m(x, t)[0]
    return case


def lavis_clip_vit() -> Case:
    return _double(BareTower(), "", 32, lambda m, x: m(x)[:, 0], "keys", "features", "values", "joint")


def perception() -> Case:
    case = _double(
        PerceptionClip(), "visual", 24, lambda m, x: m.encode_image(x), "keys", "features", "values", "joint"
    )
    case.text_side, case.pair = lambda m, t: m.encode_text(t), perception_logits
    return case


def perception_logits(model: Any, images: Any, tokens: Any) -> Any:
    image, text, scale = model(images, tokens)
    return scale * image @ text.T


def albef() -> Case:
    return _double(Retrieval(), "eyes", 32, lambda m, x: m.eyes(x)[:, 0], "keys", "features", "values")


def albef_tower() -> Case:
    return _double(Vit(), "", 32, lambda m, x: m(x)[:, 0], "keys", "features", "values")


def mplug() -> Case:
    model = Answering(large=True)
    return _double(model, "eyes.visual", 32, lambda m, x: m.eyes.visual(x, True)[:, 0], "keys", "features")


def meter() -> Case:
    return _double(Fusing("itm"), "vit_model.visual", 40, lambda m, x: m.vit_model(x)[:, 0], "keys", "features")


def meter_tower() -> Case:
    return _double(Tower(), "", 32, lambda m, x: m(x, None)[:, 0], "keys", "features", "values", "joint")
