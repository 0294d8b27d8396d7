"""Whole image-text models, fusion and heads included: `python -m benchmarks.speed.whole_model`.

Pairs of an image and its text through the whole model (`pair`), and a training step without the optimiser (`train`:
forward with momentum encoders and hard negatives where the model has them, and backward), at the published sizes with
random weights. All cases run in turns, in a new order each round.

`--host blip` needs transformers alone. `--host albef` needs a checkout of salesforce/ALBEF (`ALBEF_DIR`) and the
folder of the runners that build its heads under recent releases (`PATCHSELECT_TARGETS`, with `albef_targets.py`).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import CLOCKS, synchronise, timed, turns
from benchmarks.common.command import add_clock, add_layers, add_output, parse, report_on, settle_clock, write
from benchmarks.common.cost import countable
from benchmarks.common.show import markdown, ratio, spread
from patchselect.wiring.towers import find_towers

from . import steady
from .parts import as_parts, parts_table, spent_by_part
from .whole_hosts import HOSTS, Whole

PAPER = "TRIPS (EMNLP 2022) at 384 px on V100s: 79.32 to 115.01 pairs/s, 1.45x, for 76.03 to 55.60 GFLOPs, 1.37x."
COLUMNS = ("work", "px", "method", "keep", "pairs/s", "speed-up", "GFLOPs/pair", "FLOP ratio", "efficiency")


def run_once(whole: Whole, work: str, method: str) -> None:
    if work == "pair":
        with torch.inference_mode():
            whole.pair()
        return
    whole.model.zero_grad(set_to_none=True)
    step = whole.negatives if method == "text, honest negatives" and whole.negatives is not None else whole.step
    step().backward()


def cases_of(whole: Whole, work: str, rates: Sequence[float]) -> list[tuple[str, float | None]]:
    cases: list[tuple[str, float | None]] = [("unpatched", None), *(("text", rate) for rate in rates)]
    if work == "train" and whole.negatives is not None:
        cases += [("text, honest negatives", rate) for rate in rates]
    return cases


def measure(options: argparse.Namespace, work: str, size: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Return one record per case."""
    torch.manual_seed(options.seed)
    whole = HOSTS[options.host](work, size, options.batch, options.text_length)
    cases = cases_of(whole, work, options.keep_rate)
    seconds: dict[tuple[str, float | None], list[float]] = {case: [] for case in cases}
    flops: dict[tuple[str, float | None], dict[str, float]] = {}
    by_part: dict[tuple[str, float | None], list[dict[str, float]]] = {case: [] for case in cases}
    device = next(whole.model.parameters()).device
    blocks = find_towers(whole.model)[0].blocks if options.profile and work == "pair" else []
    clock = CLOCKS[options.clock]

    def patched(case: tuple[str, float | None]) -> None:
        patchselect.remove(whole.model)
        if case[1] is not None:
            patchselect.apply(whole.model, case[1], options.layers)

    def spent(case: tuple[str, float | None], clock: Callable[[], float]) -> dict[str, float]:
        found = spent_by_part(lambda: run_once(whole, work, case[0]), blocks, options.layers, clock)
        return {part: each / options.batch for part, each in found.items()}

    for case in cases:  # the warm-up counts FLOPs
        patched(case)
        with countable() as counter:
            flops[case] = spent(case, counter.get_total_flops)
        synchronise(device)
        bar.update()
    base = cases[0]
    for order in turns(cases, options.rounds, options.seed):
        if steady.known(seconds[base], seconds.values()):
            break
        for case in order:
            patched(case)
            bar.set_description_str(f"{whole.name} {work} {size} px {case[0]}")
            run = partial(lambda case: by_part[case].append(spent(case, clock)), case)
            seconds[case].append(timed(run, device, options.clock))
            bar.update()
    return [
        {
            "model": whole.name,
            "work": work,
            "image_size": size,
            "method": method,
            "keep_rate": rate,
            "seconds": seconds[method, rate],
            "pairs_per_second": spread([options.batch / s for s in seconds[method, rate]]),
            "speed_up": steady.compared(seconds[base], seconds[method, rate]),
            "gflops_per_pair": flops[method, rate]["all"] / 1e9,
            "flop_ratio": flops[base]["all"] / flops[method, rate]["all"],
            "parts": as_parts(flops[method, rate], by_part[method, rate]) if blocks else None,
        }
        for method, rate in cases
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    def cells(record: dict[str, Any]) -> list[str]:
        speed, pace = record["speed_up"], record["pairs_per_second"]["median"]
        first = record["method"] == "unpatched"
        return [
            record["work"],
            str(record["image_size"]),
            record["method"],
            "" if first else f"{record['keep_rate']:.2f}",
            f"{pace:.2f}",
            "1" if first else ratio(speed, 2),
            f"{record['gflops_per_pair']:.1f}",
            f"{record['flop_ratio']:.2f}",
            "" if first else f"{speed['median'] / record['flop_ratio']:.2f}",
        ]

    return markdown([COLUMNS, *map(cells, records)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", choices=list(HOSTS), default="blip")
    add("--work", nargs="+", choices=["pair", "train"], default=["pair", "train"])
    add("--image-size", type=int, nargs="+", default=[256, 384], metavar="PIXELS")
    add("--keep-rate", type=float, nargs="+", default=[0.7, 0.5], metavar="RATE")
    add_layers(parser, [4, 9])
    add("--batch", type=int, default=4, metavar="PAIRS")
    add("--text-length", type=int, default=30, metavar="TOKENS")
    add("--rounds", type=int, default=16, help="at most: until all have settled")
    add_clock(parser)
    add("--profile", action="store_true", help="also where the time and the FLOPs of a pair go, part by part")
    add_output(parser, "results/whole_model.json", "JSON file; the tables go beside it")
    add("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.whole_model", __doc__, add_arguments, arguments)
    warnings.simplefilter("ignore")
    settle_clock(options)
    report = report_on(options)
    records: list[dict[str, Any]] = []
    with tqdm(unit="call", dynamic_ncols=True, file=sys.stderr) as bar:
        for work in options.work:
            for size in options.image_size:
                records += measure(options, work, size, bar)
    report.update(weights="random", results=records)
    text = [table(records)]
    for size in options.image_size if options.profile else ():
        pairs = [record for record in records if record["parts"] and record["image_size"] == size]
        text += [f"where a pair at {size} px goes", parts_table(pairs)] if pairs else []
    text.append(
        f"speed-up: median [quartiles] over halves of the rounds; efficiency: speed-up over FLOP ratio.\n{PAPER}\n"
        f"{report['machine']}, torch {report['versions']['torch']}"
    )
    write(options.output, report, "\n\n".join(text))
    sys.stdout.write(f"{options.output}\n")
    return report


if __name__ == "__main__":
    main()
