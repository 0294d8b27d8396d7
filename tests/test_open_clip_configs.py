"""Every ViT configuration that open_clip ships: shrunk, guided, restored; everything else refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any
from unittest import mock

import pytest
import torch
from since import SLOW, needs, since

import patchselect
from patchselect.functional import num_kept
from patchselect.wiring.towers import find_towers

needs("open_clip", "timm", module=True)
import open_clip
import timm

TIMM_SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
ROTARY = ("eva", "vit_pe")
HYBRID = ("vit_base_mci", "vitamin")
VITS = ("vit_base", "vit_large", "vit_so400m", "vit_giantopt", "vit_medium", "vitamin", *ROTARY)
"""How the names of timm's vision transformers begin; all other trunks are refused."""
CONFIGS = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}


def kind(config) -> str:
    vision = config.get("vision_cfg") or {}
    name = vision.get("timm_model_name")
    if "audio_cfg" in config or "genlip_cfg" in config or not vision:
        return "other"
    if name is None:
        return "refused" if isinstance(vision.get("layers"), list) else "own"
    return "timm" if name.startswith(VITS) else "refused"


OWN = [name for name, config in CONFIGS.items() if kind(config) == "own"]
TIMM = [name for name, config in CONFIGS.items() if kind(config) == "timm"]
REFUSED = [name for name, config in CONFIGS.items() if kind(config) == "refused"]


def once(names: list[str]) -> list[Any]:
    """Mark configurations whose trunk an earlier one has at another size: they are built where there is time."""
    seen: set[str] = set()
    found = []
    for name in names:
        trunk = CONFIGS[name]["vision_cfg"].get("timm_model_name") or "resnet"
        family = re.sub(r"(_w)?_[0-9]+$", "", trunk) if trunk.startswith((*HYBRID, "resnet")) else trunk
        family = re.match("[a-z]+", trunk).group() if name in REFUSED else family  # type: ignore[union-attr]
        again = family in seen and (trunk.startswith(HYBRID) or name in REFUSED)
        reason = f"{family} at one size is enough: set PATCHSELECT_SLOW=1"
        found.append(pytest.param(name, marks=pytest.mark.skipif(again and not SLOW, reason=reason)))
        seen.add(family)
    return found


TRANSFORMERS_TEXT = [name for name in OWN if CONFIGS[name]["text_cfg"].get("hf_model_name")]


