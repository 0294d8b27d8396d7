"""From a name, a folder or a file to a model; weights when they are there, and plain words when they are not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from .from_open_clip import is_open_clip, load_open_clip, name_of_shapes
from .from_transformers import load_transformers
from .host import Host


def load(name: str, image_size: int | None = None, pretrained: str | None = None) -> Host:
    """Load a model by whatever names it.

    Nothing is downloaded unless that was asked for, by `pretrained` or by an `hf-hub:` name; weights that are in the
    local cache are found without asking.

    Args:
        name: an open_clip name (`ViT-B-16`, `ViT-B/16`, `hf-hub:org/repo`), a transformers name
            (`openai/clip-vit-base-patch16`) or model type (`clip`, `siglip`), a folder with a checkpoint of either
            library, or a file with a state dict of open_clip or OpenAI CLIP.
        image_size: side of the images in pixels; `None` is the model's own.
        pretrained: open_clip: a tag (`openai`, `laion2b_s34b_b88k`, …) or a file; transformers: `"hub"` to download.

    Returns:
        The model. Where weights could not be loaded it has random ones, and `notes` say why: enough for speed;
        `check_accuracy` refuses them.

    Raises:
        ValueError: nothing of that name is known, or a file does not tell its architecture; says what can be given.
            A `pretrained` that the model cannot take.
    """
    path = Path(name).expanduser()
    online = pretrained is not None or name.startswith("hf-hub:")
    with quiet(), offline(unless=online):
        if path.is_dir() and not (path / "open_clip_config.json").exists():
            return load_transformers(str(path), image_size, pretrained)
        if path.is_file():
            if pretrained is not None:
                raise ValueError(
                    f"--model {name} is a file of weights, which leaves --pretrained {pretrained} no place"
                )
            return load_open_clip(name_of_shapes(path), image_size, str(path))
        if path.is_dir():
            return load_open_clip(f"local-dir:{path}", image_size, pretrained)
        if name.startswith(("hf-hub:", "local-dir:")):
            return load_open_clip(name, image_size, pretrained)
        if is_open_clip(name):
            return load_open_clip(name.replace("/", "-"), image_size, pretrained)
        return load_transformers(name, image_size, pretrained)


@contextmanager
def offline(unless: bool = False) -> Iterator[None]:
    """Look for files of the Hugging Face hub in the local cache alone: never wait for a connection."""
    import huggingface_hub.constants as hub

    with mock.patch.object(hub, "HF_HUB_OFFLINE", hub.HF_HUB_OFFLINE or not unless):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence hosts that warn of random weights: the benchmark says so itself, once."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
