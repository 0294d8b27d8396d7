"""open_clip models: weights from the cache, a tag or a file; architecture from the shapes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .host import RANDOM, OpenClipHost, first_line


def is_open_clip(name: str) -> bool:
    """Whether open_clip is installed and has an architecture of that name."""
    try:
        import open_clip
    except ModuleNotFoundError:
        return False
    return name.replace("/", "-") in open_clip.list_models()


def load_open_clip(name: str, image_size: int | None, pretrained: str | None) -> OpenClipHost:
    import open_clip

    has_own_weights = name.startswith(("hf-hub:", "local-dir:"))
    source = None if has_own_weights else pretrained or _cached_tag(name)
    notes: tuple[str, ...] = ()
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=source, force_image_size=image_size
        )
    except (OSError, RuntimeError) as error:  # no connection, no such file, or weights of another architecture
        if source is None:
            raise
        notes = (f"weights {source!r} could not be loaded ({first_line(error)})",)
        source = None
        model, _, preprocess = open_clip.create_model_and_transforms(name, force_image_size=image_size)
    is_random = source is None and not has_own_weights
    vocabulary = open_clip.get_model_config(name)["text_cfg"].get("vocab_size", 49408) if not has_own_weights else None
    tokenizer, note = _open_clip_tokenizer(name, vocabulary)
    size = model.visual.image_size
    return OpenClipHost(
        model=model.eval(),
        name=name,
        library="open_clip",
        image_size=size[0] if isinstance(size, tuple) else size,
        weights=RANDOM if is_random else f"weights: {source or name}",
        random_weights=is_random,
        preprocess=preprocess,
        tokenize=lambda captions: {"text": tokenizer(captions)},
        notes=notes + note,
    )


def _open_clip_tokenizer(name: str, vocabulary: int | None) -> tuple[Any, tuple[str, ...]]:
    """The model's own tokenizer or, where that would be a download, CLIP's with its ids inside of the vocabulary."""
    import open_clip

    try:
        return open_clip.get_tokenizer(name), ()
    except OSError:
        length = open_clip.get_model_config(name)["text_cfg"].get("context_length", 77)
        clip = open_clip.SimpleTokenizer(context_length=length)
        note = f"the tokenizer of {name} is not in the local cache: CLIP's tokenizer stands in, for {length} tokens too"
        return lambda captions: clip(captions) % (vocabulary or 49408), (note,)


def _cached_tag(name: str) -> str | None:
    """The first pretrained tag of an open_clip model whose file is in the local Hugging Face cache."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    for tag in open_clip.list_pretrained_tags_by_model(name):
        repository, _, file = (open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "").rpartition("/")
        files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        if repository and any(isinstance(try_to_load_from_cache(repository, each), str) for each in files):
            return tag
    return None


def name_of_shapes(path: Path) -> str:
    """The open_clip architecture that a state dict fits, by its shapes."""
    import open_clip
    from open_clip.factory import load_state_dict

    state = load_state_dict(str(path))
    if "visual.conv1.weight" not in state:
        raise ValueError(
            f"{path} holds no CLIP of open_clip or OpenAI (no visual.conv1.weight): give the folder of a transformers "
            "checkpoint, or --model NAME --pretrained FILE"
        )
    width, _, patch, _ = state["visual.conv1.weight"].shape
    depth = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
    words, text_width = state["token_embedding.weight"].shape
    shapes = {"embed_dim": state["visual.proj"].shape[1], "width": width, "patch_size": patch, "layers": depth}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        found = {**{key: vision.get(key) for key in shapes}, "embed_dim": config["embed_dim"]}
        if found == shapes and (text.get("vocab_size"), text.get("width")) == (words, text_width):
            return name
    raise ValueError(f"no open_clip model has the shapes of {path}: {shapes}; give --model NAME --pretrained {path}")
