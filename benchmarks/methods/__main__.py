"""`python -m benchmarks.methods`: all methods on all tasks, at equal FLOPs, as a leaderboard.

Answers are kept in the output folder, so a run that is broken off goes on where it was. `--write` puts the figures into
benchmarks/methods/leaderboard.json and makes docs/leaderboard.md of them; without it they are shown alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.clip.questions import TEST, VALIDATION
from benchmarks.common import command
from benchmarks.common.machine import commit

from .method import methods
from .report import FIGURES, PAGE, page, read, table
from .study import BASELINE, CHECKED_RATE, RATES, Asked, checked, compare
from .tasks import TASKS
from .timing import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--method", nargs="+", default=[], help="those whose names contain one of these; default: all")
    add("--count", type=int, help="questions; default: the task's")
    add("--split", choices=(VALIDATION, TEST), default=TEST, help="choices are made on validation")
    add("--keep-rate", type=float, nargs="+", default=list(RATES), help="of the paper's selections, whose FLOPs count")
    add("--time", action="store_true", help="measure time on a ViT-B/16 with random weights instead")
    add("--write", action="store_true", help=f"put the figures into {FIGURES.name} and make the page")
    add("--page", action="store_true", help="make the page of the figures that there are, and nothing else")
    add("--threads", type=int, default=torch.get_num_threads())
    command.add_output(parser, "results/methods", "folder of the answers")


def main(options: argparse.Namespace) -> None:
    """Ask, show, and write if asked to."""
    torch.set_num_threads(options.threads)
    if options.page:
        PAGE.write_text(page(read()), encoding="utf-8")
        return
    chosen = methods([*options.method, BASELINE] if options.method else None)
    source, found = commit(), {}
    if options.time:
        found = {"time": {**measure(chosen, options.keep_rate), "commit": source}}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    for name in () if options.time else options.task:
        task, count = TASKS[name], options.count or TASKS[name].count
        asked = Asked(options.output / f"{name}.pt")
        with tqdm(total=len(chosen) * len(options.keep_rate), file=sys.stderr, desc=name) as bar:

            def progress(what: str, bar: tqdm = bar) -> None:  # type: ignore[type-arg]
                bar.set_postfix_str(what)
                bar.update()

            record = compare(task, chosen, options.keep_rate, count, options.split, asked, progress)
        asks = f" --count {count}" if options.count else ""
        asks += "" if options.split == TEST else f" --split {options.split}"
        record.update(
            command=f"python -m benchmarks.methods --task {name}{asks}", commit=source, torch=torch.__version__
        )
        if options.write and CHECKED_RATE in options.keep_rate:
            for method in chosen:
                cell = record["methods"][method.name][f"{CHECKED_RATE:g}"]
                again = partial(checked, task, method, cell["knob"])
                cell["checked"] = asked.get(f"checked {method.name} {cell['knob']}", again)
        sys.stdout.write(table(record) + "\n")
        found.setdefault("tasks", {})[name] = record
    if options.write:
        report = joined(read() if FIGURES.is_file() else {"tasks": {}}, found)
        FIGURES.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(report), encoding="utf-8")


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return a file of figures with those of a run in it: rows of the same questions stand beside each other."""
    tasks = dict(old["tasks"])
    for name, record in new.get("tasks", {}).items():
        before = tasks.get(name, {})
        same = all(before.get(key) == record[key] for key in ("questions", "split", "no reduction", "flops"))
        rows = {**(before["methods"] if same else {}), **record["methods"]}
        order = [method.name for method in methods()]
        tasks[name] = {**record, "methods": {name: rows[name] for name in order if name in rows}}
    return {**old, **new, "tasks": {name: tasks[name] for name in TASKS if name in tasks}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.methods", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main(parse())
