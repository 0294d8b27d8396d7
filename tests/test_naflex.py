"""timm's NaFlexVit beside what test_padded.py and the promises test: its kinds and names, and what is refused."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hosts import build, texts
from hosts.calls import encode
from hosts.of_open_clip import naflex, patches_of
from since import needs, since

import patchselect
from patchselect.wiring.towers import find_towers

needs("NaFlexVit", module=True)
import timm
from timm.models.naflexvit import NaFlexVit

SHAPES = ((3, 5), (2, 4), (5, 2), (3, 5))
SMALL = dict(depth=4, embed_dim=48, num_heads=4)
KINDS: dict[str, dict[str, Any]] = {
    "average": dict(global_pool="avg"),
    "average of all": dict(global_pool="avg", class_token=True, pool_include_prefix=True),
    "maximum": dict(global_pool="max", fc_norm=True),
    "both": dict(global_pool="avgmax", reg_tokens=2),
    "class token": dict(global_pool="token", class_token=True),
    "attention": dict(global_pool="map", class_token=True, reg_tokens=1),
    "attention over all": dict(global_pool="map", class_token=True, pool_include_prefix=True),
    "masks of keys": dict(use_key_only_attn_mask=True, qk_norm=True),
    "factorised positions": dict(pos_embed="factorized", pos_embed_ar_preserving=True),
    "sampled positions": dict(pos_embed_use_grid_sample=True),
    "turned by axes": dict(rope_type="axial", global_pool="avg", reg_tokens=1),
    "turned by learned angles": dict(rope_type="mixed", class_token=True, global_pool="token"),
    "gated": dict(swiglu_mlp=True, attn_gated=True, init_values=0.3),
    "normalised within": dict(scale_mlp_norm=True, scale_attn_inner_norm=True),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_reads_padded_batches_image_by_image_and_keeps_the_contract(kind):
    if kind == "turned by learned angles":
        needs("learned angles")
    torch.manual_seed(0)
    model = naflex(depth=4, pos_embed_grid_size=(4, 4), **KINDS[kind]).model.eval()
    images, text = patches_of(SHAPES, 17), torch.randn(4, 48)
    plain = model(images)
    patchselect.apply(model, 1.0, guidance="image")
    assert torch.equal(model(images), plain)
    patchselect.apply(model, 0.5, [1, 2], relevance="keys")
    with patchselect.guide(model, text):
        found = model(images)
        torch.testing.assert_close(model(**{"x": images["patches"], **images_apart(images)}), found)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-4)
    for row, (height, width) in enumerate(SHAPES):
        alone = {name: value[row : row + 1, : height * width] for name, value in images.items()}
        with patchselect.guide(model, text[row : row + 1]):
            torch.testing.assert_close(model(alone)[0], found[row], rtol=1e-4, atol=1e-5)
    patchselect.remove(model)
    assert torch.equal(model(images), plain)


def images_apart(images: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what goes beside the patches, argument by argument."""
    return {name: value for name, value in images.items() if name != "patches"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm_naflex", "timm_naflex_rotary"])
@pytest.mark.parametrize("merge", [0.0, 0.5])
def test_pixels_and_their_patches_are_the_same_image(name, merge):
    case = build(name)
    pixels, text = case.images(2), texts(case, 2)
    images = patches_of([(3, 5)] * 2, 15)
    cut = pixels.unflatten(2, (3, 16)).unflatten(4, (5, 16)).permute(0, 2, 4, 3, 5, 1)  # (B, 3, 5, 16, 16, C)
    images["patches"] = cut.reshape(2, 15, -1)
    handle = patchselect.apply(case.model, 0.5, [2] if merge else [1, 3], merge=merge)
    with handle.record() as one:
        expected = encode(case, pixels, text)
    with handle.record() as other:
        torch.testing.assert_close(encode(case, images, text), expected, rtol=1e-4, atol=1e-5)
    assert [torch.equal(a.kept, b.kept) and a.grid == b.grid for a, b in zip(one, other)] == [True] * len(one)


@torch.no_grad()
def test_features_come_with_a_mask_of_what_is_left():
    case = build("timm_naflex")
    patchselect.apply(case.model, 0.5, [1], guidance="image")
    images = patches_of(SHAPES, 17)
    found = case.model.forward_features(**images)
    assert found["patches"].shape[1] == case.prefix + 9
    assert found["patch_valid"].sum(dim=1).tolist() == [9, 5, 6, 9]
    whole = case.model.forward_features(**patches_of([(3, 5)], 15))
    assert whole["patch_valid"].shape == (1, 9) and whole["patch_valid"].all()


@torch.no_grad()
def test_outputs_of_the_last_block_are_skipped_where_no_mask_hides_any():
    torch.manual_seed(0)
    model = naflex(class_token=True, global_pool="token").model.eval()
    images, pixels = patches_of(SHAPES, 17), torch.randn(2, 3, 48, 80)
    patchselect.apply(model, 0.5, [1, 3], guidance="image")
    expected = model(images), model(pixels)
    patchselect.skip_unread_outputs(model)
    for given, before in zip((images, pixels), expected):
        torch.testing.assert_close(model(given), before, rtol=1e-5, atol=1e-5)


NAMES = (*timm.list_models("naflexvit*"),
         "vit_base_patch16_224", "vit_betwixt_patch16_reg4_gap_256", "eva02_base_patch14_224",
         "vit_pe_core_base_patch16_224", "vit_small_patch16_dinov3")  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_names_that_timm_makes_one_of(name):
    if name.endswith("dinov3"):
        needs("rotary NaFlexVit")
    options = {} if name.startswith("naflexvit") else dict(use_naflex=True, embed_proj_type="linear", img_size=64)
    sizes = {} if "patch14" not in name else dict(patch_size=16)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SMALL, **options, **sizes).eval()
    assert isinstance(model, NaFlexVit) and find_towers(model)[0].adapter.name.startswith("timm-naflex")
    images = patches_of(SHAPES, 17)
    handle = patchselect.apply(model, 0.5, [1, 2])
    with handle.record() as trace, patchselect.guide(model, torch.randn(4, 48)):
        assert model(images).isfinite().all()
    assert trace[0].images[1].grid == (2, 4) and trace.of_image(1)[0].num_tokens == model.num_prefix_tokens + 5


