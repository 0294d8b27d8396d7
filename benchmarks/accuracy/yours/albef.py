"""ALBEF's retrieval model behind the interface of the other hosts: contrastive features first, then its own head."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.host import RANDOM, Host, Tokens

PARTS = ("models.model_retrieval", "models.vit", "models.tokenization_bert", "dataset.utils", "yaml")
"""What is imported of the checkout."""
LENGTH = 30
"""Tokens of a text, as ALBEF's `Retrieval.py` reads them."""


@dataclass
class AlbefHost(Host):
    """Anything with ALBEF's `visual_encoder`, `text_encoder`, `vision_proj`, `text_proj` and matching head."""

    reads_tokens: bool = True

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.vision_proj(self.model.visual_encoder(images)[:, 0])  # type: ignore[operator, no-any-return]

    def encode_text(self, tokens: Tokens) -> Tensor:
        read = self.model.text_encoder(  # type: ignore[operator]
            tokens["input_ids"], attention_mask=tokens["attention_mask"], mode="text"
        )
        return self.model.text_proj(read.last_hidden_state[:, 0])  # type: ignore[operator, no-any-return]


def load_albef(config: Path, checkpoint: str | None, image_size: int | None = None) -> AlbefHost:
    """Build `models.model_retrieval.ALBEF` of the checkout that `ALBEF_DIR` names, in the releases that it asks for.

    Args:
        config: `configs/Retrieval_flickr.yaml` or its like; `bert_config` in it starts from the checkout.
        checkpoint: of the fine-tuned model; `None`: random weights.
        image_size: side of the images; `None`: `image_res` of the config. Positions are interpolated, as ALBEF does.

    Raises:
        ValueError: no `ALBEF_DIR`, or a checkpoint that lacks weights of the model.
    """
    folder = os.environ.get("ALBEF_DIR")
    if not folder:
        raise ValueError("--albef needs ALBEF_DIR, a checkout of salesforce/ALBEF")
    sys.path.insert(0, folder)
    retrieval, vit, words, data, yaml = map(importlib.import_module, PARTS)
    from torchvision import transforms

    settings: dict[str, Any] = yaml.safe_load(config.read_text())
    settings["bert_config"] = str(Path(folder) / settings["bert_config"])
    size = settings["image_res"] = image_size or settings["image_res"]
    tokenizer = words.BertTokenizer.from_pretrained("bert-base-uncased")
    settings["distill"] = False
    model = retrieval.ALBEF(config=settings, text_encoder="bert-base-uncased", tokenizer=tokenizer)
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu")
        state = {name.replace("bert.", ""): value for name, value in state.get("model", state).items()}
        for tower in ("visual_encoder", "visual_encoder_m"):
            name = f"{tower}.pos_embed"
            state[name] = vit.interpolate_pos_embed(state[name], getattr(model, tower))
        missing = [name for name in model.load_state_dict(state, strict=False).missing_keys if "queue" not in name]
        if missing:
            raise ValueError(f"{checkpoint} lacks {len(missing)} weights of the model, {json.dumps(missing[:3])}, …")
    with torch.no_grad():  # Retrieval.py ranks by the second logit alone: the probability against 0 has its order
        for part in (model.itm_head.weight, model.itm_head.bias):
            part[0] = 0
    prepare = transforms.Compose(
        [
            transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )

    def tokenize(captions: list[str]) -> Tokens:
        captions = [data.pre_caption(caption, LENGTH) for caption in captions]
        found = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}

    return AlbefHost(
        model=model.eval(), name="ALBEF", library="salesforce/ALBEF", image_size=size,
        weights=RANDOM if checkpoint is None else f"weights: {checkpoint}", random_weights=checkpoint is None,
        preprocess=prepare, tokenize=tokenize,
    )  # fmt: skip
