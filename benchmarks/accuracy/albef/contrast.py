"""Contrastive objectives on the two encoders alone: what SRCL does to false negatives, and what it brings.

A caption that names one or two of 32 things truly fits many other scenes, and which ones is known here: a negative
whose scene has all that the caption names is a FALSE negative.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.world.captions import AND
from benchmarks.accuracy.world.sampling import Batch
from benchmarks.accuracy.world.scenes import PLAIN, Layout, noto_font
from benchmarks.common.machine import commit
from patchselect.losses import cosine_alignment_loss, itc_loss, negative_weights, progressive_alpha, srcl_loss
from patchselect.metrics import retrieval_recall

from .base import base, digest, train_sampler
from .evaluate import Questions
from .model import MiniAlbef
from .train import TEMPERATURE, fit

CONTRAST_BATCH = 64
TEST_SEED = 177
POOL, POOLS = 48, 8
"""Scenes of a pool, few enough for captions that fit one scene alone, and how many pools."""
CROWDED = Layout(objects=(8, 9), glyph=(14, 18), turn=45.0)
"""A second distribution of scenes: more, smaller and turned drawings."""


@dataclass(frozen=True)
class Objective:
    """One contrastive objective. `delta` and `similarity` are SRCL's."""

    loss: str
    """`itc`, `srcl` or `cosine`."""
    delta: float = 1.0
    similarity: str = "progressive"
    """`teacher` (H_beta only), `own` (S_gamma only) or `progressive`."""

    def __str__(self) -> str:
        return self.loss if self.loss != "srcl" else f"srcl, delta {self.delta:g}, {self.similarity}"


@dataclass(frozen=True)
class Run:
    seed: int
    objective: Objective
    steps: int
    folder: Path


def fits(batch: Batch) -> Tensor:
    """Return `(B, B)` booleans: whether scene i has everything that caption j names."""
    words = batch.fitting - AND - 1
    has = (batch.objects[:, None, :, None] == words[None, :, None, :]).any(2)
    return (has | (words < 0)[None]).all(-1)


def features(model: MiniAlbef, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(B, JOINT)` of both sides, from the [CLS] of the encoders."""
    return model.vision_proj(model.encode_image(images)[:, 0]), model.text_proj(model.text(ids)[:, 0])


def clean(batch: Batch) -> Batch:
    """Pick the pairs of a batch among which no caption fits another scene, greedily: the teacher's clean subset."""
    wrong = fits(batch)
    chosen: list[int] = []
    for row in range(len(wrong)):
        if not any(bool(wrong[row, other]) or bool(wrong[other, row]) for other in chosen):
            chosen.append(row)
    rows = torch.tensor(chosen)
    return Batch(*(getattr(batch, name)[rows] for name in ("images", "fitting", "other", "objects", "masks", "named")))


def teach(seed: int, steps: int, folder: Path) -> MiniAlbef:
    """Train H_beta: InfoNCE on clean subsets of batches, from the stage-1 base; kept in the folder."""
    model = base(seed, folder, stage=1)
    path = folder / f"teacher-{seed}-{steps}-{digest(model)}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    sampler = train_sampler(200 + seed, count=3000)
    torch.manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch = clean(sampler.draw(2 * CONTRAST_BATCH))
        return itc_loss(*features(model, batch.images, batch.fitting), TEMPERATURE)

    fit(model, loss, steps, 5e-4, f"teacher {seed}")
    own = path.with_suffix(f".{os.getpid()}")  # several processes may be here at once
    torch.save(model.state_dict(), own)
    os.replace(own, path)
    return model


def train(run: Run) -> list[dict[str, Any]]:
    """Train one objective from the stage-1 base, and measure what came of it on every distribution.

    Kept in the folder, for the studies share runs; another base is run anew.
    """
    source, objective, model = commit(), run.objective, base(run.seed, run.folder, stage=1)
    name = str(objective).replace(", ", "-").replace(" ", "")
    path = run.folder / f"run-{name}-{run.seed}-{run.steps}-{digest(model)}.json"
    if path.exists():
        return json.loads(path.read_text())
    taught = objective.loss == "srcl" and objective.similarity != "own"
    teacher = teach(run.seed, run.steps, run.folder) if taught else None
    sampler = train_sampler(100 + run.seed, count=3000)
    torch.manual_seed(run.seed)
    weights: dict[bool, list[Tensor]] = {True: [], False: []}

    def alpha(step: int) -> float:
        if objective.similarity == "progressive":
            return progressive_alpha(step, run.steps)
        return 1.0 if objective.similarity == "teacher" else 0.0

    def loss(step: int) -> Tensor:
        batch = sampler.draw(CONTRAST_BATCH)
        image, text = features(model, batch.images, batch.fitting)
        if objective.loss == "itc":
            return itc_loss(image, text, TEMPERATURE)
        if objective.loss == "cosine":
            return cosine_alignment_loss(image, text)
        with torch.no_grad():
            taught = (None, None) if teacher is None else features(teacher, batch.images, batch.fitting)
            note_weights(weights, batch, image, text, taught, alpha(step), objective.delta)
        return srcl_loss(image, text, TEMPERATURE, *taught, alpha=alpha(step), delta=objective.delta)

    fit(model, loss, run.steps, 5e-4, f"{objective} {run.seed}")
    mean = {kind: float(torch.cat(found).mean()) if found else None for kind, found in weights.items()}
    places = {"same": PLAIN, "crowded": CROWDED}
    if noto_font() is not None:
        places["noto"] = Layout(style="noto")
    records = [
        {
            "seed": run.seed,
            "objective": str(objective),
            "commit": source,
            "scenes": place,
            "weight_false": mean[True],
            "weight_true": mean[False],
            **retrieve(model, layout),
        }
        for place, layout in places.items()
    ]
    path.write_text(json.dumps(records))
    return records


def note_weights(
    weights: dict[bool, list[Tensor]],
    batch: Batch,
    image: Tensor,
    text: Tensor,
    taught: Any,
    alpha: float,
    delta: float,
) -> None:
    """Note the weights that SRCL gives, image to text, by whether the caption truly fits (a false negative) or not."""
    own = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).exp()
    similarity = (1 - alpha) * own
    if alpha > 0:
        similarity = similarity + alpha * (F.normalize(taught[0], dim=-1) @ F.normalize(taught[1], dim=-1).T).exp()
    given, true = negative_weights(similarity, delta), fits(batch)
    negative = ~torch.eye(len(true), dtype=torch.bool)
    weights[True].append(given[true & negative])
    weights[False].append(given[~true & negative])


@torch.inference_mode()
def retrieve(model: MiniAlbef, layout: Layout) -> dict[str, Any]:
    """Compute R@K of the joint space, the mean of `POOLS` pools of scenes whose captions fit no other of their pool."""
    found = []
    for pool in range(POOLS):
        questions = Questions.make(POOL, POOL, TEST_SEED + 2 * pool, layout)
        image, text = features(model, questions.pool_images, questions.pool_captions)
        cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        found.append(retrieval_recall(cosines, torch.arange(len(image))))
    return {
        way: {k: fmean(one[way][k] for one in found) for k in found[0][way]}
        for way in ("image_to_text", "text_to_image")
    }
