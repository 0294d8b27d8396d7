"""What can be answered without the picture: from the texts alone, and from the places of the kept patches alone.

Classifiers are trained on questions of the same kind over other scenes of the tests' photographs, and asked the
benchmark's test questions. `python -m benchmarks.accuracy leaks`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.albef.arms import RELEVANCE
from benchmarks.accuracy.albef.base import RESULTS, base
from benchmarks.accuracy.albef.evaluate import TEST_SEED, without_picture
from benchmarks.accuracy.albef.evaluate import Questions as Matching
from benchmarks.accuracy.clip.model import load
from benchmarks.accuracy.clip.questions import LEARNING, TEST, make_questions
from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.candidates import CHOICES, GRID, LEAKY
from benchmarks.accuracy.world.captions import concepts_of
from benchmarks.common import command
from benchmarks.common.machine import commit
from benchmarks.common.show import aligned

from .places import classifiers, of_albef, of_clip, told, told_beside

RATES = (0.7, 0.5, 0.3, 0.15)
TRAIN_SEED = 177
"""Of the scenes whose matching questions the classifiers of places learn from; far from `TEST_SEED`."""


def mean(values: Tensor) -> tuple[float, float]:
    """Return the mean in percent and its standard error."""
    return 100 * float(values.mean()), 100 * float(values.std() / len(values) ** 0.5)


def of_words(matching: Matching, count: int) -> list[dict[str, Any]]:
    """Answer every question set from its texts alone."""
    records = []

    def add(what: str, how: str, chance: float, values: Tensor) -> None:
        records.append({"questions": what, "classifier": how, "chance": chance, "accuracy": mean(values.double())})

    for kind in (GRID, LEAKY):
        candidates = make_questions(count, TEST, kind=kind).candidates
        for how in (text_alone.TRAINED, text_alone.COUNTING):
            name = f"CLIP, 1 of {CHOICES}, {kind}"
            add(name, how, 100 / CHOICES, text_alone.answered(candidates, how, kind))
    fitting, other = concepts_of(matching.fitting), concepts_of(matching.other)
    hits, recall = without_picture(matching)
    add("matching, each caption by itself", text_alone.TRAINED, 50.0, hits)
    for how in (text_alone.TRAINED, text_alone.COUNTING):
        add(
            "matching, which of both captions fits",
            how,
            50.0,
            text_alone.answered(list(zip(fitting, other)), how, text_alone.PAIR),
        )
    pool = len(matching.pool_images)
    first = torch.arange(pool) < round(recall["image_to_text"][1] * pool / 100)
    add(f"retrieval, R@1 image to text of {pool}", text_alone.TRAINED, 100 / pool, first)
    return records


def of_matching(model: Any, seen: Matching, asked: Matching, method: str, rate: float) -> list[dict[str, Any]]:
    """Answer whether the caption fits from where the pair keeps patches when it is encoded with its own caption."""
    records, data = [], []
    for questions in (seen, asked):
        images, ids = questions.images.repeat(2, 1, 1, 1), torch.cat([questions.fitting, questions.other])
        kept = of_albef(model, method, rate, images, ids)
        words = text_alone.seen(concepts_of(ids), alone=True)
        data.append((told(kept), words, np.arange(len(ids)) < len(ids) // 2))
    for what in ("places", "places and caption"):
        (train, right), (test, wanted) = (
            (places if what == "places" else np.concatenate([places, words], 1), fits) for places, words, fits in data
        )
        for name, classifier in classifiers().items():
            hits = classifier.fit(train, right).predict(test) == wanted  # type: ignore[attr-defined]
            records.append({"sees": what, "classifier": name, "accuracy": mean(torch.from_numpy(hits).double())})
    return [{"relevance": RELEVANCE[method], "keep_rate": rate, **record} for record in records]


@lru_cache(maxsize=None)
def words_of(split: str, count: int) -> np.ndarray:
    """Return `(N, candidates, features)`: what the candidates of each question say."""
    return np.stack([text_alone.described(candidates) for candidates in make_questions(count, split).candidates])


def of_candidates(
    model: Any, seed: int, counts: tuple[int, int], relevance: str, pairing: str, rate: float
) -> list[dict[str, Any]]:
    """Answer which of the candidates fits from where the picture keeps patches and from the texts."""
    data = []
    for split, count in zip((LEARNING, TEST), counts):
        questions = make_questions(count, split)
        kept = of_clip(model, relevance, rate, questions.images(), questions.texts(model), pairing)
        data.append(np.concatenate([told_beside(kept), words_of(split, count)], axis=-1))
    train, test = (part.reshape(-1, part.shape[-1]) for part in data)
    right, records = np.tile(np.arange(CHOICES) == 0, counts[0]), []
    for name, classifier in classifiers().items():
        scores = classifier.fit(train, right).predict_proba(test)[:, 1]  # type: ignore[attr-defined]
        hits = torch.tensor([text_alone.chance_of(one) for one in scores.reshape(-1, CHOICES)])
        record = {"relevance": relevance, "pairing": pairing, "keep_rate": rate, "seed": seed, "classifier": name}
        records.append({**record, "accuracy": mean(hits.double())})
    return records


def table(records: Sequence[dict[str, Any]], name: str, rows: Sequence[str]) -> str:
    """Return accuracies by keep rate; a row for each combination of these keys."""
    rates = sorted({record["keep_rate"] for record in records}, reverse=True)
    found = {(tuple(str(r[key]) for key in rows), r["keep_rate"]): r["accuracy"] for r in records}
    lines = [[name, *(f"keep {rate:g}" for rate in rates)]]
    for row in dict.fromkeys(key for key, _ in found):
        cells = (found.get((row, rate)) for rate in rates)
        lines.append([", ".join(row), *(f"{cell[0]:.1f} ± {cell[1]:.1f}" if cell else "–" for cell in cells)])
    return aligned(lines)


def document(report: dict[str, Any]) -> str:
    """Return all tables."""
    settings = report["settings"]
    lines = [["from the texts alone", "classifier", "chance, %", "right, %"]]
    for record in report["words"]:
        value, error = record["accuracy"]
        lines.append(
            [record["questions"], record["classifier"], f"{record['chance']:.2f}", f"{value:.1f} ± {error:.1f}"]
        )
    return "\n\n".join(
        [
            "# What can be answered without the picture",
            aligned(lines),
            f"Where patches are kept, matching, {2 * settings['scenes']} questions learned from (chance 50), %:",
            table(report["matching"], "every pair with its own caption", ("relevance", "sees", "classifier")),
            f"Where patches are kept and the texts, 1 of {CHOICES}, {settings['train']} questions learned from, "
            f"{settings['asked']} asked (chance {100 / CHOICES:.2f}), %:",
            table(report["candidates"], "small CLIP", ("relevance", "pairing", "seed", "classifier")),
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1], help="small CLIPs; the fusion model is that of seed 0")
    add("--keep-rate", type=float, nargs="+", default=list(RATES))
    add("--count", type=int, default=2048, help="CLIP questions answered from the texts")
    add("--queries", type=int, default=1280, help="matching questions")
    add("--scenes", type=int, default=2000, help="scenes whose matching questions are learned from")
    add("--train", type=int, default=768, help="CLIP questions whose kept places are learned from")
    add("--asked", type=int, default=768, help="CLIP questions answered from the kept places")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints")
    command.add_output(parser, "results/leaks")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Ask everything, print the tables, write JSON and Markdown."""
    torch.set_num_threads(options.threads)
    report = {"commit": commit(), **command.report_on(options)}
    asked = Matching.make(options.queries // 2, 48, TEST_SEED)
    report["words"] = of_words(asked, options.count)
    seen, model = Matching.make(options.scenes, 4, TRAIN_SEED), base(0, RESULTS)
    report["matching"], report["candidates"] = [], []
    counts = (options.train, options.asked)
    rates = options.keep_rate
    with tqdm(total=len(rates) * (2 + 4 * len(options.seeds)), file=sys.stderr, mininterval=10) as bar:
        for method in ("text", "values"):
            for rate in rates:
                report["matching"] += of_matching(model, seen, asked, method, rate)
                bar.update()
        for pairing in ("shared", "all"):
            for seed in options.seeds:
                small = load(seed, options.checkpoints)
                for relevance in ("values", "keys"):
                    for rate in rates:
                        report["candidates"] += of_candidates(small, seed, counts, relevance, pairing, rate)
                        bar.update()
    command.write(options.output / "leaks.json", report, document(report))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy leaks", __doc__, add_arguments, arguments)
