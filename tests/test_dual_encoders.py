"""`VisionTextDualEncoderModel`: its own projections are the joint space of every tower that can be its image side."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hosts import VISION, ids
from hosts.of_plain import SIZES, WIDE, transformers_with
from hosts.of_transformers import TEXT

import patchselect

GATED = {**SIZES, "mlp_ratio": 2}
READABLE = ("keys", "features", "values", "joint")


class Side(NamedTuple):
    """The configuration of an image side, and which relevances read it."""

    options: dict[str, Any]
    feature: str = ""
    relevances: tuple[str, ...] = READABLE
    made_by: str = ""
    """The class of the tower, where `AutoModel` does not know it."""


SIDES = {
    "CLIPVisionConfig": Side(VISION),
    "SiglipVisionConfig": Side(VISION, "SigLIP"),
    "ViTConfig": Side(WIDE),
    "DeiTConfig": Side(WIDE),
    "Dinov2Config": Side(GATED, "DINOv2"),
    "Dinov2WithRegistersConfig": Side(GATED, "DINOv2 with registers"),
    "FlavaImageConfig": Side(WIDE, "FLAVA in two halves", made_by="FlavaImageModel"),
    "Aimv2VisionConfig": Side(WIDE, "AIMv2", ("keys", "features", "joint")),
    "Tipsv2VisionConfig": Side(GATED, "TIPSv2"),
    "DINOv3ViTConfig": Side(WIDE, "DINOv3"),
}
each_side = pytest.mark.parametrize("name", list(SIDES))


def made(name: str, width: int) -> Any:
    """Build a dual encoder of one image side and a BERT, in eval mode, with noise on all that starts as ones."""
    side = SIDES[name]
    transformers = transformers_with("dual encoders", *([side.feature] if side.feature else []))
    torch.manual_seed(0)
    vision, text = getattr(transformers, name)(**side.options), transformers.BertConfig(**TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=width)
    tower = getattr(transformers, side.made_by)(vision) if side.made_by else None
    model = transformers.VisionTextDualEncoderModel(config, vision_model=tower).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
@each_side
def test_turning_the_joint_space_turns_its_texts(name):
    """The same patches stay if texts are turned with the projection, and other ones if only the one is turned."""
    model, text = made(name, 48), torch.randn(3, 48)
    turn = torch.linalg.qr(torch.randn(48, 48))[0]

    def relevance_of(matrix, features, relevance):
        model.visual_projection.weight.copy_(matrix)
        handle = patchselect.apply(model, 0.5, [3], relevance=relevance)
        with handle.record() as trace, patchselect.guide(model, features):
            model.get_image_features(pixel_values=pixels())
        return trace[0].relevance

    for relevance in SIDES[name].relevances:
        plain = relevance_of(torch.eye(48), text, relevance)
        torch.testing.assert_close(relevance_of(turn, text @ turn.T, relevance), plain, rtol=1e-3, atol=1e-5)
        other = relevance_of(turn, text, relevance)
        assert (other - plain).abs().max() > 1e-4, f"{relevance} does not read the projection"


@torch.no_grad()
@each_side
def test_a_joint_space_of_another_width_than_the_tower(name):
    model, given = made(name, 24), {"input_ids": ids(3), "pixel_values": pixels()}
    whole = model(**given).image_embeds
    patchselect.apply(model, 1.0, pairing="paired")
    assert torch.equal(model(**given).image_embeds, whole)
    for relevance in SIDES[name].relevances:
        patchselect.apply(model, 0.5, relevance=relevance, pairing="paired")
        found = model(**given)
        features = model.get_text_features(given["input_ids"])
        with patchselect.guide(model, getattr(features, "pooler_output", features)):
            again = model(**given)
        torch.testing.assert_close(found.image_embeds, again.image_embeds, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found.image_embeds, whole, rtol=1e-3, atol=1e-4)
        scores = patchselect.score_pairs(
            model, given["pixel_values"], {"input_ids": given["input_ids"]}, progress=False
        )
        own = (found.image_embeds * found.text_embeds).sum(-1)
        torch.testing.assert_close(scores.diagonal(), own, rtol=1e-3, atol=1e-4)
    patchselect.remove(model)
    assert torch.equal(model(**given).image_embeds, whole)


def test_an_image_side_that_cannot_be_patched_says_why():
    transformers = transformers_with("dual encoders", "BEiT")
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.BeitConfig(**WIDE, use_relative_position_bias=True), transformers.BertConfig(**TEXT)
    )
    with pytest.raises(TypeError, match="BeitModel cannot be patched: its attention adds relative positions"):
        patchselect.apply(transformers.VisionTextDualEncoderModel(config), 0.5)
