"""How LAVIS' own scripts call its heads: training calls, evaluations and pairs, whatever encoders a head has."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import standins
from .cases import Case, Evaluation

ROUND = dict(epoch=0, iters=50, num_iters_per_epoch=100)
"""Where training stands: its momentum distillation warms up."""


def samples(seed: int, count: int = 3, **more: Any) -> dict[str, Any]:
    text = standins.sentences(count, seed)
    return dict(image=standins.pictures(count, seed), text_input=text, **ROUND, **more)


def ids_of(model: Any, batch: Any) -> Any:
    return model.tokenizer(batch[0][0]["text_input"], padding=True, return_tensors="pt")


def pairs_of(batch: Any, **named: Any) -> Any:
    def pairs(images: list[int], texts: list[int]) -> Any:
        given = batch(0)[0][0]
        changed = dict(image=given["image"][images], text_input=[given["text_input"][index] for index in texts])
        return ({**given, **changed, **named},), {}

    return pairs


@torch.no_grad()
def features_of_a_gallery(model: Any, images: Tensor, captions: list[str]) -> Tensor:
    """The first half of `compute_sim_matrix`: all features apart."""
    text = model.tokenizer(captions, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    texts = F.normalize(model.text_proj(model.text_encoder.forward_text(text).last_hidden_state[:, 0, :]))
    features = model.visual_encoder.forward_features(images)
    return F.normalize(model.vision_proj(features[:, 0, :]), dim=-1) @ texts.t()


def retrieval_case(model: Any) -> Case:
    def batch(seed: int) -> Any:
        return (samples(seed, image_id=torch.arange(3)),), {}

    def gallery(head: Any) -> Tensor:
        given = samples(5)
        return features_of_a_gallery(head, given["image"], given["text_input"])

    def matrix(head: Any) -> Any:
        """Its own `compute_sim_matrix`, on a loader of two batches."""
        given = samples(5, count=4)
        data = types.SimpleNamespace(text=given["text_input"], image=list(given["image"]))
        batches = [{"image": given["image"][:2]}, {"image": given["image"][2:]}]

        class Loader(list):
            dataset = data

        scores = head.compute_sim_matrix(Loader(batches), types.SimpleNamespace(k_test=2))
        return [torch.as_tensor(part) for part in scores]

    evaluations = {"features apart": Evaluation(gallery, "image"), "compute_sim_matrix": Evaluation(matrix, "image")}
    return Case(
        model, batch, evaluations=evaluations, pairs=pairs_of(batch, image_id=torch.arange(2)),
        tokens=lambda given: ids_of(model, given),
    )  # fmt: skip


def vqa_case(model: Any, ranked: dict[str, Any], **more: Any) -> Case:
    def asked(seed: int) -> dict[str, Any]:
        return {**samples(seed), "text_input": standins.sentences(3, seed, standins.QUESTIONS)}

    def batch(seed: int) -> Any:
        answers = dict(
            answer=list(standins.ANSWERS[:4]), weight=torch.full((4,), 0.5), n_answers=torch.tensor([1, 2, 1])
        )
        return ({**asked(seed), **answers},), {}

    def rank(head: Any) -> Any:
        return head.predict_answers(asked(5), answer_list=list(standins.ANSWERS), num_ans_candidates=4, **ranked)

    evaluations = {"predict_answers, rank": Evaluation(rank)}
    if ranked:
        evaluations["predict_answers, generate"] = Evaluation(
            lambda head: head.predict_answers(asked(5), inference_method="generate")
        )
    return Case(model, batch, evaluations=evaluations, **more)


def nlvr_case(model: Any, **more: Any) -> Case:
    def given(seed: int) -> dict[str, Any]:
        pixels = dict(image0=standins.pictures(2, seed), image1=standins.pictures(2, seed + 10))
        return dict(**pixels, text_input=standins.sentences(2, seed), label=torch.tensor([0, 1]), **ROUND)

    def batch(seed: int) -> Any:
        return (given(seed),), {}

    return Case(
        model, batch, images=4, evaluations={"predict": Evaluation(lambda head: head.predict(given(5)))}, **more
    )


def classification_case(model: Any, train: bool = True, **more: Any) -> Case:
    def batch(seed: int) -> Any:
        return (samples(seed, label=torch.tensor([0, 1, 2])),), dict(is_train=train)

    evaluation = Evaluation(lambda head: head.predict(samples(5, label=torch.tensor([0, 1, 2]))))
    return Case(model, batch, evaluations={"predict": evaluation}, **more)


class Extractor(nn.Module):
    """Calls `extract_features`, which is what feature extractors have in place of a forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Any]) -> Any:
        return dict(self.model.extract_features(given))


def features_case(model: Any, **more: Any) -> Case:
    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    def image_alone(head: Any) -> Any:
        return head.model.extract_features(samples(5), mode="image").image_embeds_proj

    evaluations = {"mode='image'": Evaluation(image_alone, "image")}
    return Case(Extractor(model), batch, evaluations=evaluations, trains=False, **more)
