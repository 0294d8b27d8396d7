"""Ask all methods the same questions at the FLOPs of the paper's two selections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.clip.questions import TEST
from benchmarks.common.tome import matching_flops

from .method import STEPS, Method, Selection
from .tasks import Task

RATES = (0.7, 0.5, 0.3, 0.15)
BASELINE = "ToMe-front"
"""What the others are compared with, question by question."""
PAPER = Selection("paper", "", "keys", space="hidden")
"""Whose FLOPs all others spend."""
NEAR = 0.01
"""How far from these FLOPs a method may be, as a share of them, without a note."""
CHECKED, CHECKED_RATE = 48, 0.3
"""Questions that the tests ask again, and at which rate."""


class Asked:
    """What was answered so far, in a file, so that a run that is broken off goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.found, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").replace(self.path)
        return self.found[key]


def target(task: Task, rate: float) -> float:
    """Return the FLOPs of the paper's two selections at this keep rate, of one image."""
    return task.flops(task.host(task.seeds[0]), PAPER, round(STEPS * (1 - rate)))


def whole(task: Task) -> float:
    """Return the FLOPs of the untouched tower, of one image."""
    return task.flops(task.host(task.seeds[0]), NONE, 0)


def knob_for(task: Task, method: Method, goal: float) -> tuple[int, float]:
    """Return the knob at which a method costs as near to `goal` FLOPs as it gets, and what it costs there."""
    host = task.host(task.seeds[0])
    count = lru_cache(maxsize=None)(lambda knob: task.flops(host, method, knob))
    knob = matching_flops(goal, count, method.most(host))
    return knob, count(knob)


def mean(values: Tensor) -> list[float]:
    """Return the mean of one value per question and its standard error, in percent."""
    return [round(100 * float(values.mean()), 2), round(100 * float(values.std() / len(values) ** 0.5), 2)]


class Untouched(Selection):
    """No method: the tower as it is."""

    def __init__(self) -> None:
        super().__init__("no reduction", "", None, guidance="random")

    def arguments(self, host: Any, knob: int) -> dict[str, Any]:
        return dict(keep_rate=1.0, guidance="random")


NONE = Untouched()


def compare(
    task: Task, methods: Sequence[Method], rates: Sequence[float], count: int, split: str, asked: Asked,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of one task, as `leaderboard.json` has them."""

    def answers(method: Method, knob: int) -> Tensor:
        def ask(seed: int) -> Tensor:
            key = f"{split} {count} {seed} {method.name} {knob}"
            return asked.get(key, lambda: task.ask(task.host(seed), method, knob, count, split))  # type: ignore[no-any-return]

        return torch.stack([ask(seed) for seed in task.seeds]).mean(0)

    def near(method: Method, rate: float) -> tuple[int, float]:
        return asked.get(f"knob {method.name} {rate:g}", lambda: knob_for(task, method, goals[rate]))  # type: ignore[no-any-return]

    full = asked.get("whole", lambda: whole(task))
    goals = {rate: asked.get(f"target {rate:g}", partial(target, task, rate)) for rate in rates}
    record: dict[str, Any] = {"title": task.title, "about": task.about, "split": split, "questions": count}
    record["flops"] = {f"{rate:g}": round(goal / full, 4) for rate, goal in goals.items()}
    record["text alone"] = mean(task.blind(count, split))
    record["no reduction"] = mean(answers(NONE, 0))
    rival = next(method for method in methods if method.name == BASELINE)
    rows: dict[str, dict[str, Any]] = {}
    for method in [rival, *methods]:
        for rate in rates:
            if f"{rate:g}" in rows.get(method.name, {}):
                continue
            progress(f"{method.name} {rate:g}")
            knob, cost = near(method, rate)
            found = answers(method, knob)
            cell: dict[str, Any] = {"knob": knob, "flops": round(cost / goals[rate], 4), "accuracy": mean(found)}
            if method is not rival:
                cell["ahead"] = mean(found - answers(rival, near(rival, rate)[0]))
            rows.setdefault(method.name, {})[f"{rate:g}"] = cell
    record["methods"] = {method.name: {"source": method.source, **rows[method.name]} for method in methods}
    return record


def checked(task: Task, method: Method, knob: int) -> float:
    """Return how many of the first `CHECKED` test questions the first model answers: what the tests ask again."""
    host = task.host(task.seeds[0])
    return float(task.ask(host, method, knob, CHECKED, TEST).sum())
