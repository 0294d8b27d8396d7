"""Frozen CLIP, training-free: which relevance, guided by which texts. `python -m benchmarks.accuracy clip`.

A small CLIP that saw no loss but InfoNCE names the one of 16 captions that fits a scene, while its vision tower drops
patches. All arms answer the same questions, so that their differences have small errors. A run that was broken off goes
on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.candidates import GRID, KINDS
from benchmarks.common import command
from benchmarks.common.machine import commit

from . import training
from .arms import ARMS, EARLY, NONE, RIVALS, SHARED, Arm, answers, flops
from .model import PATCH, SIZE, digest, load, size_of
from .questions import TEST, VALIDATION, Questions, make_questions, right
from .report import document, draw

RATES = (0.7, 0.5, 0.3, 0.15)
Progress = Callable[[str], None]
Found = Dict[Tuple[str, float], Tensor]
"""By arm and rate, `(N,)`: 1 where the answer was right, else 0; of text alone, how likely it is."""


def ask(
    model: Any,
    questions: Questions,
    arms: Sequence[Arm],
    rates: Sequence[float],
    fusion: str,
    progress: Progress,
    found: Found | None = None,
    keep: Callable[[], None] = lambda: None,
) -> Found:
    """Ask one model. Without selection, the rate is 1.

    Args:
        model: in evaluation mode, without selection.
        questions: what it is asked.
        arms: how it spends less.
        rates: keep rates.
        fusion: of `patchselect.apply`.
        progress: told what comes next.
        found: what was answered before, which is not asked again; added to.
        keep: called after each answer.
    """
    found = {} if found is None else found
    images, texts = questions.images(), questions.texts(model)
    for arm in arms:
        for rate in (1.0,) if arm.guidance in ("none", "words") else rates:
            progress(f"{arm.name} {rate:g}")
            if (arm.name, rate) in found:
                continue
            if arm.guidance == "words":
                found[arm.name, rate] = text_alone.answered(questions.candidates, arm.texts, questions.kind)
            else:
                torch.manual_seed(0)  # random guidance
                found[arm.name, rate] = right(answers(model, arm, rate, images, texts, fusion), texts).double()
            keep()
    return found


def mean(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error of one value for each question, `(N,)`."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def summarise(
    found: Sequence[Found], arms: Sequence[Arm], named: Tensor | None = None, size: int = SIZE
) -> list[dict[str, Any]]:
    """Return one record per arm and rate. All models get the same questions: a question's value is its mean over them.

    Args:
        found: of each model.
        arms: what was asked.
        named: `(N,)`, how many objects the right caption of each question names; gives the accuracy of each kind.
        size: of their images, in pixels.
    """
    average = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    kinds, records = {arm.name: arm for arm in arms}, []
    for (name, rate), values in average.items():
        if name not in kinds:
            continue
        record: dict[str, Any] = {"arm": name, "keep_rate": rate, "flops": flops(kinds[name], rate, size // PATCH)}
        record["by_model"] = [float(one[name, rate].mean()) for one in found]
        record["accuracy"], record["standard_error"] = mean(values)
        if named is not None:
            record["by_objects"] = {int(n): mean(values[named == n]) for n in named.unique()}
        if (NONE, 1.0) in average and kinds[name].guidance not in ("none", "words"):
            record["against_none"] = mean(values - average[NONE, 1.0])
        if (EARLY, rate) in average and name in (SHARED, *RIVALS) and name != EARLY:
            record["against_merging"] = mean(values - average[EARLY, rate])
        if (SHARED, rate) in average and name in RIVALS:
            record["shared_values_ahead"] = mean(average[SHARED, rate] - values)
        records.append(record)
    return records


class Partial:
    """What a run has found so far, in a file, until it is through; answers to other questions are not taken over."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        kept = torch.load(path, weights_only=True) if path.is_file() else {}
        self.found: dict[int, Found] = kept["found"] if kept.get("about") == about else {}

    def save(self) -> None:
        """Write, so that a run that is broken off while it writes has the file of before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"about": self.about, "found": self.found}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1], help="models of the table")
    add("--count", type=int, default=2048, help="questions")
    about = (
        "wrong captions: all combinations of right and absent objects, which no text alone answers; leaky: the right "
    )
    add("--questions", choices=tuple(KINDS), default=GRID, help=f"{about}one with one object swapped, for comparison")
    add("--split", choices=(VALIDATION, TEST), default=TEST, help="choices are made on validation")
    add("--keep-rate", type=float, nargs="+", default=list(RATES))
    add("--arms", nargs="+", default=[], help="those whose names contain one of these; default: all")
    add("--fusion", choices=("mean", "sum", "none"), default="mean")
    command.add_output(parser, "results/clip")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all models, print the tables, write JSON, Markdown and plot; with `--train`, make a checkpoint instead."""
    if options.train:
        return training.main(options)
    ignored = [f"--{name}" for name, usual in training.ALONE.items() if getattr(options, name) != usual]
    if ignored:
        sys.exit(f"{', '.join(ignored)} can only be said of a model to --train; --seeds names those that are asked")
    torch.set_num_threads(options.threads)
    report = {"commit": commit(), **command.report_on(options)}
    arms = [arm for arm in ARMS if not options.arms or any(part in arm.name for part in (*options.arms, NONE))]
    models = {seed: load(seed, options.checkpoints) for seed in options.seeds}
    size, *others = {size_of(model) for model in models.values()}
    if others:
        sys.exit(f"--seeds names models of several image sizes ({size}, {', '.join(map(str, others))}): ask each alone")
    questions = make_questions(options.count, options.split, kind=options.questions, size=size)
    runs = sum(1 if arm.guidance in ("none", "words") else len(options.keep_rate) for arm in arms)
    path = options.output / (f"clip-{options.split}" + ("" if options.questions == GRID else f"-{options.questions}"))
    about = {
        "asked": [options.count, options.split, options.questions, options.fusion],
        "weights": [digest(seed, options.checkpoints) for seed in options.seeds],
    }
    partial = Partial(path.with_suffix(".partial"), about)
    with tqdm(total=len(options.seeds) * runs, file=sys.stderr) as bar:

        def progress(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        for seed, model in models.items():
            found = partial.found.setdefault(seed, {})
            ask(model, questions, arms, options.keep_rate, options.fusion, progress, found, partial.save)
    named = torch.tensor([len(candidates[0]) for candidates in questions.candidates])
    rates = (1.0, *options.keep_rate)
    answered = [{k: v for k, v in partial.found[seed].items() if k[1] in rates} for seed in options.seeds]
    report["results"] = summarise(answered, arms, named, size)
    report["questions"] = {int(n): int((named == n).sum()) for n in named.unique()}
    command.write(path.with_suffix(".json"), report, document(report))
    draw(report, path.with_suffix(".png"))
    partial.path.unlink()
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy clip", __doc__, add_arguments, arguments)
