"""Do runs of the speed benchmark agree with each other? `python -m benchmarks.speed.steadiness`.

Runs of `benchmarks.speed`, one process after the other, and of each speed-up how far those that have settled lie from
their median. Run it while the machine does other work: on a quiet one they agree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.common.command import add_output, parse, report_on, write
from benchmarks.common.results import read
from benchmarks.common.show import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--options", default="", metavar="'OPTIONS'", help="of each run, in one word; default: none")
    add_output(parser, "results/steadiness.json", "JSON file; the table goes beside it, each run's files in folders")


def compare(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a record per speed-up: what each run found, which have settled, and how far these lie from their median.

    Args:
        runs: the results of each run; a batch that a run had no time for is one that it has not settled.
    """
    cases: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
    for record in (record for results in runs for record in results if record["method"] != "unpatched"):
        cases.setdefault((record["batch"], record["label"], record["keep_rate"]), []).append(record)
    found = []
    for (batch, label, rate), records in cases.items():
        sure = [r["speed_up"]["median"] for r in records if r["settled"]]
        found.append(
            {
                "batch": batch,
                "label": label,
                "keep_rate": rate,
                "rounds": [r["rounds"] for r in records],
                "speed_up": [r["speed_up"]["median"] for r in records],
                "settled": [r["settled"] for r in records],
                "worst": max(abs(value / median(sure) - 1) for value in sure) if sure else None,
            }
        )
    return found


def cells(record: dict[str, Any]) -> list[str]:
    """Write one row: the runs' speed-ups, in brackets where they have not settled."""
    pairs = zip(record["speed_up"], record["settled"])
    shown = [f"{value:.3f}" if sure else f"({value:.3f})" for value, sure in pairs]
    low, high = min(record["rounds"]), max(record["rounds"])
    worst = "–" if record["worst"] is None else f"{100 * record['worst']:.1f} %"
    rounds = str(low) if low == high else f"{low} to {high}"
    return [str(record["batch"]), record["label"], f"{record['keep_rate']:g}", rounds, " ".join(shown), worst]


COLUMNS = ("batch", "method", "keep", "rounds", "speed-up of each run (not settled)", "settled: farthest from median")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what the JSON file holds."""
    options = parse("benchmarks.speed.steadiness", __doc__, add_arguments, arguments)
    report = report_on(options)
    runs, took, loads = [], [], []
    for number in range(1, options.runs + 1):
        start = time.monotonic()
        folder = options.output.with_suffix("") / str(number)
        command = [sys.executable, "-m", "benchmarks.speed", *options.options.split(), "--output", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run = read(folder / "speed.json")
        runs.append(run["results"])
        took.append(round(time.monotonic() - start, 1))
        loads.append(run["machine"]["load_before"])
    results = compare(runs)
    report["machine"]["threads"] = run["machine"]["threads"]
    report.update(took=took, load_before=loads, results=results)
    write(options.output, report, f"{about(report)}\n\n{aligned([COLUMNS, *map(cells, results)])}")
    return report


def about(report: dict[str, Any]) -> str:
    """Say how long the runs took, and what the machine did besides."""
    took, loads = report["took"], report["load_before"]
    return (
        f"{len(took)} runs of {min(took):.0f} to {max(took):.0f} s; one-minute load {min(loads):.1f} to "
        f"{max(loads):.1f} on {report['machine']['cores']} cores as they began"
    )


if __name__ == "__main__":
    main()
