"""The table of supported hosts: real classes of each package, tiny, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 99


@dataclass
class Case:
    """A model and how to call it."""

    model: nn.Module
    image_side: Callable[[nn.Module, Any], Tensor]
    """Pooled image features `(B, E)` from images."""
    text_width: int
    images: Callable[[int], Any]
    tower: Callable[[nn.Module], nn.Module]
    prefix: int
    patches: int
    grid: tuple[int, int]
    pair: Callable[[nn.Module, Any, Tensor], Tensor] | None = None
    """`(N, M)` logits or image features from a call with image and text together."""
    text_side: Callable[[nn.Module, Tensor], Tensor] | None = None
    relevances: tuple[str, ...] = ("keys", "features", "values", "joint")
    extra: dict[str, Any] = field(default_factory=dict)


def ids(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY - 2, (batch, 7), generator=generator)
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return tokens


def pixels(height: int = 64, width: int = 64) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


def pooled(output: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY)
VISION = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=16
)
CLIP_TEXT = dict(TEXT, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=1)
ROBERTA_TEXT = dict(TEXT, pad_token_id=1, max_position_embeddings=40, project_dim=24)


def _dual(model: nn.Module, width: int, prefix: int = 1, **extra: Any) -> Case:
    return Case(
        model=model,
        image_side=lambda m, x: pooled(m.get_image_features(pixel_values=x)),
        text_side=lambda m, t: pooled(m.get_text_features(input_ids=t)),
        pair=lambda m, x, t: m(input_ids=t, pixel_values=x).logits_per_image,
        text_width=width,
        images=pixels(),
        tower=lambda m: m.vision_model,
        prefix=prefix,
        patches=16,
        grid=(4, 4),
        **extra,
    )


def clip() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=24)
    return _dual(transformers.CLIPModel(config), 24)


def chinese_clip() -> Case:
    transformers = pytest.importorskip("transformers")
    text = dict(ROBERTA_TEXT, max_position_embeddings=40)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    case = _dual(transformers.ChineseCLIPModel(config), 24)
    # get_text_features of 4.57 projects a pooler output that the model does not have.
    case.text_side = lambda m, t: m.text_projection(m.text_model(input_ids=t).last_hidden_state[:, 0])
    return case


def alt_clip() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.AltCLIPConfig(text_config=ROBERTA_TEXT, vision_config=VISION, projection_dim=24)
    return _dual(transformers.AltCLIPModel(config), 24)


def metaclip2() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.MetaClip2Config(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=24)
    return _dual(transformers.MetaClip2Model(config), 24)


def siglip() -> Case:
    transformers = pytest.importorskip("transformers")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, max_position_embeddings=7, projection_size=48)
    return _dual(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION)), 48, 0)


def _patchified(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(batch, 15, 3 * 16 * 16, generator=generator),
        "pixel_attention_mask": torch.ones(batch, 15, dtype=torch.long),
        "spatial_shapes": torch.tensor([[3, 5]] * batch),
    }


def siglip2() -> Case:
    transformers = pytest.importorskip("transformers")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, max_position_embeddings=7, projection_size=48)
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    case = _dual(model, 48, 0)
    case.images, case.patches, case.grid = _patchified, 15, (3, 5)
    case.image_side = lambda m, x: pooled(m.get_image_features(**x))
    case.pair = lambda m, x, t: m(input_ids=t, **x).logits_per_image
    return case


def clip_vision() -> Case:
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    tower = model.vision_model if hasattr(model, "vision_model") else model
    size = dict(images=pixels(), prefix=1, patches=16, grid=(4, 4))
    path = "vision_model" if tower is not model else ""
    return Case(model, lambda m, x: m(x).pooler_output, 48, tower=lambda m: m.get_submodule(path), **size)


def clip_vision_projected() -> Case:
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24))
    size = dict(images=pixels(), prefix=1, patches=16, grid=(4, 4))
    return Case(model, lambda m, x: m(x).image_embeds, 24, tower=lambda m: m.vision_model, **size)


def _open_clip(name: str, **vision: Any) -> Case:
    from open_clip import CLIP, CustomTextCLIP

    sizes = dict(image_size=64, layers=6, width=64, head_width=16, patch_size=16) | vision
    text = dict(context_length=7, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    kind = CustomTextCLIP if name == "custom" else CLIP
    model = kind(embed_dim=24, vision_cfg=sizes, text_cfg=text)
    return Case(
        model=model,
        image_side=lambda m, x: m.encode_image(x),
        text_side=lambda m, t: m.encode_text(t),
        pair=lambda m, x, t: m.get_logits(x, t)[0],
        text_width=24,
        images=pixels(),
        tower=lambda m: m.visual.trunk if hasattr(m.visual, "trunk") else m.visual,
        prefix=1,
        patches=16,
        grid=(4, 4),
    )


def open_clip() -> Case:
    pytest.importorskip("open_clip")
    return _open_clip("clip")


def open_clip_custom_average() -> Case:
    pytest.importorskip("open_clip")
    return _open_clip("custom", pool_type="avg", final_ln_after_pool=True, ls_init_value=0.5, no_ln_pre=True)


def open_clip_pooler() -> Case:
    pytest.importorskip("open_clip")
    case = _open_clip("clip", attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2)
    case.relevances = ("keys", "features", "values")
    return case


def open_clip_normalised_keys() -> Case:
    pytest.importorskip("open_clip")
    return _open_clip("clip", qk_norm=True)


def coca() -> Case:
    module = pytest.importorskip("open_clip.coca_model")
    text = dict(context_length=7, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    vision = dict(image_size=64, layers=6, width=64, head_width=16, patch_size=16)
    pool = dict(attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2, output_tokens=True)
    model = module.CoCa(
        embed_dim=32,
        multimodal_cfg=module.MultimodalCfg(width=32, heads=2, layers=2, context_length=7, vocab_size=VOCABULARY),
        text_cfg=text | {"embed_cls": True, "output_tokens": True},
        vision_cfg=vision | pool,
    )
    case = _open_clip("clip")
    case.model, case.text_width, case.relevances = model, 32, ("keys", "features", "values")
    case.text_side = lambda m, t: m.encode_text(t)
    case.pair = lambda m, x, t: m(x, t)["image_features"]
    return case


def open_clip_siglip() -> Case:
    pytest.importorskip("open_clip")
    timm = pytest.importorskip("timm")
    case = _open_clip("clip")
    from open_clip.timm_model import TimmModel

    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    sizes = dict(img_size=64, patch_size=16, embed_dim=48, depth=6, num_heads=4, num_classes=0)
    visual.trunk = timm.models.VisionTransformer(class_token=False, global_pool="map", **sizes)
    visual.head = nn.Sequential()
    visual.image_size = (64, 64)
    case.model.visual = visual
    case.model.text_projection = nn.Parameter(torch.randn(32, 48) * 0.1)
    case.text_width, case.prefix = 48, 0
    return case


def _timm(**options: Any) -> Case:
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=(48, 80), patch_size=16, embed_dim=48, depth=6, num_heads=4, num_classes=10)
    model = timm.models.VisionTransformer(**sizes | options)
    return Case(
        model=model,
        image_side=lambda m, x: m(x),
        text_width=48,
        images=pixels(48, 80),
        tower=lambda m: m,
        prefix=model.num_prefix_tokens,
        patches=15,
        grid=(3, 5),
    )


def timm_class_token() -> Case:
    return _timm(init_values=0.3)


def timm_registers() -> Case:
    return _timm(reg_tokens=4, qk_norm=True)


def timm_average() -> Case:
    return _timm(class_token=False, global_pool="avg")


def _double(model: nn.Module, tower: str, text_width: int, image_side: Any, *relevances: str) -> Case:
    size = dict(images=pixels(32, 32), prefix=1, patches=16, grid=(4, 4), relevances=relevances)
    return Case(model, image_side, text_width, tower=lambda m: m.get_submodule(tower), **size)


def openai_clip() -> Case:
    from doubles.clip import Clip

    relevances = ("keys", "features", "values", "joint")
    case = _double(Clip(), "visual", 24, lambda m, x: m.encode_image(x), *relevances)
    case.text_side, case.pair = lambda m, t: m.encode_text(t), lambda m, x, t: m(x, t)[0]
    return case


def albef() -> Case:
    from doubles.albef import Retrieval

    return _double(Retrieval(), "eyes", 32, lambda m, x: m.eyes(x)[:, 0], "keys", "features", "values")


def albef_tower() -> Case:
    from doubles.albef import Vit

    return _double(Vit(), "", 32, lambda m, x: m(x)[:, 0], "keys", "features", "values")


def mplug() -> Case:
    from doubles.mplug import Answering

    model = Answering(large=True)
    return _double(model, "eyes.visual", 32, lambda m, x: m.eyes.visual(x, True)[:, 0], "keys", "features")


def blip() -> Case:
    transformers = pytest.importorskip("transformers")
    text = dict(TEXT, hidden_size=48, num_attention_heads=4, encoder_hidden_size=48, max_position_embeddings=40)
    tokens = dict(bos_token_id=VOCABULARY - 2, sep_token_id=VOCABULARY - 1, pad_token_id=0)
    config = transformers.BlipConfig(
        text_config=text | tokens | {"initializer_range": 0.2},
        vision_config=VISION | {"initializer_range": 0.2},
        image_text_hidden_size=24,
    )
    case = _dual(transformers.BlipForImageTextRetrieval(config), 48)
    case.image_side = lambda m, x: m.vision_model(pixel_values=x).last_hidden_state[:, 0]
    case.text_side = lambda m, t: m.text_encoder(input_ids=t).last_hidden_state[:, 0]
    case.pair = lambda m, x, t: m(input_ids=t, pixel_values=x, use_itm_head=False).itm_score
    case.relevances = ("keys", "features", "values")
    return case


HOSTS: dict[str, Callable[[], Case]] = {
    builder.__name__: builder
    for builder in (
        clip,
        chinese_clip,
        alt_clip,
        metaclip2,
        siglip,
        siglip2,
        clip_vision,
        clip_vision_projected,
        open_clip,
        open_clip_custom_average,
        open_clip_pooler,
        open_clip_normalised_keys,
        coca,
        open_clip_siglip,
        timm_class_token,
        timm_registers,
        timm_average,
        openai_clip,
        albef,
        albef_tower,
        mplug,
        blip,
    )
}


def build(name: str, seed: int = 0) -> Case:
    """A host of the table in eval mode; norms, biases and scales are random too, so that nothing is hidden by ones."""
    torch.manual_seed(seed)
    case = HOSTS[name]()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if not parameter.abs().max() < 100:  # open_clip leaves some parameters uninitialised
                parameter.normal_(generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    case.model.eval()
    return case


def take(images: Any, rows: Any) -> Any:
    """Rows of a batch of images, whatever the host calls images."""
    return {key: value[rows] for key, value in images.items()} if isinstance(images, dict) else images[rows]
