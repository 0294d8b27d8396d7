"""salesforce/ALBEF: its six heads, ViT-B/16 as its constructors have it, at 64 px; BERT of 768 with few layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from doubles.text import Output
from torch import Tensor, nn

from . import standins
from .cases import Case, Evaluation
from .checkouts import load

VARIABLE = "ALBEF_DIR"
BERT = dict(
    vocab_size=standins.VOCABULARY, hidden_size=768, num_attention_heads=12, intermediate_size=768, encoder_width=768,
    num_hidden_layers=4, fusion_layer=2, max_position_embeddings=64, type_vocab_size=2, pad_token_id=0,
    hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, initializer_range=0.05,
    layer_norm_eps=1e-12, model_type="bert",
)  # fmt: skip


def tokenizer(folder: Path) -> Any:
    return load(VARIABLE, "models.tokenization_bert").BertTokenizer.from_pretrained(str(standins.bert(folder)))


def tokens(of: Any, texts: list[str], length: int = 12) -> Any:
    """As `Retrieval.py`, `VQA.py` and the others call the tokenizer."""
    return of(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def rows(text: Any, chosen: list[int]) -> Output:
    return Output(input_ids=text.input_ids[chosen], attention_mask=text.attention_mask[chosen])


def build(name: str, folder: Path, **bert: Any) -> nn.Module:
    module = load(VARIABLE, f"models.model_{name}")
    words = tokenizer(folder)
    standins.one_process(folder)
    config = dict(
        image_res=64, vision_width=768, embed_dim=64, temp=0.07, mlm_probability=0.15, queue_size=24, momentum=0.995,
        alpha=0.4, distill=True, bert_config=standins.json_file(folder / f"{name}.json", **{**BERT, **bert}),
    )  # fmt: skip
    more: dict[str, Any] = {"init_deit": False} if name == "pretrain" else {}
    if name == "vqa":
        more["text_decoder"] = str(standins.bert(folder))
    torch.manual_seed(0)
    return module.ALBEF(text_encoder=str(standins.bert(folder)), tokenizer=words, config=config, **more)


@torch.no_grad()
def rerank(model: Any, images: Tensor, text: Any, k_test: int = 2) -> Tensor:
    """`evaluation` of Retrieval.py, image to text: all features apart, then the best `k_test` through the fusion."""
    states = model.text_encoder(text.input_ids, attention_mask=text.attention_mask, mode="text").last_hidden_state
    texts = F.normalize(model.text_proj(states[:, 0, :]))
    features = model.visual_encoder(images)
    similarity = F.normalize(model.vision_proj(features[:, 0, :]), dim=-1) @ texts.t()
    scores = torch.full(similarity.shape, -100.0)
    for i, sims in enumerate(similarity):
        chosen = sims.topk(k_test, dim=0).indices
        seen = features[i].repeat(k_test, 1, 1)
        output = model.text_encoder(
            encoder_embeds=states[chosen],
            attention_mask=text.attention_mask[chosen],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.size()[:-1], dtype=torch.long),
            return_dict=True,
            mode="fusion",
        )
        scores[i, chosen] = model.itm_head(output.last_hidden_state[:, 0, :])[:, 1]
    return scores


def retrieval(folder: Path) -> Case:
    model = build("retrieval", folder)

    def batch(seed: int) -> Any:
        text = tokens(model.tokenizer, standins.sentences(3, seed))
        return (standins.pictures(3, seed), text), dict(alpha=0.4, idx=torch.arange(3))

    def evaluate(head: Any) -> Tensor:
        (images, text), _ = batch(5)
        return rerank(head, images, text)

    def pairs(images: list[int], texts: list[int]) -> Any:
        (pixels, text), _ = batch(0)
        return (pixels[images], rows(text, texts)), dict(alpha=0.4, idx=torch.arange(len(images)))

    return Case(model, batch, evaluations={"Retrieval.py": Evaluation(evaluate, "image")}, pairs=pairs)


def pretrain(folder: Path) -> Case:
    model = build("pretrain", folder)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), tokens(model.tokenizer, standins.sentences(3, seed))), dict(alpha=0.4)

    def pairs(images: list[int], texts: list[int]) -> Any:
        (pixels, text), kwargs = batch(0)
        return (pixels[images], rows(text, texts)), kwargs

    return Case(model, batch, pairs=pairs)


def vqa(folder: Path) -> Case:
    model = build("vqa", folder)

    def asked(seed: int) -> Any:
        questions = standins.sentences(3, seed, standins.QUESTIONS)
        return standins.pictures(3, seed), model.tokenizer(questions, padding="longest", return_tensors="pt")

    def answers(count: int) -> Any:
        return model.tokenizer(list(standins.ANSWERS[:count]), padding="longest", return_tensors="pt")

    def batch(seed: int) -> Any:
        weights = torch.full((4,), 0.5)
        return (*asked(seed), answers(4)), dict(train=True, alpha=0.4, k=[1, 2, 1], weights=weights)

    def evaluate(head: Any) -> Any:
        """`evaluation` of VQA.py: the best of the answers that begin with a likely word."""
        return head(*asked(5), answers(6), train=False, k=4)

    return Case(model, batch, evaluations={"VQA.py": Evaluation(evaluate)})


def nlvr(folder: Path) -> Case:
    model = build("nlvr", folder, fusion_layer=6)  # it shares the cross-attention of layers 6 to 17

    def batch(seed: int, train: bool = True) -> Any:
        text = model.tokenizer(standins.sentences(2, seed), padding="longest", return_tensors="pt")
        images = torch.cat([standins.pictures(2, seed), standins.pictures(2, seed + 10)])
        return (images, text), dict(targets=torch.tensor([0, 1]), train=train, alpha=0.4)

    def evaluate(head: Any) -> Any:
        args, kwargs = batch(5, train=False)
        return head(*args, **kwargs)

    return Case(model, batch, images=4, evaluations={"NLVR.py": Evaluation(evaluate)})


def pretrain_nlvr(folder: Path) -> Case:
    model = build("pretrain_nlvr", folder, fusion_layer=6)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), tokens(model.tokenizer, standins.sentences(3, seed))), {}

    return Case(model, batch, same_stream=False)  # it pairs its images by chance, before the text


def ve(folder: Path) -> Case:
    model = build("ve", folder)

    def batch(seed: int, train: bool = True) -> Any:
        text = model.tokenizer(standins.sentences(3, seed), padding="longest", return_tensors="pt")
        return (standins.pictures(3, seed), text), dict(targets=torch.tensor([0, 1, 2]), alpha=0.4, train=train)

    def evaluate(head: Any) -> Any:
        args, kwargs = batch(5, train=False)
        return head(*args, **kwargs)

    return Case(model, batch, evaluations={"VE.py": Evaluation(evaluate)})


CASES = {function.__name__: function for function in (retrieval, pretrain, vqa, nlvr, pretrain_nlvr, ve)}
