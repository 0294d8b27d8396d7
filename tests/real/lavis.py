"""LAVIS: its ALBEF, BLIP and CLIP models with its own encoders, small.

Its `BlipBase` refuses transformers 4.27 and newer, while its requirements ask for 4.33.2: in an environment of the
requirements its BLIP models cannot be built, and skip with LAVIS' own words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import standins
from .cases import Case, Evaluation
from .checkouts import inside, load
from .lavis_calls import (
    classification_case,
    features_case,
    ids_of,
    nlvr_case,
    pairs_of,
    retrieval_case,
    samples,
    vqa_case,
)

VARIABLE = "LAVIS_DIR"
WIDTH, LAYERS = 64, 4


def vit() -> Any:
    encoder = load(VARIABLE, "lavis.models.vit").VisionTransformerEncoder(
        img_size=64, patch_size=16, embed_dim=WIDTH, depth=6, num_heads=4
    )
    encoder.vision_width = WIDTH
    with torch.no_grad():
        for weight in encoder.parameters():  # its own start, 0.02, makes a small ViT nearly blind
            if weight.dim() == 2:
                weight.mul_(5)
    return encoder


def bert(name: str, *, layers: int = LAYERS, fusion_layer: int | None = None, module: str = "med") -> Any:
    transformers = load(VARIABLE, "transformers")
    config = transformers.BertConfig(
        vocab_size=standins.VOCABULARY + 2, hidden_size=WIDTH, num_attention_heads=4, num_hidden_layers=layers,
        intermediate_size=96, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0,
        encoder_width=WIDTH, add_cross_attention=True, add_type_embeddings=False, is_decoder=False,
    )  # fmt: skip
    if fusion_layer is not None:
        config.fusion_layer = fusion_layer
    source = load(VARIABLE, f"lavis.models.{module}")
    more = {"add_pooling_layer": False} if name in ("XBertEncoder", "BertModel") else {}
    return getattr(source, name)(config=config, **more)


def build(module: str, name: str, folder: Path, make: Any, **options: Any) -> Any:
    """The head `name`; `make()` gives its encoders, by the names of its constructor."""
    head = getattr(load(VARIABLE, f"lavis.models.{module}"), name)
    standins.bert(folder)
    standins.one_process(folder)
    with inside(folder):
        torch.manual_seed(0)
        try:
            return head(**make(), **options)
        except AssertionError as refused:
            pytest.skip(f"{name} of LAVIS cannot be built here: {refused}")


def albef_text() -> Any:
    return dict(image_encoder=vit(), text_encoder=bert("XBertEncoder", fusion_layer=2))


def blip_text() -> Any:
    return dict(image_encoder=vit(), text_encoder=bert("XBertEncoder"))


def albef_retrieval(folder: Path) -> Case:
    options = dict(queue_size=24, embed_dim=32)
    return retrieval_case(build("albef_models.albef_retrieval", "AlbefRetrieval", folder, albef_text, **options))


def blip_retrieval(folder: Path) -> Case:
    options = dict(queue_size=24, embed_dim=32)
    return retrieval_case(build("blip_models.blip_retrieval", "BlipRetrieval", folder, blip_text, **options))


def albef_pretrain(folder: Path) -> Case:
    model = build(
        "albef_models.albef_pretrain", "AlbefPretrain", folder,
        lambda: dict(image_encoder=vit(), text_encoder=bert("BertForMaskedLM", fusion_layer=2)),
        queue_size=24, embed_dim=32, mlm_mask_prob=0.5,
    )  # fmt: skip

    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    return Case(model, batch, pairs=pairs_of(batch), tokens=lambda given: ids_of(model, given))


def blip_pretrain(folder: Path) -> Case:
    model = build(
        "blip_models.blip_pretrain", "BlipPretrain", folder,
        lambda: dict(**blip_text(), text_decoder=bert("XBertLMHeadDecoder")), queue_size=24, embed_dim=32,
    )  # fmt: skip

    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    return Case(model, batch, pairs=pairs_of(batch), tokens=lambda given: ids_of(model, given))


def albef_vqa(folder: Path) -> Case:
    model = build(
        "albef_models.albef_vqa", "AlbefVQA", folder,
        lambda: dict(**albef_text(), text_decoder=bert("BertLMHeadModel", layers=2, fusion_layer=0)),
    )  # fmt: skip
    return vqa_case(model, {})


def blip_vqa(folder: Path) -> Case:
    model = build(
        "blip_models.blip_vqa", "BlipVQA", folder,
        lambda: dict(**blip_text(), text_decoder=bert("XBertLMHeadDecoder")),
    )  # fmt: skip
    return vqa_case(model, {"inference_method": "rank"}, extra_text_layers=LAYERS)


def albef_nlvr(folder: Path) -> Case:
    make = lambda: dict(image_encoder=vit(), text_encoder=bert("BertModel", layers=18, fusion_layer=6))  # noqa: E731
    model = build("albef_models.albef_nlvr", "AlbefNLVR", folder, make, num_classes=2)
    # In training it runs its trained text encoder once more, for the momentum images: the half is remembered there too.
    return nlvr_case(model, same_stream=False, extra_text_layers=-6)


def blip_nlvr(folder: Path) -> Case:
    layers = 8
    encoder = "blip_models.nlvr_encoder"
    make = lambda: dict(image_encoder=vit(), text_encoder=bert("BertModel", layers=layers, module=encoder))  # noqa: E731
    model = build("blip_models.blip_nlvr", "BlipNLVR", folder, make, num_classes=2)
    return nlvr_case(model, extra_text_layers=layers)


def albef_classification(folder: Path) -> Case:
    module = "albef_models.albef_classification"
    return classification_case(build(module, "AlbefClassification", folder, albef_text, num_classes=3))


def blip_classification(folder: Path) -> Case:
    """It predicts; its training call fails in LAVIS itself, whose output takes no `encoder_output_m`."""
    module = "blip_models.blip_classification"
    model = build(module, "BlipClassification", folder, blip_text, num_classes=3, use_distill=False)
    return classification_case(model, train=False, extra_text_layers=LAYERS)


def albef_feature_extractor(folder: Path) -> Case:
    make = lambda: dict(image_encoder=vit(), text_encoder=bert("BertForMaskedLM", fusion_layer=2))  # noqa: E731
    return features_case(build("albef_models.albef_feature_extractor", "AlbefFeatureExtractor", folder, make))


def blip_feature_extractor(folder: Path) -> Case:
    module = "blip_models.blip_feature_extractor"
    model = build(module, "BlipFeatureExtractor", folder, blip_text, embed_dim=32)
    return features_case(model, extra_text_layers=LAYERS)


def blip_itm(folder: Path) -> Case:
    module = "blip_models.blip_image_text_matching"
    model = build(module, "BlipITM", folder, blip_text, embed_dim=32)

    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    contrast = Evaluation(lambda head: head(samples(5), match_head="itc"))
    return Case(
        model, batch, evaluations={"match_head='itc'": contrast}, pairs=pairs_of(batch),
        pairing="paired", tokens=lambda given: ids_of(model, given), extra_text_layers=LAYERS,
    )  # fmt: skip


def blip_caption(folder: Path) -> Case:
    make = lambda: dict(image_encoder=vit(), text_decoder=bert("XBertLMHeadDecoder"))  # noqa: E731
    model = build("blip_models.blip_caption", "BlipCaption", folder, make, prompt="a picture of ")

    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    generate = Evaluation(lambda head: head.generate(samples(5), num_beams=3, max_length=12, min_length=5), "image")
    return Case(model, batch, captions=True, evaluations={"generate": generate})


def clip(folder: Path) -> Case:
    module = load(VARIABLE, "lavis.models.clip_models.model")
    standins.one_process(folder)
    torch.manual_seed(0)
    vision = module.CLIPVisionCfg(layers=6, width=128, patch_size=16, image_size=64)
    text = module.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=2, layers=2)
    model = module.CLIP(64, vision, text)
    model.tokenizer = load(VARIABLE, "lavis.models.clip_models.tokenizer").tokenize

    def batch(seed: int) -> Any:
        return (samples(seed),), {}

    features = Evaluation(lambda head: dict(head.extract_features(samples(5))))
    alone = Evaluation(lambda head: head({"image": standins.pictures(3, 5)}), "image")

    def cosine(image: int, text: int) -> Tensor:
        given = samples(0)
        pair = dict(image=given["image"][image : image + 1], text_input=given["text_input"][text : text + 1])
        found = model.extract_features(pair)
        return (found.image_embeds_proj * found.text_embeds_proj).sum()

    evaluations = {"extract_features": features, "an image alone": alone}
    return Case(
        model, batch, pairing="paired", evaluations=evaluations, cosine=cosine,
        tokens=lambda given: model.tokenizer(given[0][0]["text_input"]),
    )  # fmt: skip


CASES = {
    function.__name__: function
    for function in (
        albef_retrieval, albef_pretrain, albef_vqa, albef_nlvr, albef_classification, albef_feature_extractor,
        blip_retrieval, blip_pretrain, blip_vqa, blip_nlvr, blip_classification, blip_feature_extractor,
        blip_itm, blip_caption, clip,
    )
}  # fmt: skip
