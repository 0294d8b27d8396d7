"""open_clip models: weights from the cache, a tag or a file; architecture from the shapes of a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .host import RANDOM, OpenClipHost, first_line


def is_open_clip(name: str) -> bool:
    """Tell whether open_clip is installed and has an architecture of that name."""
    try:
        import open_clip
    except ModuleNotFoundError:
        return False
    return name.replace("/", "-") in open_clip.list_models()


def load_open_clip(name: str, image_size: int | None, pretrained: str | None) -> OpenClipHost:
    import open_clip

    has_own_weights = name.startswith(("hf-hub:", "local-dir:"))
    source = pretrained if has_own_weights else pretrained or _cached_tag(name)
    if has_own_weights and source is not None and not Path(source).is_file():
        raise ValueError(f"{name} has weights of its own: --pretrained can be a file with others, got {source!r}")
    notes: tuple[str, ...] = ()
    is_random = source is None and not has_own_weights
    quick = not has_own_weights and source is not None and _quick_gelu(name, source)
    create = partial(open_clip.create_model_and_transforms, name, force_image_size=image_size, force_quick_gelu=quick)
    try:
        if not has_own_weights:
            model, _, preprocess = create(pretrained=source)
        else:
            model, _, preprocess = create(require_pretrained=source is None)
            if source is not None:
                open_clip.load_checkpoint(model, source)
    except (OSError, RuntimeError) as error:  # no connection, no such file, or weights of another architecture
        if is_random:
            raise
        notes, is_random = (f"weights {source or name!r} could not be loaded ({first_line(error)})",), True
        model, _, preprocess = create()
    if source is not None and Path(source).is_file() and f"{name}-quickgelu" in open_clip.list_models():
        notes += (
            f"{source} is taken for weights with GELU: for QuickGELU, as OpenAI's, give --model {name}-quickgelu",
        )
    config = open_clip.get_model_config(name)
    config["quick_gelu"] = quick or config.get("quick_gelu", False)
    size = model.visual.image_size
    config["vision_cfg"]["image_size"] = side = size[0] if isinstance(size, tuple) else size
    tokenizer, note = _open_clip_tokenizer(name, config["text_cfg"])
    return OpenClipHost(
        model=model.eval(),
        name=name,
        library="open_clip",
        image_size=side,
        weights=RANDOM if is_random else f"weights: {source or name}",
        random_weights=is_random,
        preprocess=preprocess,
        tokenize=lambda captions: {"text": tokenizer(captions)},
        notes=notes + note,
        own_words=not note,
        config=config,
        tokenizer=tokenizer,
    )


def _quick_gelu(name: str, tag: str) -> bool:
    """Tell whether the weights of this tag want QuickGELU where the architecture may not; open_clip only warns."""
    import open_clip

    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))


def _open_clip_tokenizer(name: str, text: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Return the model's own tokenizer or, where that would be a download, CLIP's with ids inside of the vocabulary."""
    import open_clip

    try:
        return open_clip.get_tokenizer(name), ()
    except OSError:
        length = text.get("context_length", 77)
        clip = open_clip.SimpleTokenizer(context_length=length)
        note = f"the tokenizer of {name} is not in the local cache: CLIP's tokenizer stands in, for {length} tokens too"
        return lambda captions: clip(captions) % text.get("vocab_size", 49408), (note,)


def _cached_tag(name: str) -> str | None:
    """Return the first pretrained tag of an open_clip model whose file is in the local Hugging Face cache."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    for tag in open_clip.list_pretrained_tags_by_model(name):
        repository, _, file = (open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "").rpartition("/")
        files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        if repository and any(isinstance(try_to_load_from_cache(repository, each), str) for each in files):
            return tag
    return None


def name_of_shapes(path: Path) -> str:
    """Return the open_clip architecture that a state dict fits, by its shapes.

    Raises:
        ValueError: no plain CLIP of open_clip has these shapes, or several do (those with GELU and with QuickGELU).
    """
    import open_clip
    from open_clip.factory import load_state_dict

    otherwise = f"say which it is, --model NAME --pretrained {path}"
    try:
        state = load_state_dict(str(path))
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{path} holds no state dict that torch can read safely: {first_line(error)}") from error
    if not {"visual.conv1.weight", "token_embedding.weight"} <= state.keys():
        raise ValueError(
            f"{path} holds no CLIP of open_clip or OpenAI (no visual.conv1.weight and token_embedding.weight): "
            f"give the folder of a transformers checkpoint, or {otherwise}"
        )
    shapes = _shapes(state)
    found = [name for name in open_clip.list_models() if _shapes_of(name, shapes["visual.conv1.weight"]) == shapes]
    if not found:
        sizes = {name: shapes.get(name) for name in ("visual.conv1.weight", "visual.positional_embedding")}
        raise ValueError(f"no CLIP of open_clip has the shapes of {path} ({sizes}, …); {otherwise}")
    if len(found) > 1:
        raise ValueError(f"{path} fits {' and '.join(found)}, whose weights have the same shapes; {otherwise}")
    return found[0]


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all but the scale, which some files hold as `(1,)`."""
    return {name: tuple(value.shape) for name, value in state.items() if name != "logit_scale"}


def _shapes_of(name: str, patches: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of an architecture, of a plain `open_clip.CLIP` whose patch embedding has this shape alone."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if {"multimodal_cfg", "timm_model_name", "hf_model_name"} & {*config, *vision, *text} or config.get("custom_text"):
        return None
    if (vision.get("width"), 3, vision.get("patch_size"), vision.get("patch_size")) != patches:
        return None
    config.pop("custom_text", None)
    with torch.device("meta"):
        return _shapes(open_clip.CLIP(**config).state_dict())
