"""X-PLUG/mPLUG: its public heads, ViT-B/16 and ViT-L/14 by width, with few blocks.

Its constructors load `ViT-B-16.tar` or `ViT-L-14.tar` from the working folder: stand-ins with random weights lie there.
A position embedding that they enlarge waits for a checkpoint and is zero until then, so it is filled here.
"""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import standins
from .albef import rows, tokens
from .cases import Case, Evaluation
from .checkouts import directory, inside, load

VARIABLE = "MPLUG_DIR"
TOWERS = {
    "ViT-B-16": dict(vision_width=768, vision_patch_size=16),
    "ViT-L-14": dict(vision_width=1024, vision_patch_size=14),
}
BERT = dict(
    vocab_size=standins.VOCABULARY, intermediate_size=768, max_position_embeddings=64, num_hidden_layers=4,
    text_encoder_layers=2, fusion_layers=4, text_decode_layers=2, stride_layer=2, initializer_range=0.05,
)  # fmt: skip


def clip_weights(folder: Path, name: str, size: int) -> None:
    """A checkpoint of CLIP with six vision blocks and one for text."""
    clip = load(VARIABLE, "models.clip.model").CLIP(
        embed_dim=64, image_resolution=size, vision_layers=6, context_length=77, vocab_size=64, transformer_width=64,
        transformer_heads=1, transformer_layers=1, **TOWERS[name],
    )  # fmt: skip
    torch.save(clip.state_dict(), folder / f"{name}.tar")


def build(module: str, folder: Path, large: bool) -> Any:
    source = load(VARIABLE, f"models.{module}")
    words = load(VARIABLE, "models.tokenization_bert").BertTokenizer.from_pretrained(str(standins.bert(folder)))
    standins.one_process(folder)
    name = "ViT-L-14" if large else "ViT-B-16"
    size = 4 * TOWERS[name]["vision_patch_size"]
    torch.manual_seed(0)
    clip_weights(folder, name, size)
    config = json.loads((directory(VARIABLE) / "configs" / "config_bert.json").read_text())
    settings = dict(
        image_res=size, vision_width=TOWERS[name]["vision_width"], clip_name=name, embed_dim=64, temp=0.07,
        text_encoder="bert-base-uncased", text_decoder="bert-base-uncased", queue_size=24, momentum=0.995, alpha=0.4,
        bert_config=standins.json_file(folder / "bert.json", **{**config, **BERT}), distill=True, use_checkpoint=True,
        beam_size=2, min_length=1, max_length=4, prompt="",
    )  # fmt: skip
    options = {"text_encoder": "bert-base-uncased"} if "grounding" in module else {}
    with inside(folder):
        model = source.MPLUG(tokenizer=words, config=settings, **options)
    for encoder in ("visual_encoder", "visual_encoder_m"):
        if hasattr(model, encoder):
            positions = getattr(model, encoder).visual.positional_embedding
            with torch.no_grad():
                positions.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def side(large: bool) -> int:
    return 56 if large else 64


@torch.no_grad()
def rerank(model: Any, images: Tensor, text: Any, k_test: int = 2) -> Tensor:
    """`evaluation` of retrieval_img_mplug.py, image to text."""
    states = model.text_encoder(text.input_ids, attention_mask=text.attention_mask).last_hidden_state
    texts = F.normalize(model.text_proj(states[:, 0, :]))
    features = model.visual_encoder.visual(images, skip_last_layer=True)
    if model.large:
        features = model.dropout(model.visn_layer_norm(model.visn_fc(features)))
    similarity = F.normalize(model.vision_proj(features[:, 0, :]), dim=-1) @ texts.t()
    scores = torch.full(similarity.shape, -100.0)
    for i, sims in enumerate(similarity):
        chosen = sims.topk(k_test, dim=0).indices
        seen = features[i].repeat(k_test, 1, 1)
        _, output = model.fusion_encoder(
            encoder_embeds=states[chosen],
            attention_mask=text.attention_mask[chosen],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.size()[:-1], dtype=torch.long),
            return_dict=False,
        )
        scores[i, chosen] = model.itm_head(output[:, 0, :])[:, 1]
    return scores


