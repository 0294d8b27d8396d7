"""`python -m patchselect.visualize photo.jpg "a text" "another text" --model openai/clip-vit-base-patch16`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .guidance import guide
from .patching import apply
from .scoring import pooled
from .visualization import draw_selection

PREFIX = "open_clip:"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m patchselect.visualize", description="Draw which patches of an image each text keeps."
    )
    found.add_argument("image", type=Path, help="a photo")
    found.add_argument("texts", nargs="+", help="one row of the picture each")
    found.add_argument(
        "--model",
        default="openai/clip-vit-base-patch16",
        help="a model of transformers (name or folder), or open_clip:NAME (default: %(default)s)",
    )
    found.add_argument("--pretrained", help="weights of an open_clip model; without, they are random")
    found.add_argument("--keep-rate", type=float, default=0.5, help="share of the patches that stay (%(default)s)")
    found.add_argument("--layers", type=int, nargs="+", help="0-based selection layers (default: that of apply)")
    found.add_argument("--relevance", choices=["keys", "features", "values", "joint"])
    found.add_argument("--output", type=Path, help="default: the image's name with -kept.png")
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """Draw, write the PNG, and return its path."""
    options = parser().parse_args(arguments)
    from PIL import Image

    photo = Image.open(options.image).convert("RGB")
    load = _open_clip if options.model.startswith(PREFIX) else _transformers
    model, pixels, features, encode = load(options, photo)
    handle = apply(model, options.keep_rate, options.layers, relevance=options.relevance)
    with torch.no_grad(), handle.record() as trace, guide(model, features, pairing="all"):
        encode(pixels)
    output = options.output or options.image.with_name(f"{options.image.stem}-kept.png")
    draw_selection(_as_seen(pixels), trace, options.texts, path=output)
    return output


def _as_seen(pixels: torch.Tensor) -> torch.Tensor:
    """The pixels that the model got, each channel back to the colours between its extremes."""
    low, high = pixels.amin(dim=(-1, -2), keepdim=True), pixels.amax(dim=(-1, -2), keepdim=True)
    return (pixels - low) / (high - low).clamp_min(1e-6)


def _transformers(options: argparse.Namespace, photo: Any) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    tokens = processor(text=list(options.texts), return_tensors="pt", padding="max_length", truncation=True)
    with torch.no_grad():
        features = pooled(model.get_text_features(**tokens))
    return model, pixels, features, lambda x: model.get_image_features(pixel_values=x)


def _open_clip(options: argparse.Namespace, photo: Any) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
    import open_clip

    name = options.model.removeprefix(PREFIX)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=options.pretrained)
    model.eval()
    with torch.no_grad():
        features = model.encode_text(open_clip.get_tokenizer(name)(list(options.texts)))
    return model, preprocess(photo).unsqueeze(0), features, model.encode_image


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
