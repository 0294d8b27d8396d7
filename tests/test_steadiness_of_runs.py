"""Whether runs of the speed benchmark agree: the study of it. No wall-clock assertion."""

from __future__ import annotations

import json
import sys

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from benchmarks import pages
from benchmarks.common.show import spread
from benchmarks.speed import __main__ as speed
from benchmarks.speed import steadiness, steady


def record(value, sure=True, method="text", rate=0.5, batch=4, rounds=4):
    return {
        "batch": batch, "method": method, "label": method, "keep_rate": rate, "rounds": rounds,
        "speed_up": spread([value]), "settled": sure, "parts": [[1.0 / value]] * rounds,
    }  # fmt: skip


def test_runs_are_compared_by_what_has_settled():
    unpatched = record(1.0, method="unpatched", rate=1.0)
    runs = [[unpatched, record(value, sure)] for value, sure in ((2.0, True), (2.1, True), (1.9, True), (3.0, False))]
    (found,) = steadiness.compare(runs)
    assert found["speed_up"] == [2.0, 2.1, 1.9, 3.0] and found["settled"] == [True, True, True, False]
    assert found["worst"] == pytest.approx(0.05), "what has not settled says nothing"


def test_what_no_run_has_settled_is_not_compared():
    (found,) = steadiness.compare([[record(2.0, False)], [record(3.0, False, rounds=2)]])
    assert found["worst"] is None
    assert steadiness.cells(found) == ["4", "text", "0.5", "2 to 4", "(2.000) (3.000)", "–"]


def test_batches_methods_and_rates_are_kept_apart_and_a_run_may_lack_one():
    found = steadiness.compare([[record(2.0), record(3.0, batch=1)], [record(2.1)], [record(1.5, rate=0.7)]])
    assert [(r["batch"], r["keep_rate"], r["speed_up"]) for r in found] == [
        (4, 0.5, [2.0, 2.1]), (1, 0.5, [3.0]), (4, 0.7, [1.5]),
    ]  # fmt: skip


def test_estimates_are_compared_over_all_runs_settled_or_not():
    unpatched = record(1.0, method="unpatched", rate=1.0)
    runs = [[unpatched, record(value, sure)] for value, sure in ((2.0, True), (2.2, True), (1.9, False))]
    found = steadiness.estimated([*runs, [unpatched, record(3.0, rate=0.7)]])
    assert [r["estimate"] for r in found] == list(steady.ESTIMATES) and {r["values"] for r in found} == {3}
    assert all(r["worst"] == pytest.approx(0.1) for r in found)
    assert all(r["typical"] == pytest.approx(((0.1**2 + 0.05**2) / 3) ** 0.5) for r in found)


def test_study_of_runs(tiny, tmp_path, capsys, monkeypatch):
    """Here in one process: another would not know the tiny model."""

    def run(command, check, stdout):
        assert command[:3] == [sys.executable, "-m", "benchmarks.speed"] and check
        speed.main(command[3:])

    monkeypatch.setattr(steadiness.subprocess, "run", run)
    output = tmp_path / "steadiness.json"
    options = f"--model {tiny} --keep-rate 0.5 --merge 0 --tome --batch 1 --rounds 4"
    found = steadiness.main(["--runs", "2", f"--options={options}", "--output", str(output)])
    (result,) = found["results"]
    assert result["rounds"] == [4, 4] and all(value > 0 for value in result["speed_up"])
    assert len(found["took"]) == len(found["load_before"]) == 2 and found["machine"]["threads"] == 1
    assert sorted(tmp_path.glob("steadiness/*/speed.json")) == [tmp_path / f"steadiness/{n}/speed.json" for n in (1, 2)]
    assert "2 runs of" in capsys.readouterr().out
    page = pages.steadiness(json.loads(output.read_text()))
    assert "| mean of the faster half | " in page
    assert "| 1 | text | 0.5 | 4 | " in page and f"commit {found['commit']}" in page
