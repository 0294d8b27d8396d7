"""transformers models: weights from a folder or the cache, and the sizes of well-known ones without either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .host import RANDOM, Tokens, TransformersHost, first_line

CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": dict(patch_size=32),
    "openai/clip-vit-base-patch16": dict(patch_size=16),
    "openai/clip-vit-large-patch14": dict(patch_size=14),
    "openai/clip-vit-large-patch14-336": dict(patch_size=14, image_size=336),
}
"""Sizes of well-known transformers models, so that they can be timed without a connection."""

DINOV2 = "dinov2-base"
"""DINOv2-B at 224 px beside CLIP's text encoder, in one dual encoder: for speed alone, since none was trained."""

LARGE_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


def load_transformers(name: str, image_size: int | None, pretrained: str | None) -> TransformersHost:
    from transformers import AutoConfig, AutoModel

    local = Path(name).is_dir()
    if pretrained not in (None, "hub"):
        raise ValueError(
            f"{name} is no name of open_clip, and transformers takes --pretrained hub (to download) alone, got "
            f"{pretrained!r}: give weights for transformers as a folder, --model FOLDER"
        )
    notes: tuple[str, ...] = ()
    try:
        config = AutoConfig.from_pretrained(name)
        model, found = AutoModel.from_pretrained(name, output_loading_info=True)
        left_out = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
        is_random = bool(left_out)
        if left_out:
            notes = (f"{name} lacks {len(left_out)} weights, which are random: {', '.join(left_out[:3])}, …",)
    except (OSError, ValueError) as error:
        if local:
            raise ValueError(f"{name} holds no model that transformers can load: {first_line(error)}") from error
        config = _known_config(name)
        notes = (f"{name} is not in the local cache" + (f" ({first_line(error)})" if pretrained else ""),)
        if image_size is not None:
            config.vision_config.image_size = image_size
        model, is_random = AutoModel.from_config(config), True
    size = image_size or config.vision_config.image_size
    processor, is_own = _image_processor(name)
    if not is_own and not is_random:
        notes += (f"the image processor of {name} is not there: CLIP's stands in",)
    tokenizer = _tokenizer(name)
    tokenize, note = _tokenize(name, tokenizer, config.text_config)
    return TransformersHost(
        model=model.eval(),
        name=name,
        library="transformers",
        image_size=size,
        weights=RANDOM if is_random else f"weights: {name}",
        random_weights=is_random,
        preprocess=preprocessing(processor, size),
        tokenize=tokenize,
        notes=(*notes, *note),
        own_words=not note,
        loaded=(*((processor,) if is_own else ()), *((tokenizer,) if tokenizer is not None else ())),
    )


def _known_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, CLIPConfig

    if name == DINOV2:
        from transformers import CLIPTextConfig, Dinov2Config, VisionTextDualEncoderConfig

        return VisionTextDualEncoderConfig.from_vision_text_configs(Dinov2Config(image_size=224), CLIPTextConfig())
    if name in CLIP_CONFIGS:
        large = "large" in name
        vision = {**CLIP_CONFIGS[name], **(LARGE_VISION if large else {})}
        return CLIPConfig(
            vision_config=vision, text_config=LARGE_TEXT if large else {}, projection_dim=768 if large else 512
        )
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    raise ValueError(
        f"there is no model {name!r} here. Give a name of open_clip.list_models() (ViT-B-16, ViT-L-14, …), one of "
        f"{', '.join(CLIP_CONFIGS)}, a transformers model type (clip, siglip), a local checkpoint folder or file, "
        "or let it be downloaded: --model hf-hub:ORG/REPO (open_clip), --model ORG/REPO --pretrained hub (transformers)"
    )


def _image_processor(name: str) -> tuple[Any, bool]:
    """Return the model's own, or CLIP's in its place; and which of the two."""
    from transformers import AutoImageProcessor, CLIPImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name), True
    except (OSError, ValueError):
        return CLIPImageProcessor(), False


def preprocessing(processor: Any, size: int) -> Callable[[Image.Image], Tensor]:
    """Turn a picture into `(3, size, size)` as the processor does, changing no more than another size needs.

    The returned function raises a ValueError where the processor makes something else.
    """
    exact, own = {"height": size, "width": size}, dict(processor.size or {})
    asked: dict[str, Any] = {}
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        if crop != exact:
            # What is resized to before the crop keeps its proportion to it.
            asked = {"crop_size": exact}
            asked["size"] = {key: round(value * size / crop["height"]) for key, value in own.items()}
    elif own != exact or not getattr(processor, "do_resize", True):
        asked = {"size": exact, "do_resize": True}

    def preprocess(picture: Image.Image) -> Tensor:
        pixels = processor(picture, return_tensors="pt", **asked)["pixel_values"][0]
        if pixels.shape != (3, size, size):
            raise ValueError(
                f"{type(processor).__name__} makes {tuple(pixels.shape)} of a picture, the model is fed (3, {size}, "
                f"{size}): correct the preprocessor_config.json beside it"
            )
        return pixels  # type: ignore[no-any-return]

    return preprocess


def _tokenizer(name: str) -> Any:
    """Return the model's own, or `None`."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError):  # without files: TypeError in transformers 4.53
        return None
    # Without files, transformers 5 makes one that knows no words.
    return found if set(found.get_vocab()) - set(found.all_special_tokens) else None


def _tokenize(name: str, tokenizer: Any, text: Any) -> tuple[Callable[[list[str]], Tokens], tuple[str, ...]]:
    length, words = text.max_position_embeddings, text.vocab_size
    if tokenizer is not None:
        return lambda captions: _padded(tokenizer, captions, length), ()
    from open_clip import SimpleTokenizer

    clip = SimpleTokenizer(context_length=length)
    note = () if words == 49408 else (f"the tokenizer of {name} is not in the local cache: CLIP's stands in",)
    return lambda captions: {"input_ids": clip(captions) % words}, note


def _padded(tokenizer: Any, captions: list[str], length: int) -> Tokens:
    fixed = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return dict(tokenizer(captions, **fixed, return_token_type_ids=False))  # which CLIP and SigLIP do not read