def shrunk(name: str):
    """The configuration with its every switch, in small."""
    config = copy.deepcopy(CONFIGS[name])
    config.pop("custom_text", None)
    vision, text = config["vision_cfg"], config["text_cfg"]
    custom = (
        CONFIGS[name].get("custom_text")
        or text.get("text_arch") == "modern"
        or "multimodal_cfg" in config
        or "hf_model_name" in text
    )
    vision.update(image_size=vision["patch_size"] * 3 if "patch_size" in vision else 64)
    vision.update(layers=4, width=64, head_width=16)
    vision.pop("mlp_ratio", None)
    if vision.get("attentional_pool"):
        vision.update(attn_pooler_heads=2, attn_pooler_queries=vision.get("attn_pooler_queries", 8) and 8)
    # CoCa's decoder is as wide as the image tokens that it reads: pooled to the joint width, or the tower's own.
    width = 64 if "multimodal_cfg" in config and not vision.get("attentional_pool") else 32
    small = dict(width=width, heads=2, layers=1, context_length=8, vocab_size=99)
    plain = {
        k: v for k, v in text.items() if not k.startswith(("hf_", "tokenizer")) and k not in ("pooler_type", "proj")
    }
    config["text_cfg"] = {**{k: v for k, v in plain.items() if k not in small}, **small}
    config["embed_dim"] = 32
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(small)
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def settle(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max() < 100:  # some parameters are born uninitialised
                parameter.normal_(std=0.1)


def check(model, images: torch.Tensor, prefix: int, patches: int) -> None:
    settle(model.eval())
    tokens = torch.randint(1, 99, (2, 8))
    with torch.no_grad():
        before = model.encode_image(images)
        handle = patchselect.apply(model, 0.5, pairing="paired")
        with handle.record() as trace:
            guided = model(images, tokens)
        guided = guided["image_features"] if isinstance(guided, dict) else guided[0]
        kept = num_kept(patches, 0.5)
        assert [entry.num_tokens for entry in trace] == [prefix + kept + 1, prefix + num_kept(kept + 1, 0.5) + 1]
        assert guided.isfinite().all() and not torch.equal(guided, before)
        handle.remove()
        assert torch.equal(model.encode_image(images), before)


@since("56 configurations")
def test_the_lists_are_what_the_readme_says():
    assert len(OWN) >= 56 and len(TRANSFORMERS_TEXT) >= 8 and len(TIMM) >= 58 and len(REFUSED) <= 30
    neither = [name for name in CONFIGS if name not in {*OWN, *TIMM, *REFUSED}]
    assert all("vision_cfg" not in CONFIGS[name] or "genlip_cfg" in CONFIGS[name] for name in neither), neither


@pytest.mark.parametrize("name", OWN)
def test_own_vision_transformer(name):
    if "multimodal_cfg" in CONFIGS[name]:
        needs("CoCa")
    model = shrunk(name)
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    assert find_towers(model)[0].adapter.name == "open_clip"
    check(model, torch.randn(2, 3, height, width), 1, 9)


@pytest.mark.parametrize("name", once(TIMM))
def test_timm_tower(name):
    needs("average pooling")
    config = copy.deepcopy(CONFIGS[name])
    config.pop("custom_text", None)
    config.pop("tokenizer_cfg", None)
    create = timm.create_model

    def create_small(model_name, **options):
        options.pop("pretrained", None)
        of_stem = model_name.startswith(HYBRID)  # whose convolutions give width and stride
        small = dict(img_size=64, depth=2) if of_stem else TIMM_SMALL
        return create(model_name, **options, **small)

    config["text_cfg"] = dict(width=32, heads=2, layers=1, context_length=8, vocab_size=99)
    projected = config["vision_cfg"].get("timm_proj") in ("linear", "mlp")
    config["embed_dim"] = 24 if projected else 32
    with mock.patch.object(timm, "create_model", create_small):
        model = open_clip.CustomTextCLIP(**config)
    rotary = CONFIGS[name]["vision_cfg"]["timm_model_name"].startswith(ROTARY)
    assert find_towers(model)[0].adapter.name == ("open_clip-eva" if rotary else "open_clip-timm")
    check(model, torch.randn(2, 3, 64, 64), model.visual.trunk.num_prefix_tokens, 16)


@since("towers on meta", "timm on meta")
@pytest.mark.parametrize("name", once(REFUSED))
def test_everything_else_is_refused_by_name(name):
    config = copy.deepcopy(CONFIGS[name])
    for extra in ("custom_text", "tokenizer_cfg"):
        config.pop(extra, None)
    config["text_cfg"] = dict(width=32, heads=2, layers=1, context_length=8, vocab_size=99)
    with torch.device("meta"):
        trunk = config["vision_cfg"].get("timm_model_name")
        model = (open_clip.CustomTextCLIP if trunk else open_clip.CLIP)(**config)
    kind = type(model.visual.trunk if trunk else model.visual).__name__
    with pytest.raises(TypeError, match=f"{kind} of .* cannot be patched: (it|its) "):
        patchselect.apply(model, 0.5)


@pytest.mark.parametrize("name", TRANSFORMERS_TEXT)
def test_text_towers_of_transformers(name):
    """The real text tower class of open_clip around a tiny encoder of transformers."""
    needs("text towers")
    import transformers
    from open_clip.hf_model import HFTextEncoder

    model = shrunk(name)
    captions = hasattr(model, "text_decoder")
    width = 64 if captions else 32
    settings = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    tiny = transformers.RobertaConfig(**settings, pad_token_id=0, max_position_embeddings=20)
    with mock.patch.object(transformers.AutoConfig, "from_pretrained", return_value=tiny):
        model.text = HFTextEncoder(
            "tiny",
            output_dim=32,
            pooler_type="mean_pooler",
            proj_type="linear",
            pretrained=False,
            output_tokens=captions,
        )
    check(model, torch.randn(2, 3, *model.visual.image_size), 1, 9)


@since("scaled cosine")
def test_relevance_by_scaled_cosine_is_the_attention_of_the_block():
    """Also with the next major version: `PYTHONPATH=…/open_clip/src pytest -k scaled_cosine`."""
    vision = dict(image_size=64, layers=3, width=64, head_width=16, patch_size=16, scaled_cosine_attn=True)
    text = dict(width=32, heads=2, layers=1, context_length=8, vocab_size=99)
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    settle(model.eval())
    maps = []
    attention = model.visual.transformer.resblocks[1].attn
    attention.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
    # Releases 3.x hand `bmm` four dimensions here, which it refuses.
    with mock.patch("torch.bmm", torch.matmul):
        handle = patchselect.apply(model, 0.5, layers=[1], guidance="image", relevance="keys")
    maps.clear()
    with torch.no_grad(), handle.record() as trace, mock.patch("torch.bmm", torch.matmul):
        model.encode_image(torch.randn(2, 3, 64, 64))
    of_class_token = maps[0][:, :, 0, 1:]
    expected = (of_class_token / of_class_token.sum(dim=-1, keepdim=True)).mean(dim=1)
    torch.testing.assert_close(trace[0].relevance, expected)