VISION: dict[str, dict[str, Any]] = {
    "SigLIP 2": dict(timm_model_name="naflexvit_base_patch16_siglip", timm_pool="map", timm_proj="none"),
    "average": dict(timm_model_name="naflexvit_base_patch16_gap"),
    "register": dict(timm_model_name="naflexvit_so150m2_patch16_reg1_map", timm_pool="map"),
}


@torch.no_grad()
@pytest.mark.parametrize("vision", list(VISION))
def test_configurations_of_open_clip(vision):
    """Those of its next major version, which name NaFlexVits, as this one loads them."""
    needs("open_clip")
    import open_clip

    create = timm.create_model

    def create_small(name, **options):
        return create(name, **{**options, "pretrained": False}, **SMALL)

    text = dict(width=32, heads=2, layers=1, context_length=8, vocab_size=99)
    width = 48 if VISION[vision].get("timm_proj") == "none" else 24
    with mock.patch.object(timm, "create_model", create_small):
        model = open_clip.CustomTextCLIP(width, dict(VISION[vision], image_size=64), text).eval()
    images, tokens = patches_of(SHAPES, 17), torch.randint(1, 99, (4, 8))
    plain = model.encode_image(images)
    handle = patchselect.apply(model, 0.5, [1, 2], pairing="paired")
    with handle.record() as trace:
        found = model(images, tokens)[0]
    assert [len(entry.images) for entry in trace] == [4, 4] and found.shape == (4, width)
    scores = patchselect.score_pairs(model, images, tokens, progress=False)
    torch.testing.assert_close(scores.diagonal(), (found * model(images, tokens)[1]).sum(dim=1), rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(model.encode_image(images), plain)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(
            dict(attn_type="rope", num_kv_heads=2, qkv_fused=False), "share one key head", marks=since("grouped keys")
        ),
        pytest.param(dict(attn_layer="diff"), "the difference of two", marks=since("differential attention")),
        (dict(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "not plain pre-norm attention blocks"),
    ],
    ids=["grouped keys", "differences", "parallel"],
)
def test_what_is_none_of_these_is_refused_by_name(options, reason):
    model = NaFlexVit(**SMALL, **options)
    with pytest.raises(TypeError, match=f"NaFlexVit cannot be patched: .*{reason}"):
        patchselect.apply(model, 0.5)


def test_what_a_call_cannot_do_is_said():
    model = naflex(patch_drop_rate=0.25).model
    images = patches_of(SHAPES, 17)
    patchselect.apply(model.train(), 0.5, [1], guidance="image")
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        model(images)
    assert model(torch.randn(2, 3, 48, 80)).isfinite().all()
    model.eval()
    with pytest.raises(ValueError, match="called with attn_mask"):
        model({**images, "attn_mask": torch.zeros(4, 1, 17, 17)})
    with pytest.raises(ValueError, match="one patch_valid for tokens of several blocks"):
        model.forward_intermediates(images, output_fmt="NLC", output_dict=True)
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(torch.randn(2, 3, 48, 80))
    cut = copy.deepcopy(images)
    cut["patch_valid"][0, 14] = False
    with pytest.raises(ValueError, match="of whole images"):
        model(cut)
