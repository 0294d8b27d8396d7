"""What a short alignment buys on the small CLIP: `python -m benchmarks.accuracy align --study`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Dict, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.candidates import GRID
from benchmarks.accuracy.yours.alignment import Plan, align
from benchmarks.common import command
from benchmarks.common.show import aligned

from .arms import NONE, Arm, answers
from .host import scene_pairs, small_host
from .model import LAYERS
from .questions import TEST, make_questions, right
from .study import mean

CONTROL = "fine-tuned without selection"
PLANS: dict[str, Plan | None] = {
    "as it is": None,
    CONTROL: Plan(keep_rates=(1.0,)),
    "values, shared": Plan("values"),
    "values, own caption": Plan("values", pairing="paired"),
    "values, own caption, selection alignment": Plan("values", pairing="paired", alignment=1.0),
    "keys, shared": Plan("keys"),
    "keys, own caption": Plan("keys", pairing="paired"),
    "keys, own caption, selection alignment": Plan("keys", pairing="paired", alignment=1.0),
}
"""What the models were fine-tuned with; nothing in it was tuned."""

RATES = (0.5, 0.3)
Found = Dict[Tuple[str, str, str, float], Tensor]
"""By plan, relevance, texts and rate: `(N,)`, 1 where the answer was right."""


def questions_for(name: str) -> list[tuple[Arm, float]]:
    """Return what a fine-tuned model is asked: its own relevance; both for those that were trained with none."""
    relevances = [r for r in ("values", "keys") if name.startswith(r)] or ["values", "keys"]
    arms = [Arm(r, "text", r, texts) for r in relevances for texts in ("candidates", "paired")]
    return [(Arm(NONE, "none"), 1.0), *((arm, rate) for arm in arms for rate in RATES)]


def run(seed: int, options: argparse.Namespace, bar: tqdm[Any]) -> Found:
    """Run all plans on one small CLIP."""
    questions, pairs, found = make_questions(options.count, TEST), scene_pairs(6000, options.seed), {}
    for name, plan in PLANS.items():
        bar.set_description_str(f"model {seed}: {name}")
        host = small_host(seed, options.checkpoints)
        if plan is not None:
            given = dict(steps=options.steps, batch=options.batch, rate=options.rate or Plan.rate, seed=options.seed)
            align(host, pairs, Plan(**{**vars(plan), **given, "layers": LAYERS}), progress=False)  # type: ignore[arg-type]
        with torch.no_grad():
            images, texts = questions.images(), questions.texts(host.model)
            for arm, rate in questions_for(name):
                features = answers(host.model, arm, rate, images, texts)
                found[name, arm.relevance or "", arm.texts, rate] = right(features, texts).double()
        bar.update()
    return found


def summarise(found: list[Found]) -> list[dict[str, Any]]:
    """Return one record per plan and question; a question's value is its mean over the models."""
    average = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    records = []
    for (name, relevance, texts, rate), values in average.items():
        key = (name, relevance, texts, rate)
        record: dict[str, Any] = dict(zip(("plan", "relevance", "texts", "keep_rate"), key))
        record["by_model"] = [float(one[key].mean()) for one in found]
        record["accuracy"], record["standard_error"] = mean(values)
        record["against_control"] = mean(values - average[CONTROL, relevance, texts, rate])
        records.append(record)
    return records


def table(records: list[dict[str, Any]], relevance: str, blind: tuple[float, float]) -> str:
    """Return the accuracy of the plans that have to do with one relevance, and what each gains over the control.

    `blind` is the accuracy of the texts alone and its standard error.
    """
    columns = [("", "", 1.0)] + [(relevance, texts, rate) for texts in ("candidates", "paired") for rate in RATES]
    words = {"candidates": "shared", "paired": "per caption"}
    head = ["no selection", *(f"{words[texts]}, keep {rate:g}" for _, texts, rate in columns[1:])]
    found = {(r["plan"], r["relevance"], r["texts"], r["keep_rate"]): r for r in records}
    rows = [[f"{relevance}: fine-tuned with", *head]]
    rows.append(["(text alone, no image)", *[f"{blind[0]:.3f} ± {blind[1]:.3f}"] * len(columns)])
    for name in PLANS:
        if (name, *columns[1]) in found:
            cells = [found[(name, *column)] for column in columns]
            own = name in ("as it is", CONTROL)
            rows.append([name, *(_cell(cell, plain=own) for cell in cells)])
    return aligned(rows)


def _cell(record: dict[str, Any], plain: bool) -> str:
    gap, error = record["against_control"]
    value = f"{record['accuracy']:.3f} ± {record['standard_error']:.3f}"
    return value if plain else f"{record['accuracy']:.3f} ({gap:+.3f} ± {error:.3f})"


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and ask both models, print the tables, write JSON and Markdown."""
    report, seeds = command.report_on(options), (0, 1)
    with tqdm(total=len(PLANS) * len(seeds), file=sys.stderr) as bar:
        found = [run(seed, options, bar) for seed in seeds]
    records = summarise(found)
    report["results"] = records
    candidates = make_questions(options.count, TEST).candidates
    blind = report["text_alone"] = mean(text_alone.answered(candidates, text_alone.TRAINED, GRID))
    parts = [
        "# A short alignment of the small CLIP",
        f"{options.steps} steps of {options.batch} pairs, both models, {options.count} test questions (chance 0.0625). "
        f"In brackets: the gain over {CONTROL} for as many steps, on the same questions, ± one standard error.",
        table(records, "values", blind),
        table(records, "keys", blind),
    ]
    command.write(options.output / "align-study.json", report, "\n\n".join(parts))
    return report
