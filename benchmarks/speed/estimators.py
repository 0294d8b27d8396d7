"""Which estimate of a speed-up scatters least on a busy machine: `python -m benchmarks.speed.estimators`.

Short runs, one after the other, of the unpatched model and of text guidance, as `benchmarks.speed` makes them. Each
call is read with two clocks (of the wall, and the CPU time of the process), with one thread and with all of them; each
estimate is made from each run alone. What scatters least over the runs is what `benchmarks.speed` reports. Run it while
the machine is busy: on a quiet one all of them agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import mean, median, pstdev
from typing import Any, Callable, List

import torch
from tqdm import tqdm

from benchmarks.common.clock import CLOCKS, readings, turns
from benchmarks.common.command import add_model, add_output, parse, report_on, write
from benchmarks.common.photographs import load_photos
from benchmarks.common.show import aligned
from benchmarks.models.host import Host
from benchmarks.models.loading import load

from .cases import Case, Inputs, Selection, Setting, patched, runner
from .run import inputs_of

Times = List[float]
Estimate = Callable[[Times, Times, Times], float]

ESTIMATES: dict[str, Estimate] = {
    "ratio of means": lambda base, after, own: mean(base) / mean(own),
    "ratio of medians": lambda base, after, own: median(base) / median(own),
    "ratio of the best": lambda base, after, own: min(base) / min(own),
    "median of paired ratios": lambda base, after, own: median(b / o for b, o in zip(base, own)),
    "the same, between two": lambda base, after, own: median((b + a) / 2 / o for b, a, o in zip(base, after, own)),
}
"""From seconds of the unpatched model before each call, after it, and of the call itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser, "ViT-B-16")
    add("--keep-rate", type=float, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE")
    add("--batch", type=int, default=1)
    add("--runs", type=int, default=10)
    add("--rounds", type=int, default=5, help="of each run")
    add("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    add_output(parser, "results/estimators.json", "JSON file; the table goes beside it")


def one_run(host: Host, inputs: Inputs, options: argparse.Namespace, seed: int, bar: tqdm[Any]) -> dict[str, Any]:
    """Seconds by clock and keep rate: of the unpatched model `before` and `after` each call, and of its `own`."""
    setting, selection = Setting(host.image_size, options.batch, "fp32"), Selection()
    seconds = {clock: {rate: {"before": [], "after": [], "own": []} for rate in options.keep_rate} for clock in CLOCKS}

    def spent(case: Case) -> dict[str, float]:
        with patched(host, case, selection):
            call = runner(host, case, setting, inputs)
            bar.update()
            return readings(call, inputs.images.device)

    for order in turns(options.keep_rate, options.rounds, seed):
        before = spent(Case("unpatched"))
        for rate in order:
            own, after = spent(Case("text", rate)), spent(Case("unpatched"))
            for clock in CLOCKS:
                for name, found in (("before", before), ("own", own), ("after", after)):
                    seconds[clock][rate][name].append(found[clock])
            before = after
    return seconds


def scatter(runs: Sequence[dict[str, Any]], clock: str, estimate: Estimate) -> dict[str, float]:
    """Return how far the runs lie from their median, over all rates: typically (root mean square) and at most."""
    apart: list[float] = []
    middles = {}
    for rate in runs[0][clock]:
        found = [estimate(*(run[clock][rate][name] for name in ("before", "after", "own"))) for run in runs]
        middles[f"{rate:g}"] = median(found)
        apart += [value / median(found) - 1 for value in found]
    return {"typical": pstdev(apart, 0.0), "worst": max(map(abs, apart)), "speed_up": middles}  # type: ignore[dict-item]


def table(records: Sequence[dict[str, Any]]) -> str:
    rates = list(records[0]["speed_up"])
    rows = [["threads", "clock", "estimate", "scatter", "worst", *(f"keep {rate}" for rate in rates)]]
    for r in records:
        found = [f"{r['speed_up'][rate]:.3f}" for rate in rates]
        rows.append([str(r["threads"]), r["clock"], r["estimate"], f"{r['typical']:.1%}", f"{r['worst']:.1%}", *found])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; returns what the JSON file holds."""
    options = parse("benchmarks.speed.estimators", __doc__, add_arguments, arguments)
    report = report_on(options)
    host = load(options.model, pretrained=options.pretrained)
    inputs = inputs_of(host, load_photos(), options.batch)
    runs: dict[int, list[dict[str, Any]]] = {}
    calls = options.rounds * (1 + 2 * len(options.keep_rate))
    with tqdm(total=len(options.threads) * options.runs * calls, unit="call", file=sys.stderr) as bar:
        for threads in options.threads:
            torch.set_num_threads(threads)
            runs[threads] = [one_run(host, inputs, options, seed, bar) for seed in range(options.runs)]
    records = [
        {"threads": threads, "clock": clock, "estimate": name, **scatter(runs[threads], clock, estimate)}
        for threads in options.threads
        for clock in CLOCKS
        for name, estimate in ESTIMATES.items()
    ]
    report.update(model={"name": host.name, "weights": host.weights}, results=records, runs=runs)
    about = (
        f"{options.runs} runs of {options.rounds} rounds, {host.name}, batch {options.batch}; scatter: root mean "
        "square of what a run is away from the median run, over the keep rates; worst: the largest"
    )
    write(options.output, report, f"{about}\n\n{table(records)}")
    return report


if __name__ == "__main__":
    main()
