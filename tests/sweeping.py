"""Every model class of the installed transformers that takes pixels, built small on the meta device.

That is, in transformers 5.24 (`python tests/sweeping.py` counts those of the installed release): 595 classes whose
`forward` has an argument for pixels, 43 more with a name that says vision (parts that are called with what other parts
made of pixels), and 125 more that say so by `main_input_name` or `input_modalities` alone (text models and decoders of
such models). Left out are 247 `…PreTrainedModel`, which are bases without a `forward`. Backbones and the parts of every
model that is built are asked as they are met; nothing is loaded from a hub.
"""

from __future__ import annotations

import collections
import copy
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from since import installed
from torch import nn

PIXELS = re.compile(r"^(pixel|images?$|flattened_patches$)")
SPEAKS = re.compile(r"pixel|[\"']image[\"']|class \w*(Vision|Visual|Image|ViT|Vit)")
DEPTHS = re.compile(r"^(num|n|encoder|decoder|vision|text)?_?(hidden_|encoder_|decoder_)?(layers?|depth)$")
DEEPEST = 4
VISION = re.compile("Vision|Visual|Image|ViT|Vit")


def modules() -> list[str]:
    """The modules of transformers whose code speaks of pixels or images, by name; nothing is imported."""
    if installed("transformers") is None:
        return []
    root = Path(importlib.import_module("transformers").__file__).parent / "models"
    paths = sorted(root.glob("*/modeling_*.py"))
    return [f"{path.parent.name}.{path.stem}" for path in paths if SPEAKS.search(path.read_text(encoding="utf-8"))]


def classes_of(module: str) -> list[Any]:
    """The model classes of a module that take pixels, say that they do, or are a vision part of one that does."""
    return [kind for kind, how in declared(module) if how not in (None, "base")]


def declared(module: str) -> Iterator[tuple[Any, str | None]]:
    """Each model class of a module, and how it declares pixels: by an argument, by its name, by what it says alone.

    `"base"` is one that says so and has no `forward`; `None` declares none.
    """
    base = importlib.import_module("transformers").PreTrainedModel
    found = importlib.import_module(f"transformers.models.{module}")
    for kind in vars(found).values():
        if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == found.__name__:
            yield kind, _declares(kind)


def _declares(kind: Any) -> str | None:
    takes = any(PIXELS.match(name) for name in inspect.signature(kind.forward).parameters)
    says = "pixel" in str(kind.main_input_name) or {"image", "video"} & {
        *(getattr(kind, "input_modalities", None) or ())
    }
    if kind.__name__.endswith("PreTrainedModel"):
        return "base" if takes or says else None
    if takes:
        return "argument"
    return "name" if VISION.search(kind.__name__) else "alone" if says else None


def shallow(config: Any) -> Any:
    """The same configuration with few layers, in all of its parts."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shallow(value)
        elif DEPTHS.match(name) and isinstance(value, int) and value > DEEPEST:
            setattr(config, name, DEEPEST)
        elif name == "layer_types" and isinstance(value, list):
            config.layer_types = value[:DEEPEST]
    return config


def on_meta(kind: Any) -> nn.Module:
    """Build a model with the defaults of its configuration, shallow if that can be built."""
    config = kind.config_class()
    first: Exception | None = None
    for made in (lambda: shallow(copy.deepcopy(config)), lambda: config):
        try:
            with torch.device("meta"):
                return kind(made()).eval()
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and every vision part of it that could be called alone, one of each class."""
    seen = set()
    base = importlib.import_module("transformers").PreTrainedModel
    for path, part in model.named_modules():
        named = VISION.search(type(part).__name__) or "pixel_values" in inspect.signature(part.forward).parameters
        if (part is model or isinstance(part, base) or named) and type(part) not in seen:
            seen.add(type(part))
            yield path, part


def small(name: str) -> tuple[nn.Module, int]:
    """Build a vision model small and for real, and tell the size of its images."""
    module, _, kind = name.partition(":")
    found = getattr(importlib.import_module(f"transformers.models.{module}"), kind)
    config = found.config_class()
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        for key, value in {**sizes, "image_size": 64, "patch_size": 16, "vocab_size": 99}.items():
            if hasattr(part, key):
                setattr(part, key, value)
    if hasattr(config, "reshape_hidden_states"):  # a backbone, which makes dense maps of its tokens otherwise
        config.reshape_hidden_states = False
    if hasattr(config, "out_features"):
        config.out_features = [f"stage{config.num_hidden_layers}"]
    return found(config), 64


if __name__ == "__main__":
    counts = collections.Counter(how for module in modules() for _, how in declared(module))
    sys.stdout.write(f"{installed('transformers')} { {how: n for how, n in counts.items() if how is not None} }\n")
