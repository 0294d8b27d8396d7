"""Tables of the accuracy benchmark: means, standard errors and differences over seeds."""

from __future__ import annotations

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks.accuracy.albef.report import FREE, curve_table, differences, error, pick, spread


def test_tables_give_means_and_standard_errors_over_seeds():
    records = [
        {"seed": seed, "trained": FREE, "method": method, "keep_rate": 0.5, "accuracy": value, "patches": None}
        for method, values in (("text", (90.0, 92.0)), ("none", (97.0, 97.0)))
        for seed, value in enumerate(values)
    ]
    assert pick(records, method="text", keep_rate=0.5) == [90.0, 92.0]
    assert error([90.0, 92.0]) == pytest.approx(1.0)
    assert spread([90.0, 92.0]) == "91.0 ± 1.0"
    assert "| text (TRIPS), as it is | – | 91.0 ± 1.0 | – | – |" in curve_table(records, "accuracy")
    alone = [{**record, "error": 0.25} for record in records if record["seed"] == 0]
    assert "| text (TRIPS), as it is | – | 90.0 ± 0.2 | – | – |" in curve_table(alone, "accuracy")


def test_differences_are_those_of_the_same_base():
    def record(seed, trained, method, accuracy):
        rates = (1.0,) if method == "none" else (0.7, 0.5, 0.3, 0.15)
        facts = dict(seed=seed, trained=trained, method=method, accuracy=accuracy)
        return [{**facts, "keep_rate": rate} for rate in rates]

    records = [
        *(record(0, "text", "text", 80.0) + record(1, "text", "text", 60.0)),
        *(record(0, "image", "image", 78.0) + record(1, "image", "image", 56.0)),
        *(record(0, "none", "none", 81.0) + record(1, "none", "none", 61.0)),
    ]
    lines = differences(records).splitlines()
    assert lines[2] == "| text (TRIPS), trained − image [CLS] (EViT), trained |" + " +3.0 ± 1.0 |" * 4
    assert lines[3] == "| text (TRIPS), trained − no reduction, trained |" + " -1.0 ± 0.0 |" * 4
    assert len(lines) == 4
