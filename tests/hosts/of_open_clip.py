"""Hosts of open_clip, with its own tower or with one of timm, and towers of timm alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from since import needs
from torch import nn

from .case import VOCABULARY, Case, pixels


def _open_clip(name: str, **vision: Any) -> Case:
    from open_clip import CLIP, CustomTextCLIP

    sizes = {**dict(image_size=64, layers=6, width=64, head_width=16, patch_size=16), **vision}
    text = dict(context_length=7, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    kind = CustomTextCLIP if name == "custom" else CLIP
    model = kind(embed_dim=24, vision_cfg=sizes, text_cfg=text)
    return Case(
        model=model,
        image_side=lambda m, x: m.encode_image(x),
        text_side=lambda m, t: m.encode_text(t),
        pair=logits,
        text_width=24,
        images=pixels(),
        tower=lambda m: m.visual.trunk if hasattr(m.visual, "trunk") else m.visual,
        prefix=1,
        patches=16,
        grid=(4, 4),
    )


def logits(model: Any, images: Any, tokens: Any) -> Any:
    """Return `(B, T)`: by the model's own method, or of its features, where this release has none (2.20: seen)."""
    if hasattr(model, "get_logits"):
        return model.get_logits(images, tokens)[0]
    image, text, scale = model(images, tokens)[:3]
    return scale * image @ text.T


def vision_fields() -> set[str]:
    """Return the switches that this release's towers have."""
    from open_clip import CLIPVisionCfg

    return {field.name for field in dataclasses.fields(CLIPVisionCfg)}


def pooler() -> dict[str, int]:
    """Return the sizes of an attentional pooler by the names of this release."""
    return {
        "attn_pooler_queries" if "attn_pooler_queries" in vision_fields() else "n_queries": 8,
        "attn_pooler_heads": 2,
    }


def open_clip() -> Case:
    needs("open_clip")
    return _open_clip("clip")


def open_clip_custom_average() -> Case:
    needs("open_clip")
    if "pool_type" in vision_fields():
        return _open_clip("custom", pool_type="avg", final_ln_after_pool=True, ls_init_value=0.5, no_ln_pre=True)
    return _open_clip("custom", global_average_pool=True, ls_init_value=0.5)


def open_clip_pooler() -> Case:
    needs("open_clip")
    case = _open_clip("clip", attentional_pool=True, **pooler())
    case.relevances = ("keys", "features", "values")
    return case


def open_clip_normalised_keys() -> Case:
    needs("normalised keys")
    return _open_clip("clip", qk_norm=True)


