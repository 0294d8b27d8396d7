"""Frozen CLIP, training-free: which relevance, guided by which texts. `python -m benchmarks.accuracy clip`.

A small CLIP that saw no loss but InfoNCE names the one of 16 captions that fits a scene, while its vision tower drops
patches. All arms answer the same questions, so that their differences have small errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import command

from . import training
from .arms import ARMS, NONE, RIVALS, SHARED, Arm, answers, spent
from .model import load
from .questions import SEEDS, TEST, Questions, make_questions, right
from .report import document, draw

RATES = (0.7, 0.5, 0.3, 0.15)
Progress = Callable[[str], None]


def ask(
    model: Any, questions: Questions, arms: Sequence[Arm], rates: Sequence[float], fusion: str, progress: Progress
) -> dict[tuple[str, float], Tensor]:
    """By arm and rate, `(N,)`: 1 where the answer was right, else 0. Without selection, the rate is 1."""
    images, texts, found = questions.images(), questions.texts(model), {}
    for arm in arms:
        for rate in (1.0,) if arm.guidance == "none" else rates:
            progress(f"{arm.name} {rate:g}")
            torch.manual_seed(0)  # random guidance
            found[arm.name, rate] = right(answers(model, arm, rate, images, texts, fusion), texts).double()
    return found


def mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error of one value for each question, `(N,)`."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def summarise(found: Sequence[dict[tuple[str, float], Tensor]], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One record per arm and rate. Questions are the same for all models: a question's value is its mean over them."""
    average = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    kinds, records = {arm.name: arm for arm in arms}, []
    for (name, rate), values in average.items():
        record: dict[str, Any] = {"arm": name, "keep_rate": rate, "tokens": spent(kinds[name], rate)}
        record["by_model"] = [float(one[name, rate].mean()) for one in found]
        record["accuracy"], record["standard_error"] = mean(values)
        if (NONE, 1.0) in average and name != NONE:
            record["against_none"] = mean(values - average[NONE, 1.0])
        if (SHARED, rate) in average and name not in (SHARED, NONE):
            record["shared_values_ahead"] = mean(average[SHARED, rate] - values)
        records.append(record)
    return records


def bars(records: Sequence[dict[str, Any]], rate: float = 0.3) -> list[dict[str, Any]]:
    """What shared values must show at this rate, and whether they do."""
    at = {record["arm"]: record for record in records if record["keep_rate"] == rate}
    checked = []
    if "against_none" in at.get(SHARED, {}):
        gap, error = at[SHARED]["against_none"]
        checked.append({"what": f"not below {NONE} by more than 1", "gap": gap, "error": error, "met": gap >= -error})
    for name in RIVALS:
        if "shared_values_ahead" in at.get(name, {}):
            gap, error = at[name]["shared_values_ahead"]
            checked.append({"what": f"above {name} by more than 2", "gap": gap, "error": error, "met": gap > 2 * error})
    return checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1], help="models of the table")
    add("--count", type=int, default=1024, help="questions")
    add("--split", choices=tuple(SEEDS), default=TEST, help="choices are made on validation")
    add("--keep-rate", type=float, nargs="+", default=list(RATES))
    add("--arms", nargs="+", default=[], help="those whose names contain one of these; default: all")
    add("--fusion", choices=("mean", "sum", "none"), default="mean")
    command.add_output(parser, "results/clip")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all models, print the tables, write JSON, Markdown and plot; with `--train`, make a checkpoint instead."""
    if options.train:
        return training.main(options)
    torch.set_num_threads(options.threads)
    report = command.report_on(options)
    arms = [arm for arm in ARMS if not options.arms or any(part in arm.name for part in (*options.arms, NONE))]
    questions = make_questions(options.count, options.split)
    runs = len(options.seeds) * sum(1 if arm.guidance == "none" else len(options.keep_rate) for arm in arms)
    with tqdm(total=runs, file=sys.stderr) as bar:

        def progress(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        models = (load(seed, options.checkpoints) for seed in options.seeds)
        found = [ask(model, questions, arms, options.keep_rate, options.fusion, progress) for model in models]
    records = summarise(found, arms)
    report.update(
        results=records,
        bars=bars(records),
        bars_by_model={seed: bars(summarise([one], arms)) for seed, one in zip(options.seeds, found)},
    )
    path = options.output / f"clip-{options.split}.json"
    command.write(path, report, document(report))
    draw(report, path.with_suffix(".png"))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy clip", __doc__, add_arguments, arguments)
