"""The model that is measured: LLaVA with a tower and a language model of published sizes, or one from a disk."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from patchselect.prompts.encoded import takes_encoded

TOWERS = {
    "tiny": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, image_size=64,
                 patch_size=16),
    "L/14-336": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     image_size=336, patch_size=14),
}  # fmt: skip
"""CLIP's towers."""
LANGUAGES = {
    "tiny": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=99),
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=32000),
}  # fmt: skip
"""Language models of Llama's structure, in sizes of Qwen2's."""


def build(tower: str, language: str, dtype: torch.dtype, seed: int) -> Any:
    """Return a LLaVA with random weights."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(seed)
    words = LANGUAGES[language]
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWERS[tower]),
        text_config=transformers.LlamaConfig(**words, pad_token_id=0, max_position_embeddings=4096),
        image_token_id=int(words["vocab_size"]) - 1,
    )
    return transformers.LlavaForConditionalGeneration(config).to(dtype).eval()


def load(name: str, dtype: torch.dtype) -> Any:
    """Return a LLaVA that `from_pretrained` loads from a folder or its cache."""
    transformers = importlib.import_module("transformers")
    return transformers.LlavaForConditionalGeneration.from_pretrained(name).to(dtype).eval()


def check_release(model: Any) -> None:
    """Exit with a message where this release of transformers takes no encoded images, which the stages hand on."""
    if not takes_encoded(model.model):
        version = importlib.import_module("transformers").__version__
        raise SystemExit(f"benchmarks.multimodal takes transformers 5.23 or newer, this is {version}")


def prompts(model: Any, batch: int, words: int, seed: int) -> dict[str, Tensor]:
    """Return prompts of one image and so many random words, the image first."""
    vision, image = model.config.vision_config, model.config.image_token_id
    patches = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, image - 1, (batch, words), generator=generator)
    ids = torch.cat([text[:, :1], torch.full((batch, patches), image), text[:, 1:]], dim=1)
    size = (batch, 3, vision.image_size, vision.image_size)
    weight = next(model.parameters())
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size, generator=generator).to(weight.dtype),
    }
    return {name: value.to(weight.device) for name, value in found.items()}
