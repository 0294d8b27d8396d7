"""What the snippets of the pages speak of, small and with random weights: models, images, tokenizers.

Pages import from here in comments that a browser does not show:

    <!-- invisible-code-block: python
    from stand_ins import clip, images, tokenizer
    model = clip()
    -->
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from doubles import albef as albef_doubles
from doubles import mplug as mplug_doubles
from doubles.text import Output, pictures, sentences
from hosts.case import VOCABULARY
from since import needs
from torch import Tensor, nn

DEPTH = 12
"""Blocks of the towers, so that the default layers are those that the pages name."""
LENGTH = 7


def _host(name: str, release: str | None = None) -> Any:
    return pytest.importorskip(name, release, reason=f"the page uses {name} {release or ''}")


def images(count: int = 4, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def tokenizer(texts: Sequence[str], **options: Any) -> Output:
    """Token ids and mask as a tokenizer of transformers gives them; the ids say which text it is, no more."""
    ids = torch.tensor([[3 + (7 * ord(letter) + i) % 90 for i, letter in enumerate(text[-5:])] for text in texts])
    ends = torch.full((len(texts), 1), VOCABULARY - 1)
    ids = torch.cat([ends - 1, ids, ends], dim=1)
    return Output(input_ids=ids, attention_mask=torch.ones_like(ids))


def clip() -> nn.Module:
    """A `CLIPModel` of transformers."""
    transformers = _host("transformers", "4.53")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY)
    text.update(bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=1)
    vision = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, image_size=64, patch_size=8)
    vision.update(num_hidden_layers=DEPTH)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def llava() -> nn.Module:
    """A `LlavaForConditionalGeneration` of transformers, whose tower is that of `clip`."""
    needs("short prompts")
    transformers = _host("transformers")
    dual = clip()
    language = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    config = transformers.LlavaConfig(
        vision_config=dual.config.vision_config,
        text_config=transformers.LlamaConfig(**language, vocab_size=VOCABULARY),
        image_token_id=VOCABULARY - 3,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    getattr(tower, "vision_model", tower).load_state_dict(dual.vision_model.state_dict())
    return model


def llava_inputs() -> dict[str, Tensor]:
    """What a processor makes of two prompts with one image each."""
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids[:, :1], torch.full((2, 64), VOCABULARY - 3), ids[:, 1:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(2)}


def open_clip() -> nn.Module:
    """A `CLIP` of open_clip."""
    library = _host("open_clip")
    vision = dict(image_size=64, layers=DEPTH, width=64, head_width=16, patch_size=8)
    text = dict(context_length=LENGTH, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    torch.manual_seed(0)
    return library.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


def vit_b_16() -> nn.Module:
    """CLIP's ViT-B/16 in its own size, without memory for its weights: for what is counted and not computed."""
    library = _host("open_clip")
    config = library.get_model_config("ViT-B-16")
    with torch.device("meta"):
        return library.CLIP(**config)


def open_clip_tokens(count: int = 4) -> Tensor:
    return tokenizer([f"text {letter}" for letter in "abcdefgh"[:count]]).input_ids


def blip_captioning() -> nn.Module:
    """A `BlipForConditionalGeneration` of transformers."""
    transformers = _host("transformers", "4.53")
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    text = dict(sizes, hidden_size=64, encoder_hidden_size=64, vocab_size=120, bos_token_id=1, sep_token_id=2)
    vision = dict(sizes, hidden_size=64, num_hidden_layers=DEPTH, image_size=64, patch_size=16)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    torch.manual_seed(0)
    return transformers.BlipForConditionalGeneration(config).eval()


def dinov2() -> nn.Module:
    """A DINOv2 with three registers, for images of 64 x 64 in patches of 16."""
    transformers = _host("transformers", "4.48")
    sizes = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=16, mlp_ratio=2)
    config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config).eval()


def dinov3() -> nn.Module:
    """A DINOv3 with three registers, for images of 64 x 64 in patches of 16."""
    transformers = _host("transformers")
    needs("DINOv3")
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
    config = transformers.DINOv3ViTConfig(**sizes, image_size=64, patch_size=16, num_register_tokens=3)
    return transformers.DINOv3ViTModel(config).eval()


def perception_encoder() -> nn.Module:
    """A PE-Core of timm, for images of 64 x 64 in patches of 16: rotary positions, pooled by attention."""
    timm = _host("timm")
    needs("perception encoders")
    sizes = dict(img_size=64, embed_dim=48, depth=6, num_heads=4, num_classes=24)
    return timm.create_model("vit_pe_core_base_patch16_224", pretrained=False, **sizes).eval()


def _named(model: nn.Module, **names: nn.Module) -> nn.Module:
    """The parts of a double under the names of the real code too, without registering them twice."""
    for name, part in names.items():
        object.__setattr__(model, name, part)
    return model


def albef() -> tuple[nn.Module, Tensor, Any]:
    """A head of ALBEF's structure, images and what its tokenizer gives."""
    torch.manual_seed(0)
    model = albef_doubles.Retrieval().eval()
    model.temp = 0.07
    _named(model, visual_encoder=model.eyes, text_encoder=model.words, itm_head=model.score)
    return model, pictures(4), sentences(4)


def mplug(kind: str = "Captioning") -> tuple[nn.Module, Tensor, Any]:
    """A head of mPLUG's structure, images and what its tokenizer gives."""
    torch.manual_seed(0)
    model = getattr(mplug_doubles, kind)().eval()
    return _named(model, visual_encoder=model.eyes), pictures(4), sentences(4)