def coca() -> Case:
    needs("CoCa")
    from open_clip import coca_model as module

    text = dict(context_length=7, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    vision = dict(image_size=64, layers=6, width=64, head_width=16, patch_size=16)
    pool = dict(attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2, output_tokens=True)
    model = module.CoCa(
        embed_dim=32,
        multimodal_cfg=module.MultimodalCfg(width=32, heads=2, layers=2, context_length=7, vocab_size=VOCABULARY),
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg={**vision, **pool},
    )
    case = _open_clip("clip")
    case.model, case.text_width, case.relevances = model, 32, ("keys", "features", "values")
    case.text_side = lambda m, t: m.encode_text(t)
    case.pair = lambda m, x, t: m(x, t)["image_features"]
    return case


def open_clip_siglip() -> Case:
    needs("open_clip", "registers")
    case = _open_clip("clip")
    from open_clip.timm_model import TimmModel

    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    sizes = dict(img_size=64, patch_size=16, embed_dim=48, depth=6, num_heads=4, num_classes=0)
    visual.trunk = vision_transformer()(class_token=False, global_pool="map", **sizes)
    visual.head = nn.Sequential()
    visual.image_size = (64, 64)
    case.model.visual = visual
    case.model.text_projection = nn.Parameter(torch.randn(32, 48) * 0.1)
    case.text_width, case.prefix = 48, 0
    return case


def vision_transformer() -> Any:
    """Return timm's class; `timm.models` has it under its own name in some releases only."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def bare(model: Any) -> Case:
    """Describe a ViT of timm, 48 wide, that cuts images of 48 x 80 into patches of 16."""
    return Case(
        model=model,
        image_side=lambda m, x: m(x),
        text_width=48,
        images=pixels(48, 80),
        tower=lambda m: m,
        prefix=getattr(model, "num_prefix_tokens", 1),
        patches=15,
        grid=(3, 5),
    )


def _timm(**options: Any) -> Case:
    needs("timm")
    sizes = dict(img_size=(48, 80), patch_size=16, embed_dim=48, depth=6, num_heads=4, num_classes=10)
    return bare(vision_transformer()(**{**sizes, **options}))


def timm_class_token() -> Case:
    """Build a tower with LayerScale where the release has it."""
    needs("timm")
    scaled = "init_values" in inspect.signature(vision_transformer()).parameters
    return _timm(**({"init_values": 0.3} if scaled else {}))


def timm_registers() -> Case:
    needs("registers")
    return _timm(reg_tokens=4, qk_norm=True)


def timm_average() -> Case:
    needs("average pooling")
    return _timm(class_token=False, global_pool="avg")


def eva(**options: Any) -> Case:
    """Build an Eva of timm with rotary positions; `options` are its own."""
    needs("rotary towers")
    from timm.models.eva import Eva

    sizes = dict(img_size=(48, 80), patch_size=16, embed_dim=48, depth=6, num_heads=4, num_classes=10)
    return bare(Eva(**{**sizes, "use_rot_pos_emb": True, **options}))


def timm_eva02() -> Case:
    """Build an EVA-02 of CLIP: a gated MLP, and norms within attention and MLP, which cannot be read backwards."""
    case = eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, init_values=0.3)
    case.relevances = ("keys", "features", "joint")
    return case


def open_clip_perception() -> Case:
    """Build what open_clip makes of PE-Core: rotary positions and attention pooling on a trunk of timm."""
    needs("open_clip", "perception encoders")
    from open_clip.timm_model import TimmModel

    case = _open_clip("clip")
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.trunk = eva(
        img_size=64, num_classes=24, attn_type="rope", global_pool="map", use_pre_transformer_norm=True,
        use_post_transformer_norm=True, use_fc_norm=False, head_init_scale=1.0, rope_grid_offset=1.0,
        rope_grid_indexing="xy",
    ).model  # fmt: skip
    visual.head = nn.Sequential()
    visual.image_size = (64, 64)
    case.model.visual = visual
    return case


def patches_of(shapes: Sequence[tuple[int, int]], length: int) -> dict[str, torch.Tensor]:
    """Return patches of images of these sizes, as timm's collator pads them to one length; padding is not zero."""
    generator = torch.Generator().manual_seed(5)
    patches = torch.stack([torch.randn(length, 768, generator=generator) for _ in shapes])
    coord = torch.zeros(len(shapes), length, 2, dtype=torch.long)
    for row, (height, width) in enumerate(shapes):
        coord[row, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    counts = torch.tensor([height * width for height, width in shapes])
    return {"patches": patches, "patch_coord": coord, "patch_valid": torch.arange(length) < counts[:, None]}


def naflex(**options: Any) -> Case:
    """Build a NaFlexVit of timm, called with pixels; test_padded.py has its patches. `options` are its own."""
    needs("NaFlexVit")
    from timm.models.naflexvit import NaFlexVit

    sizes = dict(embed_dim=48, depth=6, num_heads=4, num_classes=10, pos_embed_grid_size=(3, 5))
    return bare(NaFlexVit(**{**sizes, **options}))


def timm_naflex() -> Case:
    """Build one that pools by attention, with a register and LayerScale."""
    return naflex(reg_tokens=1, init_values=0.3)


def timm_naflex_rotary() -> Case:
    """Build one of EVA's blocks, with rotary positions of each image's own grid, a class token and normalised keys."""
    needs("rotary NaFlexVit")
    return naflex(
        class_token=True, global_pool="token", rope_type="dinov3", rope_rotate_half=True, qk_norm=True, swiglu_mlp=True
    )


def open_clip_naflex() -> Case:
    """Build what open_clip makes of a configuration that names a NaFlexVit; it is pooled by average and projected."""
    needs("open_clip", "NaFlexVit")
    from open_clip.timm_model import TimmModel

    case = _open_clip("custom")
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    made = naflex(global_pool="avg", num_classes=0)
    visual.trunk, visual.image_size = made.model, (64, 64)
    visual.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0), proj=nn.Linear(48, 24, bias=False)))
    case.model.visual = visual
    case.images, case.prefix, case.patches, case.grid = made.images, 0, 15, (3, 5)
    return case
