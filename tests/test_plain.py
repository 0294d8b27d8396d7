"""Plain ViTs of transformers, family by family: what each class keeps of the contract, and what is refused of it."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import pytest
import torch
from hosts.of_plain import SIZES, WIDE, transformers_with
from since import needs

import patchselect

SHALLOW = dict(WIDE, num_hidden_layers=4)
GATED = {**SIZES, "num_hidden_layers": 4, "mlp_ratio": 2}
STAGES = dict(out_features=["stage2", "stage4"])


class Kind(NamedTuple):
    """A class, its configuration, and what must come out of it."""

    config: str
    options: dict[str, Any]
    prefix: int
    feature: str = ""


KINDS = {
    "ViTModel": Kind("ViTConfig", SHALLOW, 1),
    "ViTForImageClassification": Kind("ViTConfig", SHALLOW, 1),
    "DeiTModel": Kind("DeiTConfig", SHALLOW, 2),
    "DeiTForImageClassification": Kind("DeiTConfig", SHALLOW, 2),
    "DeiTForImageClassificationWithTeacher": Kind("DeiTConfig", SHALLOW, 2),
    "Dinov2Model": Kind("Dinov2Config", GATED, 1, "DINOv2"),
    "Dinov2ForImageClassification": Kind("Dinov2Config", GATED, 1, "DINOv2"),
    "Dinov2Backbone": Kind("Dinov2Config", {**GATED, **STAGES, "reshape_hidden_states": False}, 1, "DINOv2"),
    "Dinov2WithRegistersModel": Kind("Dinov2WithRegistersConfig", GATED, 5, "DINOv2 with registers"),
    "Dinov2WithRegistersForImageClassification": Kind("Dinov2WithRegistersConfig", GATED, 5, "DINOv2 with registers"),
    "Dinov2WithRegistersBackbone": Kind(
        "Dinov2WithRegistersConfig", {**GATED, **STAGES, "reshape_hidden_states": False}, 5, "DINOv2 with registers"
    ),
    "ViTMSNModel": Kind("ViTMSNConfig", SHALLOW, 1, "ViT-MSN"),
    "ViTMSNForImageClassification": Kind("ViTMSNConfig", SHALLOW, 1, "ViT-MSN"),
    "IJepaModel": Kind("IJepaConfig", SHALLOW, 0, "I-JEPA"),
    "IJepaForImageClassification": Kind("IJepaConfig", SHALLOW, 0, "I-JEPA"),
    "Aimv2VisionModel": Kind("Aimv2VisionConfig", SHALLOW, 0, "AIMv2"),
    "FlavaImageModel": Kind("FlavaImageConfig", SHALLOW, 1, "FLAVA"),
    "Tipsv2VisionModel": Kind("Tipsv2VisionConfig", GATED, 2, "TIPSv2"),
}


def made(name: str, **more: Any) -> Any:
    """Build a model of one class, in eval mode, with noise on all that starts as ones and zeros."""
    kind = KINDS[name]
    transformers = transformers_with(*([kind.feature] if kind.feature else []))
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, kind.config)(**{**kind.options, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def output_of(model: Any, pixels: torch.Tensor, **more: Any) -> torch.Tensor:
    found = model(pixel_values=pixels, **more)
    return found.feature_maps[-1] if "feature_maps" in found else found[0]


@torch.no_grad()
@pytest.mark.parametrize("name", list(KINDS))
def test_each_class_keeps_the_contract(name):
    model, kind, pixels = made(name), KINDS[name], images()
    plain, text = output_of(model, pixels), torch.randn(3, 48)
    patchselect.apply(model, 1.0)
    with patchselect.guide(model, text):
        assert torch.equal(output_of(model, pixels), plain)
    for merge, tokens in ((0.0, [kind.prefix + 9, kind.prefix + 6]), (0.5, [kind.prefix + 9])):
        handle = patchselect.apply(model, 0.5, layers=None if merge == 0 else [2], merge=merge)
        with handle.record() as trace, patchselect.guide(model, text):
            guided = output_of(model, pixels)
        assert [entry.num_tokens for entry in trace] == tokens and trace[0].grid == (4, 4)
        assert handle.towers[0].adapter.own_patches(handle.towers[0]) == 16
        assert guided.isfinite().all()
        order = torch.tensor([2, 0, 1])
        with patchselect.guide(model, text[order]):
            torch.testing.assert_close(output_of(model, pixels[order]), guided[order], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(output_of(model, pixels), guided, rtol=1e-4, atol=1e-5), "the text matters"
    for guidance in ("image", "random"):
        patchselect.apply(model, 0.5, guidance=guidance)
        assert output_of(model, pixels).isfinite().all()
    patchselect.remove(model)
    assert torch.equal(output_of(model, pixels), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "Aimv2VisionModel", "FlavaImageModel"])
def test_attention_maps_are_shown_where_the_host_shows_them(name):
    needs("eager attention by name")
    model = made(name, attn_implementation="eager")
    patchselect.apply(model, 0.5, layers=[1], guidance="image")
    maps = model(pixel_values=images(), output_attentions=True).attentions
    prefix = KINDS[name].prefix
    assert [shown.shape[-1] - prefix for shown in maps] == [16, 16, 9, 9]


@torch.no_grad()
def test_masked_autoencoder_names_the_patches_that_it_has_left():
    transformers = transformers_with("ViTMAE")
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SHALLOW, mask_ratio=0.25)).eval()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    handle = patchselect.apply(model, 0.5, layers=[1], guidance="image")
    with handle.record() as trace:
        tokens = model(pixel_values=images(), noise=noise)[0]
    left = noise.argsort(dim=1)[:, :12]
    assert torch.equal(trace[0].places, left) and trace[0].kept.shape == (3, 6)
    assert all(set(kept.tolist()) <= set(row.tolist()) for kept, row in zip(trace[0].kept, left))
    dense = patchselect.restore(tokens, trace, fill=float("nan"))
    for row in range(3):
        for place, token in zip(trace[0].kept[row], tokens[row, 1:]):
            assert torch.equal(dense[row].flatten(0, 1)[place], token)


@torch.no_grad()
def test_joint_space_of_aimv2_guides_its_tower():
    transformers = transformers_with("AIMv2")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    config = transformers.Aimv2Config(
        vision_config=SHALLOW, text_config={**text, "eos_token_id": 98, "max_position_embeddings": 8}, projection_dim=24
    )
    model, ids = transformers.Aimv2Model(config).eval(), torch.randint(3, 90, (3, 7))
    for relevance in ("keys", "features", "joint"):
        patchselect.apply(model, 0.5, pairing="paired", relevance=relevance)
        of_call = model(input_ids=ids, pixel_values=images()).logits_per_image
        with patchselect.guide(model, model.get_text_features(input_ids=ids).pooler_output):
            torch.testing.assert_close(model(input_ids=ids, pixel_values=images()).logits_per_image, of_call)
    with pytest.raises(ValueError, match="Aimv2RMSNorm, not a LayerNorm"):
        patchselect.apply(model, 0.5, relevance="values")


@torch.no_grad()
def test_towers_of_tipsv2_are_compared_as_they_are():
    transformers = transformers_with("TIPSv2")
    text = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    model = transformers.Tipsv2Model(transformers.Tipsv2Config(vision_config=GATED, text_config=text)).eval()
    ids = torch.randint(3, 90, (3, 7))

    def logits():
        return model(input_ids=ids, pixel_values=images()).logits_per_image

    plain = logits()
    for relevance in ("keys", "features", "values", "joint"):
        patchselect.apply(model, 0.5, pairing="paired", relevance=relevance)
        of_call = logits()
        with patchselect.guide(model, model.get_text_features(input_ids=ids).pooler_output):
            torch.testing.assert_close(logits(), of_call)
        assert not torch.allclose(of_call, plain, rtol=1e-3, atol=1e-4)
    patchselect.remove(model)
    assert torch.equal(logits(), plain)


@torch.no_grad()
def test_timm_wrappers_of_transformers():
    transformers = transformers_with("timm wrapper")
    sizes = dict(depth=4, embed_dim=48, num_heads=4, img_size=64)
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=3)
    for kind in (transformers.TimmWrapperModel, transformers.TimmWrapperForImageClassification):
        model = kind(config).eval()
        plain = model(images())[0]
        handle = patchselect.apply(model, 0.5)
        with handle.record() as trace, patchselect.guide(model, torch.randn(3, 48)):
            assert not torch.equal(model(images())[0], plain)
        assert [entry.num_tokens for entry in trace] == [10, 7]
        with pytest.raises(ValueError, match="NLC"), patchselect.guide(model, torch.randn(3, 48)):
            model(images(), output_hidden_states=True)
        handle.remove()
        assert torch.equal(model(images())[0], plain)


@torch.no_grad()
def test_backbones_refuse_a_dense_grid_in_a_call():
    model = made("Dinov2Backbone", reshape_hidden_states=True)
    plain = output_of(model, images())
    patchselect.apply(model, 1.0, guidance="image")
    assert torch.equal(output_of(model, images()), plain)
    patchselect.apply(model, 0.5, guidance="image")
    with pytest.raises(ValueError, match="reshape_hidden_states = False.*restore"):
        model(images())


REFUSED: dict[str, tuple[str, str]] = {
    "ViTForMaskedImageModeling": ("its decoder may read a fixed number", ""),
    "ViTMAEForPreTraining": ("its decoder may read a fixed number", "ViTMAE"),
    "FlavaModel": (r"patchselect.apply\(model.image_model\)", "FLAVA"),
    "DPTForDepthEstimation": (r"patchselect.apply\(model.dpt\)", "DPT"),
    "YolosModel": ("YolosModel cannot be patched: its detection tokens stand behind the patches", "YOLOS"),
    "YolosForObjectDetection": ("its detection tokens stand behind the patches", "YOLOS"),
    "BeitModel": ("BeitModel cannot be patched: .*relative positions as one N × N map", "BEiT on meta"),
    "BeitForImageClassification": ("relative positions as one N × N map", "BEiT on meta"),
    "Data2VecVisionModel": ("Data2VecVisionModel cannot be patched: .*one N × N map", "BEiT on meta"),
    "VivitModel": ("VivitModel cannot be patched: its tokens are cut from several frames", "ViViT"),
    "GroupViTModel": ("GroupViTModel cannot be patched: its group tokens stand behind the patches", "GroupViT"),
    "GroupViTVisionModel": ("its group tokens stand behind the patches", "GroupViT"),
    "XCLIPModel": ("XCLIPModel cannot be patched: it averages patch i over the frames", "X-CLIP"),
    "XCLIPVisionModel": ("the class tokens of all frames of a video pass messages", "X-CLIP"),
    "BridgeTowerModel": ("BridgeTowerModel cannot be patched: the states of several of its blocks are", "BridgeTower"),
    "VideoMAEModel": ("VideoMAEModel cannot be patched: its tokens are cut from several frames", "VideoMAE"),
    "VJEPA2Model": ("VJEPA2Model cannot be patched: its tokens are cut from several frames", "V-JEPA 2"),
    "TimesformerModel": ("TimesformerModel cannot be patched: its blocks attend over time", "TimeSformer"),
    "Sapiens2Model": ("Sapiens2Model cannot be patched: several of its query heads share one", "Sapiens 2"),
    "RfDetrDinov2Backbone": ("it attends in windows of the grid", "RF-DETR"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_plain_is_refused_in_words(name):
    said, feature = REFUSED[name]
    needs("device context")
    kind: Callable[..., Any] = getattr(transformers_with(*([feature] if feature else [])), name)
    with torch.device("meta"):
        model = kind(kind.config_class())  # type: ignore[attr-defined]
    before = {path: type(part) for path, part in model.named_modules()}
    with pytest.raises(TypeError, match=said):
        patchselect.apply(model, 0.5)
    assert {path: type(part) for path, part in model.named_modules()} == before
