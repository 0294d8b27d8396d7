"""`python -m patchselect.visualization photo.jpg "a text" "another text" --model openai/clip-vit-base-patch16`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import pooled
from ..guiding import guide
from ..patching import apply
from ..relevance import RELEVANCES
from .drawing import draw_selection

PREFIX = "open_clip:"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m patchselect.visualization", description="Draw which patches of an image each text keeps."
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
    found.add_argument("--relevance", choices=list(RELEVANCES))
    found.add_argument("--output", type=Path, help="default: the image's name with -kept.png")
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """Draw, write the PNG, and return its path."""
    options = parser().parse_args(arguments)
    from PIL import Image

    photo = Image.open(options.image).convert("RGB")
    load = _open_clip if options.model.startswith(PREFIX) else _transformers
    loaded = load(options, photo)
    handle = apply(loaded.model, options.keep_rate, options.layers, relevance=options.relevance)
    with torch.no_grad(), handle.record() as trace, guide(loaded.model, loaded.features, pairing="all"):
        loaded.encode()
    output = options.output or options.image.with_name(f"{options.image.stem}-kept.png")
    draw_selection(loaded.seen, trace, options.texts, path=output)
    return output


@dataclass(frozen=True)
class Loaded:
    """A model with one photo and the texts, as its own processor makes them."""

    model: nn.Module
    seen: Tensor
    """`(1, 3, H, W)`: what the model gets to see of the photo."""
    features: Tensor
    encode: Callable[[], object]
    """Run the image side."""


def _as_seen(pixels: Tensor) -> Tensor:
    """Return the pixels that the model got, each channel back to the colours between its extremes."""
    low, high = pixels.amin(dim=(-1, -2), keepdim=True), pixels.amax(dim=(-1, -2), keepdim=True)
    return (pixels - low) / (high - low).clamp_min(1e-6)


def _transformers(options: argparse.Namespace, photo: Any) -> Loaded:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(options.model).eval()
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise SystemExit(
            f"{options.model} is a {type(model).__name__}, which has no text features of its own to guide with: draw a "
            "call of it from Python (patchselect.visualization), or name a model like CLIP or SigLIP"
        )
    processor = AutoProcessor.from_pretrained(options.model)
    inputs = dict(processor(images=photo, return_tensors="pt"))
    # A tokenizer that was stored without its length says 1e30; models of one length (SigLIP) want to be padded to it.
    lengths = processor.tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings
    tokens = processor(
        text=list(options.texts), return_tensors="pt", padding="max_length", truncation=True, max_length=min(lengths)
    )
    # Some tokenizers tell the first of two sentences from the second, which CLIP and SigLIP do not read.
    read = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
    with torch.no_grad():
        features = pooled(model.get_text_features(**read))
    pixels = inputs["pixel_values"]
    if pixels.dim() != 4:  # SigLIP 2: flat patches of the whole photo, padded
        import numpy

        patches = int(inputs["pixel_attention_mask"].sum())
        inputs.update({name: inputs[name][:, :patches] for name in ("pixel_values", "pixel_attention_mask")})
        pixels = torch.from_numpy(numpy.array(photo)).permute(2, 0, 1).unsqueeze(0) / 255
    return Loaded(model, _as_seen(pixels), features, lambda: model.get_image_features(**inputs))


def _open_clip(options: argparse.Namespace, photo: Any) -> Loaded:
    import open_clip

    name = options.model.removeprefix(PREFIX)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=options.pretrained)
    model.eval()
    with torch.no_grad():
        features = model.encode_text(open_clip.get_tokenizer(name)(list(options.texts)))
    pixels = preprocess(photo).unsqueeze(0)
    return Loaded(model, _as_seen(pixels), features, lambda: model.encode_image(pixels))


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
