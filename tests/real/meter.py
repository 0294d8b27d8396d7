"""zdou0830/METER: `METERTransformerSS` by task, with a small CLIP and a small RoBERTa, all three widths different.

Its constructor reads CLIP from a TorchScript archive and RoBERTa from a folder: random stand-ins lie there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import standins
from .cases import Case, Evaluation
from .checkouts import load

VARIABLE = "METER_DIR"
TASKS = ("itm", "mlm", "vqa", "nlvr2", "irtr", "snli")
LENGTH = 8


class Archive(nn.Module):
    """What a checkpoint of CLIP holds beside its tower: the sizes of its text half."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        visual.proj = nn.Parameter(torch.zeros(128, 64))
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, 64))
        self.text_projection = nn.Parameter(torch.zeros(64, 64))
        self.token_embedding, self.ln_final = nn.Embedding(99, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def build(folder: Path, *tasks: str) -> Any:
    source = load(VARIABLE, "meter.modules.meter_module")
    clip = load(VARIABLE, "meter.modules.clip_model").CLIP
    torch.manual_seed(0)
    # The last block of an archive is left out, by the constructor and by what reads the archive.
    sizes = dict(vision_layers=8, vision_width=128, vision_patch_size=16, image_resolution=64, resolution_after=64)
    text = dict(context_length=LENGTH, vocab_size=99, transformer_width=64, transformer_heads=1, transformer_layers=1)
    archive = Archive(clip(embed_dim=64, **sizes, **text).visual)
    torch.jit.trace(archive, torch.zeros(1)).save(str(folder / "ViT-B-16.pt"))
    roberta = folder / "roberta-base"
    roberta.mkdir(exist_ok=True)
    config = dict(vocab_size=99, hidden_size=96, num_attention_heads=4, num_hidden_layers=3, intermediate_size=192)
    (roberta / "config.json").write_text(json.dumps({"model_type": "roberta", "pad_token_id": 1, **config}))
    torch.save({}, roberta / "pytorch_model.bin")
    settings = dict(
        vit=str(folder / "ViT-B-16.pt"), tokenizer=str(roberta), vocab_size=99, hidden_size=160, num_layers=2,
        num_heads=4, mlp_ratio=2, max_text_len=LENGTH, drop_rate=0.1, image_size=64, patch_size=16, load_path="",
        input_image_embed_size=128, input_text_embed_size=96, num_top_layer=2, test_only=False, vqav2_label_size=5,
        draw_false_text=0, loss_names={name: int(name in tasks) for name in TASKS},
    )  # fmt: skip
    model = source.METERTransformerSS(settings)
    model.current_tasks = [] if "irtr" in tasks else list(tasks)  # its training draws wrong texts; none: `infer`
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # of 0.02, with which all pairs have one score
    return model


def words(seed: int) -> dict[str, Tensor]:
    """Return ids that begin with 0, their masks, and the ids with one of them masked."""
    ids = torch.randint(3, 98, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    masks = torch.ones_like(ids)
    ids[1, -2:], masks[1, -2:] = 1, 0
    masked = ids.clone()
    masked[:, 4] = 98
    labels = torch.where(ids == masked, torch.full_like(ids, -100), ids)
    return dict(text_ids=ids, text_masks=masks, text_labels=labels, text_ids_mlm=masked, text_labels_mlm=labels)


def batch(seed: int) -> Any:
    """Return what its datasets collate, for all of its tasks."""
    images, others = standins.pictures(3, seed), standins.pictures(3, seed + 20)
    labels = dict(answers=[0, 1, 1], labels=[0, 1, 2], table_name=["snli_dev"] * 3)
    answers = dict(vqa_labels=[[0], [1, 3], [4]], vqa_scores=[[1.0], [0.3, 0.6], [0.9]])
    pictures = {"image": [images], "false_image_0": [others], "image_0": [images], "image_1": [others]}
    return ({**pictures, "text": [""] * 3, **words(seed), **labels, **answers},), {}


def one_image(seed: int) -> Any:
    (given,), options = batch(seed)
    return ({name: value for name, value in given.items() if name not in ("image_0", "image_1")},), options


def task(folder: Path, name: str) -> Case:
    model = build(folder, *(("irtr", "itm") if name == "irtr" else (name,)))
    pictures = batch if name == "nlvr2" else one_image
    runs = 2 if name == "nlvr2" else 1
    if name not in ("irtr", "itm"):
        return Case(model, pictures, runs=runs)

    def score(image: int, text: int) -> Tensor:
        (given,), _ = one_image(0)
        rows = {key: value[text : text + 1] for key, value in given.items() if key.startswith("text_")}
        fused = model.infer(rows, img=given["image"][0][image : image + 1])["cls_feats"]
        return model.rank_output(fused)[:, 0] if name == "irtr" else model.itm_score(fused).softmax(dim=-1)[:, 1]

    def rank(head: Any) -> Tensor:
        """`compute_irtr_recall`: each image beside all texts."""
        (given,), _ = one_image(5)
        texts = {key: value for key, value in given.items() if key in ("text_ids", "text_masks", "text_labels")}
        copies = [image.repeat(3, 1, 1, 1) for image in given["image"][0]]
        return torch.stack([head.rank_output(head.infer(texts, img=image)["cls_feats"])[:, 0] for image in copies])

    evaluations = {"compute_irtr_recall": Evaluation(rank)} if name == "irtr" else {}
    return Case(model, pictures, cosine=score, evaluations=evaluations)


CASES = {name: functools.partial(task, name=name) for name in TASKS}
