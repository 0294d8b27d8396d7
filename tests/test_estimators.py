"""The study of which estimate of a speed-up scatters least. No wall-clock assertion."""

from __future__ import annotations

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from benchmarks.speed import estimators


def test_estimates_of_steady_times_agree():
    base, own = [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]
    assert {estimate(base, base, own) for estimate in estimators.ESTIMATES.values()} == {2.0}
    paired = estimators.ESTIMATES["median of paired ratios"]([2.0, 4.0, 6.0], [0.0] * 3, [1.0, 2.0, 3.0])
    between = estimators.ESTIMATES["the same, between two"]([1.0], [3.0], [1.0])
    best = estimators.ESTIMATES["ratio of the best"]([9.0, 2.0], [0.0] * 2, [7.0, 1.0])
    assert (paired, between, best) == (2.0, 2.0, 2.0)


def test_scatter_is_what_runs_are_away_from_their_median():
    runs = [{"wall": {0.5: {"before": [value], "after": [value], "own": [1.0]}}} for value in (1.9, 2.0, 2.2)]
    found = estimators.scatter(runs, "wall", estimators.ESTIMATES["ratio of means"])
    assert found["worst"] == pytest.approx(0.1) and found["speed_up"] == {"0.5": 2.0}
    assert found["typical"] == pytest.approx(((0.05**2 + 0.1**2) / 3) ** 0.5)


def test_study_of_estimates(tiny, tmp_path, capsys):
    output = tmp_path / "estimators.json"
    found = estimators.main(
        f"--model {tiny} --runs 2 --rounds 2 --threads 1 --keep-rate 0.5 0.7 --output {output}".split()
    )
    assert len(found["results"]) == 2 * len(estimators.ESTIMATES)
    assert all(r["worst"] >= r["typical"] >= 0 and r["speed_up"]["0.5"] > 0 for r in found["results"])
    assert output.exists() and "median of paired ratios" in capsys.readouterr().out