def retrieval(folder: Path, large: bool) -> Case:
    model = build("model_retrieval_mplug", folder, large)

    def batch(seed: int) -> Any:
        text = tokens(model.tokenizer, standins.sentences(3, seed))
        return (standins.pictures(3, seed, side(large)), text), dict(alpha=0.4, idx=torch.arange(3))

    def pairs(images: list[int], texts: list[int]) -> Any:
        (pixels, text), _ = batch(0)
        return (pixels[images], rows(text, texts)), dict(alpha=0.4, idx=torch.arange(len(images)))

    def evaluate(head: Any) -> Tensor:
        (images, text), _ = batch(5)
        return rerank(head, images, text)

    evaluations = {"retrieval_img_mplug.py": Evaluation(evaluate, "image")}
    return Case(model, batch, evaluations=evaluations, pairs=pairs, same_stream=False)


def vqa(folder: Path, large: bool) -> Case:
    model = build("model_vqa_mplug", folder, large)

    def asked(seed: int) -> Any:
        questions = standins.sentences(3, seed, standins.QUESTIONS)
        text = model.tokenizer(questions, padding="longest", return_tensors="pt")
        return standins.pictures(3, seed, side(large)), text

    def batch(seed: int) -> Any:
        answers = model.tokenizer(list(standins.ANSWERS[:4]), padding="longest", return_tensors="pt")
        weights = torch.full((4,), 0.5)
        return (*asked(seed), answers), dict(train=True, alpha=0.4, k=[1, 2, 1], weights=weights)

    def evaluate(head: Any) -> Any:
        return head(*asked(5), None, train=False)

    return Case(model, batch, evaluations={"vqa_mplug.py": Evaluation(evaluate)}, same_stream=False)


def caption(folder: Path, large: bool) -> Case:
    model = build("model_caption_mplug", folder, large)

    def batch(seed: int) -> Any:
        answers = tokens(model.tokenizer, standins.sentences(3, seed))
        return (standins.pictures(3, seed, side(large)), None, answers), dict(train=True)

    def evaluate(head: Any) -> Any:
        (image, *_), _ = batch(5)
        return head(image, None, None, train=False)

    evaluations = {"caption_mplug.py": Evaluation(evaluate, "image")}
    return Case(model, batch, captions=True, evaluations=evaluations, same_stream=False)


def caption_vatex(folder: Path, large: bool) -> Case:
    model = build("model_caption_mplug_vatex", folder, large)

    def batch(seed: int) -> Any:
        answers = tokens(model.tokenizer, standins.sentences(2, seed))
        video = standins.pictures(4, seed, side(large)).unflatten(0, (2, 2))
        return (video, None, answers), dict(train=True, device="cpu")

    def evaluate(head: Any) -> Any:
        (video, *_), _ = batch(5)
        return head(video, None, None, train=False, device="cpu")

    evaluations = {"videocap_mplug.py": Evaluation(evaluate, "image")}
    return Case(model, batch, images=4, captions=True, evaluations=evaluations, same_stream=False)


def grounding(folder: Path, large: bool) -> Case:
    """It imports mmdet, which its requirements do not name."""
    model = build("model_grounding_mplug", folder, large)

    def batch(seed: int) -> Any:
        text = tokens(model.tokenizer, standins.sentences(3, seed))
        image = types.SimpleNamespace(tensors=standins.pictures(3, seed, side(large)), mask=None)
        words = types.SimpleNamespace(tensors=text.input_ids, mask=text.attention_mask)
        return (image, words, {"targets": torch.full((3, 4), 0.4)}), {}

    return Case(model, batch, same_stream=False)


CASES = {
    f"{function.__name__}_{size}": functools.partial(function, large=size == "large")
    for function in (retrieval, vqa, caption, caption_vatex, grounding)
    for size in ("base", "large")
}
