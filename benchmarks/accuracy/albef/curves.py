"""Accuracy over keep rates: of a base as it is, and after a short training with selection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arms import METHODS, RELEVANCE, reduced
from .base import BATCH, base, train_base, train_sampler
from .evaluate import TEST_SEED, Questions, matching_hits, patch_recall, retrieval, without_picture
from .jobs import call, run_all
from .model import USUAL, Shape
from .report import FREE
from .train import KEEP_RATES, Arm, tune

ARMS = (
    Arm("none"),
    Arm("text"),
    Arm("image"),
    Arm("random"),
    Arm("text", aligned=True),
    Arm("image", aligned=True),
    Arm("values"),
    Arm("values", aligned=True),
    Arm("front"),
    Arm("merged"),
)


@dataclass(frozen=True)
class Curve:
    """One line of the plot: a base, what was trained on top of it, and the ways to spend less that are tried on it."""

    seed: int
    arm: Arm | None
    """`None`: the base as it is."""
    steps: int
    methods: tuple[str, ...]
    queries: int
    pool: int
    folder: Path
    stage: int = 2


def measure(curve: Curve) -> list[dict[str, Any]]:
    """Measure every method of the curve at every keep rate, and at none."""
    model = base(curve.seed, curve.folder, curve.stage)
    if curve.arm is not None:
        torch.manual_seed(1000 * curve.seed + curve.steps)
        tune(model, train_sampler(100 + curve.seed, count=3000), curve.arm, curve.steps, BATCH, curve.seed)
    questions = Questions.make(curve.queries // 2, curve.pool, TEST_SEED)
    records = []
    for method in ("none", *curve.methods):
        for keep_rate in KEEP_RATES if method != "none" else (1.0,):
            torch.manual_seed(curve.seed)  # of random guidance
            with reduced(model, method, keep_rate) as encode:
                hits = matching_hits(model, encode, questions).float()
                recall = retrieval(model, encode, questions)
            watched = method in (*RELEVANCE, "image", "random")
            patches = 100 * patch_recall(model, method, keep_rate, questions) if watched else None
            records.append(record(curve, method, keep_rate, hits, recall, patches))
    if curve.arm is None:
        hits, recall = without_picture(questions)
        records.append(record(curve, "words", 1.0, hits.float(), recall, None))
    return records


def record(
    curve: Curve,
    method: str,
    keep_rate: float,
    hits: Tensor,
    recall: dict[str, dict[int, float]],
    patches: float | None,
) -> dict[str, Any]:
    """Return what one method came to, as the tables and plots read it."""
    return {
        "seed": curve.seed,
        "trained": FREE if curve.arm is None else str(curve.arm),
        "steps": curve.steps,
        "method": method,
        "keep_rate": keep_rate,
        "accuracy": 100 * float(hits.mean()),
        "error": 100 * float(hits.std() / len(hits) ** 0.5),
        "recall": recall,
        "patches": patches,
    }


def methods_of(arm: Arm) -> tuple[str, ...]:
    """Return what a model is asked with after this training: the selection that it was trained with."""
    return () if arm.guidance == "none" else (arm.guidance,)


def curves(
    seeds: tuple[int, ...], arms: tuple[Arm, ...], steps: int, queries: int, pool: int, folder: Path
) -> list[Curve]:
    """Return the training-free curve of each seed and one for each arm."""
    made = []
    for seed in seeds:
        for arm in arms:
            made.append(Curve(seed, arm, steps, methods_of(arm), queries, pool, folder))
    for seed in seeds:
        made.append(Curve(seed, None, 0, (*METHODS, "values"), queries, pool, folder))
    return made


def run(
    seeds: tuple[int, ...], arms: tuple[Arm, ...], steps: int, queries: int, pool: int, folder: Path
) -> list[dict[str, Any]]:
    """Return all records of all curves, made side by side over the cores."""
    return [
        record
        for records in run_all(measure, curves(seeds, arms, steps, queries, pool, folder), "curves")
        for record in records
    ]


def train(seed: int, folder: Path, shape: Shape = USUAL) -> None:
    """Train one base, unless its folder has it."""
    if not (folder / f"albef-{seed}{shape}.pt").exists():
        train_base(seed, folder, shape)


def train_all(seeds: tuple[int, ...], folder: Path, shape: Shape = USUAL) -> None:
    """Train the bases of all seeds, side by side over the cores."""
    run_all(call, [(train, (seed, folder, shape)) for seed in seeds], "bases")
