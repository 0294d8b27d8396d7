"""Answers of a tiny language model from the tokens that a tower has left: `python -m benchmarks.accuracy answering`.

The frozen ViT of a mini-ALBEF, a linear layer and a small Llama that was trained on whole images answer what is there,
how often and where, on photographs that training never saw: with fewer tokens left in the tower (by text, by image, at
random, merged before) or after it, each with the positions of the whole prompt and counted anew. Errors are over seeds,
each with its own base and its own language model. A run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.albef.base import RESULTS, base, digest
from benchmarks.accuracy.albef.jobs import call, run_all
from benchmarks.accuracy.albef.model import MiniAlbef
from benchmarks.accuracy.albef.report import Record, write
from benchmarks.accuracy.world.captions import captions
from benchmarks.accuracy.world.scenes import Scenes, make_scenes

from .arms import ARMS, NONE, WORDS_ALONE, Left, left, positions_of, tokens_left
from .decoder import PATCHES, Answerer
from .questions import ANSWERS, LAYOUT, MANY, THERE, WHERE, Questions, balanced
from .report import OLD, RENUMBERED, document, draw
from .training import learn

RATES = (0.5, 0.3, 0.15, 0.07)
STEPS, BLIND = 4000, 4
"""Of training, and how many times fewer where no image is read, which leaves a sixth of the tokens."""
TRAINING, ASKED = 3000, 1500
"""Scenes that are learned from, by each seed its own, and that questions are asked of."""
TIMES = {THERE: 6, MANY: 3, WHERE: 2}
"""How often each concept has each answer of a kind."""
VALIDATION, TEST = 7101, 9101
CHUNK = 128


@lru_cache(maxsize=None)
def asked(validation: bool = False) -> tuple[Scenes, Questions]:
    """Return scenes and questions: of the test, or on new crops of the training's photographs, to choose on."""
    scenes = make_scenes(ASKED, VALIDATION if validation else TEST, not validation, LAYOUT)
    return scenes, balanced(scenes, TIMES, 0)


@torch.inference_mode()
def answered(answerer: Answerer, found: Left, words: Tensor, renumber: bool) -> Tensor:
    """Return `(B,)` token ids of the answers."""
    return answerer(found.tokens, words, positions_of(found.sources, renumber)).argmax(-1)


@torch.inference_mode()
def answer_all(
    model: MiniAlbef, answerer: Answerer, arm: str, rates: Sequence[float], scenes: Scenes, questions: Questions
) -> dict[tuple[float, bool], Tensor]:
    """Return `(N,)`, bool, of which questions are answered right at each rate, with positions anew or not."""
    hits: dict[tuple[float, bool], list[Tensor]] = {(rate, anew): [] for rate in rates for anew in (False, True)}
    words, right = questions.words(), questions.answers()
    for rows in torch.arange(len(questions)).split(CHUNK):
        text = model.text(captions([[questions.concepts[row]] for row in rows.tolist()]))[:, 0]
        images = scenes.images(questions.rows[rows])
        if arm == WORDS_ALONE:
            none = Left(torch.zeros(len(rows), 0, text.shape[1]), torch.zeros(len(rows), 0, dtype=torch.long))
            found = dict.fromkeys(rates, none)
        else:
            found = left(model, arm, rates, images, text)
        for rate, anew in hits:
            hits[rate, anew].append(answered(answerer, found[rate], words[rows], anew) == right[rows])
    return {key: torch.cat(parts) for key, parts in hits.items()}


def measured(seed: int, rates: tuple[float, ...], steps: int, validation: bool, folder: Path) -> list[Record]:
    """Train the language model of one seed on its base, and ask it in every way.

    What the folder has of the same weights and settings is taken from there.
    """
    model = base(seed, folder)
    name = "-".join(map(str, [seed, digest(model), steps, TRAINING, *(["validation"] if validation else []), *rates]))
    path = folder / "answering" / f"{name}.json"
    if path.exists():
        found: list[Record] = json.loads(path.read_text())
        return found
    scenes = make_scenes(TRAINING, 3000 + seed, False, dataclasses.replace(LAYOUT, varied=True))
    of_test, questions = asked(validation)
    records: list[Record] = []

    def ask(answerer: Answerer, arm: str, rates: Sequence[float]) -> None:
        torch.manual_seed(seed)  # random guidance
        for (rate, anew), hits in answer_all(model, answerer, arm, rates, of_test, questions).items():
            if anew and arm in (NONE, WORDS_ALONE):
                continue
            about = {"seed": seed, "method": arm, "keep_rate": rate, "positions": RENUMBERED if anew else OLD}
            tokens = 0 if arm == WORDS_ALONE else PATCHES if arm == NONE else tokens_left(rate)
            for kind in ANSWERS:
                own = hits[questions.of(kind)].double()
                accuracy = {"accuracy": 100 * float(own.mean()), "error": 100 * float(own.std() / len(own) ** 0.5)}
                records.append({"kind": kind, **about, "tokens": tokens, "questions": len(own), **accuracy})

    ask(learn(model, scenes, steps // BLIND, seed, blind=True), WORDS_ALONE, (1.0,))
    answerer = learn(model, scenes, steps, seed)
    ask(answerer, NONE, (1.0,))
    for arm in ARMS:
        ask(answerer, arm, rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, nargs="+", default=[0, 1, 2], help="bases; `train` makes those that are not committed")
    add("--keep-rate", type=float, nargs="+", default=list(RATES))
    add("--steps", type=int, default=STEPS, help="of training the language model")
    add("--validation", action="store_true", help="ask on new crops of the training's photographs, to choose settings")
    add("--workers", type=int, help="processes; default: one a core")
    add("--output", type=Path, default=RESULTS)


def main(options: argparse.Namespace) -> list[Record]:
    """Measure every seed, print the tables, write JSON, Markdown and a plot."""
    rates = tuple(options.keep_rate)
    facts = (rates, options.steps, options.validation, options.output)
    tasks: list[Any] = [(measured, (seed, *facts)) for seed in options.seed]
    found = run_all(call, tasks, "answering", options.workers)
    records = [record for each in found for record in each]
    seeds = " ".join(map(str, options.seed))
    command = f"python -m benchmarks.accuracy answering --seed {seeds}"
    if options.steps != STEPS:
        command += f" --steps {options.steps}"
    name = "answering"
    if options.validation:
        command, name = f"{command} --validation", "answering-validation"
    options.output.mkdir(parents=True, exist_ok=True)
    draw(records, rates, options.output / f"{name}.png")
    write(options.output, name, command, document(records, rates), results=records)
    return records
