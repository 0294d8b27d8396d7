"""Do runs of the speed benchmark agree with each other? `python -m benchmarks.speed.steadiness`.

Runs of `benchmarks.speed`, one process after the other; of each speed-up, how far those that have settled lie from
their median; and how far all of them would lie from it by other estimates of the same times (`steady.ESTIMATES`). Run
it while the machine does other work: on a quiet one they agree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, Dict, Tuple

from benchmarks.common.command import add_output, parse, report_on, write
from benchmarks.common.results import read
from benchmarks.common.show import aligned

from .steady import ESTIMATES, seconds_of

Record = Dict[str, Any]
Key = Tuple[int, str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--options", default="", metavar="'OPTIONS'", help="of each run, in one word; default: none")
    add_output(parser, "results/steadiness.json", "JSON file; the table goes beside it, each run's files in folders")


def by_case(results: Sequence[Record]) -> dict[Key, Record]:
    """Return the speed-ups of one run, by batch, method and keep rate."""
    return {(r["batch"], r["label"], r["keep_rate"]): r for r in results if r["method"] != "unpatched"}


def compare(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """Return a record per speed-up: what each run found, which have settled, and how far these lie from their median.

    Args:
        runs: the results of each run; a batch that a run had no time for is one that it has not settled.
    """
    found, cases = [], [by_case(results) for results in runs]
    for key in dict.fromkeys(key for run in cases for key in run):
        records = [run[key] for run in cases if key in run]
        sure = [r["speed_up"]["median"] for r in records if r["settled"]]
        batch, label, rate = key
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


def estimated(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """Return a record per estimate: how far runs lie from their median by it, settled or not.

    Of each batch, method and keep rate that two runs or more have measured: the root mean square, and the farthest.
    """
    found, cases = [], [by_case(results) for results in runs]
    bases = [{r["batch"]: r for r in results if r["method"] == "unpatched"} for results in runs]
    for name, estimate in ESTIMATES.items():
        apart: list[float] = []
        for key in dict.fromkeys(key for run in cases for key in run):
            values = [
                seconds_of(base[key[0]]["parts"], estimate) / seconds_of(run[key]["parts"], estimate)
                for base, run in zip(bases, cases)
                if key in run
            ]
            apart += [value / median(values) - 1 for value in values] if len(values) > 1 else []
        if apart:
            typical = fmean(value**2 for value in apart) ** 0.5
            found.append({"estimate": name, "typical": typical, "worst": max(map(abs, apart)), "values": len(apart)})
    return found


def cells(record: Record) -> list[str]:
    """Write one row: the runs' speed-ups, in brackets where they have not settled."""
    pairs = zip(record["speed_up"], record["settled"])
    shown = [f"{value:.3f}" if sure else f"({value:.3f})" for value, sure in pairs]
    low, high = min(record["rounds"]), max(record["rounds"])
    worst = "–" if record["worst"] is None else f"{100 * record['worst']:.1f} %"
    rounds = str(low) if low == high else f"{low} to {high}"
    return [str(record["batch"]), record["label"], f"{record['keep_rate']:g}", rounds, " ".join(shown), worst]


def cells_of_estimate(record: Record) -> list[str]:
    """Write one row of the estimates."""
    return [record["estimate"], f"{record['typical']:.1%}", f"{record['worst']:.1%}"]


COLUMNS_OF_ESTIMATES = ("of what a block took in the rounds", "runs scatter (root mean square)", "worst")
COLUMNS = ("batch", "method", "keep", "rounds", "speed-up of each run (not settled)", "settled: farthest from median")


def main(arguments: Sequence[str] | None = None) -> Record:
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
    report.update(took=took, load_before=loads, results=results, estimates=estimated(runs))
    tables = (
        aligned([COLUMNS, *map(cells, results)]),
        aligned([COLUMNS_OF_ESTIMATES, *map(cells_of_estimate, report["estimates"])]),
    )
    write(options.output, report, "\n\n".join([about(report), *tables]))
    return report


def about(report: Record) -> str:
    """Say how long the runs took, and what the machine did besides."""
    took, loads = report["took"], report["load_before"]
    return (
        f"{len(took)} runs of {min(took):.0f} to {max(took):.0f} s; one-minute load {min(loads):.1f} to "
        f"{max(loads):.1f} on {report['machine']['cores']} cores as they began"
    )


if __name__ == "__main__":
    main()
