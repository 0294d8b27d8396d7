"""salesforce/BLIP: its heads, ViT-B/16 as `create_vit` has it, at 64 px; BERT of 768 with few layers.

Its constructors look for `bert-base-uncased` and a DeiT checkpoint: stand-ins lie in the working folder and in torch's
cache, where they would lie after the download.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import standins
from .cases import Case, Evaluation
from .checkouts import inside, load

VARIABLE = "BLIP_DIR"
LAYERS = 4
MED = dict(
    vocab_size=standins.VOCABULARY + 2, hidden_size=768, num_attention_heads=12, intermediate_size=768,
    encoder_width=768, add_cross_attention=True, num_hidden_layers=LAYERS, max_position_embeddings=64,
    type_vocab_size=2, pad_token_id=0, hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    initializer_range=0.05, layer_norm_eps=1e-12, model_type="bert", architectures=["BertModel"],
)  # fmt: skip


def build(module: str, name: str, folder: Path, med: Any = (), **options: Any) -> nn.Module:
    standins.bert(folder)
    standins.one_process(folder)
    config = standins.json_file(folder / "med_config.json", **{**MED, **dict(med)})
    source = load(VARIABLE, module)
    with inside(folder):
        torch.manual_seed(0)
        return getattr(source, name)(med_config=config, image_size=64, vit="base", **options)


@torch.no_grad()
def rerank(model: Any, images: Tensor, captions: list[str], k_test: int = 2) -> Tensor:
    """`evaluation` of train_retrieval.py, image to text."""
    text = model.tokenizer(captions, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    output = model.text_encoder(text.input_ids, attention_mask=text.attention_mask, mode="text")
    texts = F.normalize(model.text_proj(output.last_hidden_state[:, 0, :]))
    ids = text.input_ids.clone()
    ids[:, 0] = model.tokenizer.enc_token_id
    features = model.visual_encoder(images)
    similarity = F.normalize(model.vision_proj(features[:, 0, :]), dim=-1) @ texts.t()
    scores = torch.full(similarity.shape, -100.0)
    for i, sims in enumerate(similarity):
        best, chosen = sims.topk(k_test, dim=0)
        seen = features[i].repeat(k_test, 1, 1)
        output = model.text_encoder(
            ids[chosen],
            attention_mask=text.attention_mask[chosen],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.size()[:-1], dtype=torch.long),
            return_dict=True,
        )
        scores[i, chosen] = model.itm_head(output.last_hidden_state[:, 0, :])[:, 1] + best
    return scores


def ids_of(model: Any, batch: Any) -> Any:
    """What `score_pairs` takes: the head's own tokenizer's output."""
    return model.tokenizer(batch[0][1], padding=True, return_tensors="pt")


def _pairs(batch: Any, *more: Any, **named: Any) -> Any:
    def pairs(images: list[int], texts: list[int]) -> Any:
        (pixels, captions, *_), _ = batch(0)
        return (pixels[images], [captions[index] for index in texts], *more), named

    return pairs


def retrieval(folder: Path) -> Case:
    model = build("models.blip_retrieval", "BLIP_Retrieval", folder, embed_dim=64, queue_size=24)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), standins.sentences(3, seed), 0.4, torch.arange(3)), {}

    def evaluate(head: Any) -> Tensor:
        args, _ = batch(5)
        return rerank(head, args[0], args[1])

    return Case(
        model, batch, evaluations={"train_retrieval.py": Evaluation(evaluate, "image")},
        pairs=_pairs(batch, 0.4, torch.arange(2)), tokens=lambda given: ids_of(model, given),
    )  # fmt: skip


def checkpointed_retrieval(folder: Path) -> Case:
    """As its configs for COCO train it: the attention and MLP of its last blocks recompute (fairscale)."""
    options = dict(vit_grad_ckpt=True, vit_ckpt_layer=4, embed_dim=64, queue_size=24)
    model = build("models.blip_retrieval", "BLIP_Retrieval", folder, **options)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), standins.sentences(3, seed), 0.4, torch.arange(3)), {}

    return Case(model, batch)


def itm(folder: Path) -> Case:
    model = build("models.blip_itm", "BLIP_ITM", folder, embed_dim=64)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), standins.sentences(3, seed)), {}

    def contrast(head: Any) -> Any:
        args, _ = batch(5)
        return head(*args, match_head="itc")

    return Case(
        model, batch, evaluations={"demo.ipynb, match_head='itc'": Evaluation(contrast)}, pairs=_pairs(batch),
        pairing="paired", tokens=lambda given: ids_of(model, given), extra_text_layers=LAYERS,
    )  # fmt: skip


def vqa(folder: Path) -> Case:
    model = build("models.blip_vqa", "BLIP_VQA", folder)

    def asked(seed: int) -> Any:
        return standins.pictures(3, seed), standins.sentences(3, seed, standins.QUESTIONS)

    def batch(seed: int) -> Any:
        return (*asked(seed), list(standins.ANSWERS[:4])), dict(n=[1, 2, 1], weights=torch.full((4,), 0.5))

    def rank(head: Any) -> Any:
        answers = head.tokenizer(list(standins.ANSWERS), padding="longest", return_tensors="pt")
        answers.input_ids[:, 0] = head.tokenizer.bos_token_id
        return head(*asked(5), answers, train=False, inference="rank", k_test=4)

    def generate(head: Any) -> Any:
        return head(*asked(5), train=False, inference="generate")

    evaluations = {"train_vqa.py, rank": Evaluation(rank), "train_vqa.py, generate": Evaluation(generate)}
    return Case(model, batch, evaluations=evaluations, extra_text_layers=LAYERS)


def decoder(folder: Path) -> Case:
    model = build("models.blip", "BLIP_Decoder", folder)

    def batch(seed: int) -> Any:
        captions = [f"a picture of {words}" for words in standins.sentences(3, seed)]
        return (standins.pictures(3, seed), captions), {}

    def generate(head: Any) -> Any:
        return head.generate(standins.pictures(3, 5), sample=False, num_beams=3, max_length=12, min_length=5)

    return Case(model, batch, captions=True, evaluations={"train_caption.py": Evaluation(generate, "image")})


def base(folder: Path) -> Case:
    """The feature extractor."""
    model = build("models.blip", "BLIP_Base", folder)

    def batch(seed: int) -> Any:
        captions = [f"{words} tree" for words in ("a red dog", "two big birds", "the old man")]
        if seed:
            captions.reverse()
        return (standins.pictures(3, seed), captions, "multimodal"), {}

    return Case(model, batch, extra_text_layers=LAYERS)


def nlvr(folder: Path) -> Case:
    layers = 8  # layers from 6 on merge what they read of the two images
    model = build("models.blip_nlvr", "BLIP_NLVR", folder, dict(num_hidden_layers=layers))

    def batch(seed: int, train: bool = True) -> Any:
        images = torch.cat([standins.pictures(2, seed), standins.pictures(2, seed + 10)])
        return (images, standins.sentences(2, seed)), dict(targets=torch.tensor([0, 1]), train=train)

    def evaluate(head: Any) -> Any:
        args, kwargs = batch(5, train=False)
        return head(*args, **kwargs)

    evaluations = {"train_nlvr.py": Evaluation(evaluate)}
    return Case(model, batch, images=4, evaluations=evaluations, extra_text_layers=layers)


def pretrain(folder: Path) -> Case:
    place = Path(torch.hub.get_dir()) / "checkpoints" / "deit_base_patch16_224-b5f2ef4d.pth"
    if not place.exists():
        place = folder / "checkpoints" / place.name
        place.parent.mkdir()
        torch.hub.set_dir(str(folder))
        torch.save({"model": {}}, place)
    model = build("models.blip_pretrain", "BLIP_Pretrain", folder, embed_dim=64, queue_size=24)

    def batch(seed: int) -> Any:
        return (standins.pictures(3, seed), standins.sentences(3, seed), 0.4), {}

    return Case(model, batch, pairs=_pairs(batch, 0.4), tokens=lambda given: ids_of(model, given))


CASES = {
    function.__name__: function
    for function in (retrieval, checkpointed_retrieval, itm, vqa, decoder, base, nlvr, pretrain)
}
