"""Methods side by side: the page is the file of figures, the figures are what a run gives, FLOPs are equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
pytest.importorskip("sklearn")
pytest.importorskip("emoji")

from benchmarks.accuracy.clip.questions import VALIDATION
from benchmarks.methods import report, study
from benchmarks.methods.__main__ import joined, main, parse
from benchmarks.methods.method import STEPS, Selection, methods
from benchmarks.methods.tasks import TASKS
from benchmarks.methods.ways.cdpruner import Diverse

RATE = study.CHECKED_RATE
AGAIN = ("ToMe-front", "merge, then select: contrast")
"""Methods that are asked again."""


@pytest.fixture(scope="module")
def figures():
    return report.read()


def method(name):
    return next(one for one in methods() if one.name == name)


def test_the_page_is_what_the_figures_say(figures):
    assert report.PAGE.read_text(encoding="utf-8") == report.page(figures)


def test_every_row_is_a_method(figures):
    names = [one.name for one in methods()]
    assert len(set(names)) == len(names) and set(figures["tasks"]) <= set(TASKS)
    for task in figures["tasks"].values():
        assert study.BASELINE in task["methods"] and set(task["methods"]) <= set(names)
        for row in task["methods"].values():
            assert set(task["flops"]) == {f"{rate:g}" for rate in study.RATES} == set(row) - {"source"}


def test_a_row_joins_those_of_the_same_questions():
    record = {"questions": 8, "split": "test", "no reduction": [50.0, 1.0], "flops": {"0.3": 0.6}}
    old = {"tasks": {"nouns": {**record, "methods": {study.BASELINE: {"a": 1}, "random": {"a": 2}}}}}
    new = {"tasks": {"nouns": {**record, "methods": {"random": {"a": 3}}}}}
    assert joined(old, new)["tasks"]["nouns"]["methods"] == {"random": {"a": 3}, study.BASELINE: {"a": 1}}
    new["tasks"]["nouns"]["questions"] = 9
    assert list(joined(old, new)["tasks"]["nouns"]["methods"]) == ["random"]


def test_what_is_behind_is_behind(figures):
    """A figure cannot be edited alone: an accuracy is that of the baseline and the difference to it."""
    for task in figures["tasks"].values():
        for rate, name in itertools.product(task["flops"], task["methods"]):
            cell, rival = task["methods"][name][rate], task["methods"][study.BASELINE][rate]
            behind = cell.get("ahead", (0.0, 0.0))[0]
            assert cell["accuracy"][0] - rival["accuracy"][0] == pytest.approx(behind, abs=0.02)


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("asked", ["matching", "candidates"])
def test_a_part_is_asked_again(figures, asked, name):
    task, rate = TASKS[asked], f"{RATE:g}"
    cell = figures["tasks"][asked]["methods"][name][rate]
    assert abs(study.checked(task, method(name), cell["knob"]) - cell["checked"]) <= 1  # of 48: rounding may turn one
    goal = study.target(task, RATE)
    assert task.flops(task.host(0), method(name), cell["knob"]) / goal == pytest.approx(cell["flops"], abs=1e-3)
    assert goal / study.whole(task) == pytest.approx(figures["tasks"][asked]["flops"][rate], abs=1e-3)


def test_the_knob_meets_the_flops():
    task = TASKS["matching"]
    goal = study.target(task, 0.5)
    for name in (study.BASELINE, "merge, then select: keys"):
        knob, cost = study.knob_for(task, method(name), goal)
        costs = [task.flops(task.host(0), method(name), knob + step) for step in (-1, 1)]
        assert costs[0] > cost > costs[1] and abs(cost - goal) == min(abs(c - goal) for c in (*costs, cost))
    assert study.knob_for(task, study.PAPER, goal)[1] == goal


def test_a_method_of_ones_own_is_one_object(tmp_path):
    own = Selection("mine", "nobody's", "joint", layers=1)
    task = TASKS["matching"]
    asked, seen = study.Asked(tmp_path / "asked.pt"), []
    chosen = [method(study.BASELINE), own]
    found = study.compare(task, chosen, (RATE,), 8, VALIDATION, asked, seen.append)
    assert set(found["methods"]) == {study.BASELINE, "mine"} and len(seen) == 2
    assert "| mine | " in report.table({**found, "command": "here", "commit": "none", "torch": torch.__version__})
    again = study.compare(task, chosen, (RATE,), 8, VALIDATION, study.Asked(asked.path), seen.append)
    assert again == found


def test_the_command_shows_a_table(tmp_path, capsys):
    arguments = ["--task", "matching", "--method", "random", "--count", "4", "--keep-rate", "0.3", "--split"]
    main(parse([*arguments, VALIDATION, "--output", str(tmp_path), "--threads", "1"]))
    shown = capsys.readouterr().out
    assert "| random | " in shown and "| ToMe-front | " in shown and "--count 4 --split validation" in shown


def test_the_greedy_search_takes_what_spans_most():
    """Each step of CDPruner's search takes the patch with which the determinant of the kernel is largest."""
    torch.manual_seed(0)
    patches, scores = torch.randn(2, 7, 5).double(), torch.randn(2, 7).double()
    order = Diverse(1, 4).order(patches, scores)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    quality = (scores - low + 1e-6) / (high - low + 1e-6)
    x = torch.nn.functional.normalize(patches, dim=-1)
    kernel = quality[:, :, None] * (x @ x.transpose(1, 2)) * quality[:, None]
    for row in range(2):
        taken: list = []
        for _ in range(4):
            rest = [i for i in range(7) if i not in taken]
            dets = [float(torch.det(kernel[row][[*taken, i]][:, [*taken, i]])) for i in rest]
            taken.append(rest[dets.index(max(dets))])
        assert order[row].argsort(descending=True)[:4].tolist() == taken


def test_costs_are_those_of_the_paper_at_its_own_knob():
    assert [round(STEPS * (1 - rate)) for rate in study.RATES] == [120, 200, 280, 340]
