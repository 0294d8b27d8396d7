"""Language models of transformers that read whole grids of patches: refused, with the reason."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from patchselect.prompts.encoded import takes_encoded

SUPPORTED = (
    "LlavaModel", "VipLlavaModel", "PaliGemmaModel", "Idefics3Model", "SmolVLMModel", "InternVLModel",
    "Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel",
)  # fmt: skip
RELEASES = "4.57, or 5.23 and newer"
"""The releases of transformers whose models can have short prompts."""
GRID = "its projector joins neighbours of a whole grid of patches"
TILES = "it cuts images into tiles and packs their whole grids (padding taken off, a newline after each row)"
REASONS = {
    "LlavaNext": TILES,
    "LlavaOnevision": TILES,
    "Granite4Vision": TILES,
    "Gemma3": "it averages squares of a whole grid of patches",
    "AyaVision": GRID,
    "Cohere2Vision": GRID,
    "Mistral3": GRID,
    "GotOcr2": "its tower attends in windows of the grid",
    "VideoLlava": "it reads images and videos with two towers",
    "Ovis2": "it reads patches as words of a visual vocabulary, joined in squares of a whole grid",
    "PerceptionLM": "it averages squares of a whole grid of patches",
    "Glm4v": "its images are packed into one sequence with rotary positions",
    "Idefics2": "a resampler reads its tower through a mask over a whole grid of patches",
    "Llama4": "it joins squares of a whole grid of patches",
    "Janus": "its tower returns tokens for an aligner of its own, and its generation draws images too",
    "Florence2": "it reads features of a convolutional tower",
}
"""Why others cannot be patched as a whole, by the beginning of the name of their class."""


def core_of(model: Any) -> Any:
    """Return the part of a model that holds its tower and its language model: itself, or its `model`."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "get_image_features") else model


def names_of(module: Any) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]


def check_release(model: nn.Module, core: Any) -> None:
    """Raise a TypeError unless prompts were shortened with this release of transformers before."""
    release = getattr(sys.modules.get("transformers"), "__version__", "(this release)")
    if not takes_encoded(core) and release.split(".")[:2] != ["4", "57"]:
        raise TypeError(
            f"{type(model).__name__} of transformers {release} does not take encoded images (mm_encoder_outputs), by "
            f"which prompts are shortened: use transformers {RELEASES}, or patch its vision tower alone, and shorten "
            "prompts yourself"
        )


def refuse_others(model: nn.Module) -> None:
    """Raise a TypeError for a model of images and words that needs a whole grid, with the reason."""
    core = core_of(model)
    name = type(core).__name__
    reason = next((why for start, why in REASONS.items() if name.startswith(start)), None)
    if reason is not None and (hasattr(core, "get_image_features") or hasattr(core, "inputs_merger")):
        raise TypeError(
            f"{type(model).__name__} cannot be patched: {reason}, which a selection of single patches would break. "
            f"Supported are {', '.join(SUPPORTED)}, with their heads"
        )
