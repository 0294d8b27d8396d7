"""Models that cannot be supported are refused by name and with the reason, and stay as they were."""

from __future__ import annotations

import pytest
import torch
from hosts import build
from refusals import classes
from since import needs, since
from sweeping import on_meta
from torch import nn

import patchselect


def test_unsupported_models():
    case = build("clip")
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1))):
        with pytest.raises(TypeError, match=f"no adapter knows .*{type(model).__name__}"):
            patchselect.apply(model)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        patchselect.apply("ViT-B-16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TorchScript"):
        patchselect.apply(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="DataParallel is not supported"):
        patchselect.apply(nn.DataParallel(case.model))


@since("compile")
def test_compiled_models_are_refused():
    case = build("clip")
    with pytest.raises(TypeError, match="already compiled: call patchselect.apply first"):
        patchselect.apply(torch.compile(case.model))
    if hasattr(case.model, "compile"):  # torch 2.1
        case.model.compile()
        with pytest.raises(TypeError, match="already compiled"):
            patchselect.apply(case.model)


def test_data_parallel_around_a_patched_model_is_refused():
    case = build("clip")
    patchselect.apply(case.model, 0.5)
    replica = case.model.vision_model.encoder.layers[1]._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="nn.DataParallel is not supported"):
        replica(torch.randn(1, 17, 48), None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "ModifiedResNet of open_clip cannot be patched"),
        ("convnext_base", "ConvNeXt of this CLIP cannot be patched"),
        ("swin_base_patch4_window7_224", "SwinTransformer of this CLIP cannot be patched"),
        ("vit_relpos_medium_patch16_cls_224", "cannot be patched: .*relative positions"),
    ],
)
def test_open_clip_towers_that_cannot_be_supported_are_refused_by_name(name, reason):
    needs(*(("towers on meta",) if name == "RN50" else ("towers on meta", "timm on meta")))
    import open_clip

    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    before = classes(model)
    with pytest.raises(TypeError, match=reason):
        patchselect.apply(model)
    assert classes(model) == before


def test_dense_readers_are_refused():
    needs("CLIPSeg")
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    vision = dict(sizes, image_size=32, patch_size=16)
    config = transformers.CLIPSegConfig(
        text_config=dict(sizes, vocab_size=99), vision_config=vision, extract_layers=[0, 1, 2], reduce_dim=16
    )
    segmenter = transformers.CLIPSegForImageSegmentation(config)
    with pytest.raises(TypeError, match="cannot be patched as a whole: what reads the tokens .*'clip.vision_model"):
        patchselect.apply(segmenter)
    with pytest.raises(TypeError, match="its segmentation decoder reads a dense grid"):
        patchselect.apply(segmenter.clip)


READERS = {
    "LlavaNext": "packs their whole grids",
    "LlavaOnevision": "packs their whole grids",
    "Gemma3": "averages squares of a whole grid",
    "Mistral3": "joins neighbours of a whole grid",
    "Idefics2": "a resampler reads its tower",
    "Ovis2": "a visual vocabulary",
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_whole_grids_are_refused_with_the_reason(name):
    needs("short prompts")
    import transformers

    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    with torch.device("meta"):
        model = on_meta(kind)
    before = classes(model)
    with pytest.raises(TypeError, match=f"{name}ForConditionalGeneration cannot be patched: .*{READERS[name]}"):
        patchselect.apply(model)
    with pytest.raises(TypeError, match=f"cannot be patched: .*{READERS[name]}"):
        patchselect.apply(model.model)
    assert classes(model) == before
