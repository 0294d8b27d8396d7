"""Real code that looks like a host: right, or refused in words, in both orders where there are two.

`DINO_DIR`, `VILT_DIR`, `METER_DIR`, `TOME_DIR` and `LAVIS_DIR` name checkouts of facebookresearch/dino, dandelin/ViLT,
zdou0830/METER, facebookresearch/ToMe and salesforce/LAVIS. One file of each is loaded, beside the installed timm.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from since import needs

import patchselect

SIZES = dict(img_size=64, patch_size=16, embed_dim=48, depth=6, num_heads=4)


def loaded(variable, path, **stand_ins):
    """One file of a checkout as a module; what it imports beside it and never calls here is stood in for."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a checkout")
    needs("average pooling")  # timm, which these files import
    folder = Path(os.environ[variable])
    sys.path.insert(0, str((folder / path).parent))
    try:
        for name, part in stand_ins.items():
            for end in range(1, name.count("__") + 2):
                package = ".".join(name.split("__")[:end])
                sys.modules.setdefault(package, types.ModuleType(package))
            vars(sys.modules[name.replace("__", ".")]).update(part)
        spec = importlib.util.spec_from_file_location(f"stranger_{variable.lower()}", folder / path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def refused(model, message):
    before = {path: type(part) for path, part in model.named_modules()}
    for options in ({}, {"guidance": "image"}, {"guidance": "image", "merge": 0.5}):
        with pytest.raises(TypeError, match=message):
            patchselect.apply(model, 0.5, **options)
    assert {path: type(part) for path, part in model.named_modules()} == before


def check_tower(model, more):
    """A tower 64 wide, of six blocks, that returns all tokens; it is called with images and `more`."""
    images, text = torch.randn(2, 3, 64, 64), torch.randn(2, 64)
    plain = model(images, *more)
    for relevance in ("keys", "values", "features", "joint"):
        handle = patchselect.apply(model, 0.5, [1, 3], relevance=relevance)
        with handle.record() as trace, patchselect.guide(model, text):
            assert model(images, *more).shape == (2, 1 + 6, 64)
        assert [entry.num_tokens for entry in trace] == [10, 7]
    handle.remove()
    assert torch.equal(model(images, *more), plain)


def test_dino():
    module = loaded("DINO_DIR", "vision_transformer.py")
    model = module.VisionTransformer(**{**SIZES, "img_size": [64]}, qkv_bias=True)
    refused(model, r"block \d of VisionTransformer cannot select.*Block ran where they raised TypeError")


def test_vilt():
    module = loaded("VILT_DIR", "vilt/modules/vision_transformer.py")
    model = module.VisionTransformer(**SIZES, config={"drop_rate": 0.0})
    refused(model, r"block \d of VisionTransformer cannot select.*Block ran where they raised TypeError")


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_clip_model_of_meter(whole):
    """Its tower and what holds it alone: they work; `real/meter.py` has its whole model."""
    module = loaded("METER_DIR", "meter/modules/clip_model.py")
    sizes = dict(vision_layers=7, vision_width=64, vision_patch_size=16, image_resolution=64, resolution_after=64)
    text = dict(context_length=7, vocab_size=99, transformer_width=64, transformer_heads=1, transformer_layers=1)
    model = module.CLIP(embed_dim=32, **sizes, **text).eval()
    check_tower(model if whole else model.visual, () if whole else (None,))


@torch.no_grad()
def test_clip_vit_of_lavis():
    """Blocks of OpenAI's CLIP in a tower that returns all tokens: it works, alone."""
    stand_ins = {
        "lavis__common__dist_utils": {"download_cached_file": None},
        "lavis__models__eva_vit": {"convert_weights_to_fp16": None},
        "fairscale__nn__checkpoint__checkpoint_activations": {"checkpoint_wrapper": lambda module: module},
    }
    module = loaded("LAVIS_DIR", "lavis/models/clip_vit.py", **stand_ins)
    model = module.VisionTransformer(64, 16, 64, 6, 4, use_grad_checkpointing=False).eval()
    check_tower(model, ())


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"use_rel_pos_bias": True}, {"init_values": 0.1}])
def test_eva_of_lavis(options):
    stand_ins = {"lavis__common__dist_utils": {"download_cached_file": None}}
    module = loaded("LAVIS_DIR", "lavis/models/eva_vit.py", **stand_ins)
    refused(module.VisionTransformer(**SIZES, num_classes=0, **options), "no adapter knows")


@pytest.mark.parametrize("merge", [0, 0.5])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tome(order, merge):
    if "TOME_DIR" not in os.environ:
        pytest.skip("TOME_DIR does not name a checkout")
    needs("average pooling")
    folder = Path(os.environ["TOME_DIR"]) / "tome"
    for name in ("tome", "tome.patch"):  # without their __init__, which import drawing
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = [str(folder.parent / name.replace(".", "/"))]
    tome = importlib.import_module("tome.patch.timm")
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer

    def made():
        torch.manual_seed(0)
        return vit(**{**SIZES, "patch_size": 8}, num_classes=0).eval()

    def merging(model):
        tome.apply_patch(model)
        model.r = 4
        return model

    images = torch.randn(2, 3, 64, 64)
    if order == "before":
        refused(merging(made()), "ToMeBlock cannot be compared with them")
        return
    model = made()
    handle = patchselect.apply(model, 0.5, guidance="image", merge=merge)
    merging(model)
    with torch.no_grad(), pytest.raises(ValueError, match="was given another class, tome.patch.timm.ToMeBlock"):
        model(images)
    with pytest.warns(UserWarning, match="another library has given"):
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(images), merging(made())(images))
