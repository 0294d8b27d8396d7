"""transformers models: weights from a folder or the cache, and the sizes of well-known ones without either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .host import RANDOM, TransformersHost, first_line

CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": dict(patch_size=32),
    "openai/clip-vit-base-patch16": dict(patch_size=16),
    "openai/clip-vit-large-patch14": dict(patch_size=14),
    "openai/clip-vit-large-patch14-336": dict(patch_size=14, image_size=336),
}
"""Sizes of well-known transformers models, so that they can be timed without a connection."""

LARGE_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


def load_transformers(name: str, image_size: int | None, pretrained: str | None) -> TransformersHost:
    from transformers import AutoConfig, AutoModel

    local = Path(name).is_dir()
    try:
        config, notes = AutoConfig.from_pretrained(name), ()
        model, is_random = AutoModel.from_pretrained(name), False
    except (OSError, ValueError) as error:
        if local:
            raise ValueError(f"{name} holds no model that transformers can load: {first_line(error)}") from error
        config = _known_config(name)
        notes = (f"{name} is not in the local cache" + (f" ({first_line(error)})" if pretrained else ""),)
        if image_size is not None:
            config.vision_config.image_size = image_size
        model, is_random = AutoModel.from_config(config), True
    size = image_size or config.vision_config.image_size
    tokenize, note = _transformers_tokenizer(name, config)
    return TransformersHost(
        model=model.eval(),
        name=name,
        library="transformers",
        image_size=size,
        weights=RANDOM if is_random else f"weights: {name}",
        random_weights=is_random,
        preprocess=_transformers_preprocessing(name, config, size),
        tokenize=tokenize,
        notes=(*notes, *note),
    )


def _known_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, CLIPConfig

    if name in CLIP_CONFIGS:
        large = "large" in name
        vision = CLIP_CONFIGS[name] | (LARGE_VISION if large else {})
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


def _transformers_preprocessing(name: str, config: Any, size: int) -> Any:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        processor = (
            AutoImageProcessor.for_model(config.model_type) if hasattr(AutoImageProcessor, "for_model") else None
        )
        if processor is None:
            from transformers import CLIPImageProcessor

            processor = CLIPImageProcessor()
    exact = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size}, "crop_size": exact} if getattr(processor, "crop_size", None) else {}
    sizes = sizes or {"size": exact}
    return lambda picture: processor(picture, return_tensors="pt", **sizes)["pixel_values"][0]


def _transformers_tokenizer(name: str, config: Any) -> tuple[Any, tuple[str, ...]]:
    from transformers import AutoTokenizer

    length = config.text_config.max_position_embeddings
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        from open_clip import SimpleTokenizer

        clip, words = SimpleTokenizer(context_length=length), config.text_config.vocab_size
        note = () if words == 49408 else (f"the tokenizer of {name} is not in the local cache: CLIP's stands in",)
        return lambda captions: {"input_ids": clip(captions) % words}, note
    return lambda captions: _padded(tokenizer, captions, length), ()


def _padded(tokenizer: Any, captions: list[str], length: int) -> dict[str, Tensor]:
    return dict(tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"))
