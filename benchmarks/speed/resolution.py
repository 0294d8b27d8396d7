"""Resolution at constant cost: which keep rate pays for larger images. `python -m benchmarks.speed.resolution`.

The second claim of the TRIPS papers. For each image size, the keep rate at which the guided vision encoder costs what
the unpatched one costs at its own size, from token arithmetic, with counted FLOPs and measured time next to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import timed, turns
from benchmarks.common.command import (
    add_clock,
    add_device,
    add_layers,
    add_output,
    parse,
    report_on,
    settle_clock,
    write,
)
from benchmarks.common.cost import count_flops
from benchmarks.common.objects import OUTSIDE, named
from benchmarks.common.show import aligned, ratio, spread

from . import steady
from .encoder import call_of, vit

SIZES = [224, 240, 256, 272, 288, 304, 320, 352, 384, 448, 512]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--own-size", type=int, default=224, help="image size of the unpatched ViT-B/16: 224 (CLIP), 256, 384 (ALBEF)")
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="PIXELS")
    add_layers(parser, [4, 9])
    add("--relevance", type=named, default="values", metavar="NAME", help=f"values: CLIP; keys: ALBEF; {OUTSIDE}")
    add("--budget", type=float, default=1.0)
    add("--batch", type=int, default=2)
    add("--rounds", type=int, default=12, help="at most: until all have settled")
    add("--per-layer", action="store_true", help="one rate per layer, early layers keep more")
    add_device(parser)
    add_clock(parser)
    add_output(parser, "results/resolution")


def rows(model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the sizes that the budget can pay for, with rates and counted FLOPs; others with the reason why not."""
    own = count_flops(call_of(model, 1, options.own_size, False, None))
    records: list[dict[str, Any]] = []
    for size in options.sizes:
        patchselect.apply(model, 0.5, options.layers, relevance=options.relevance)
        try:
            rate = patchselect.keep_rate_for_budget(model, options.budget, image_size=size, per_layer=options.per_layer)
        except ValueError as error:
            records.append({"size": size, "refused": str(error)})
            continue
        patchselect.apply(model, rate, options.layers, relevance=options.relevance)
        guided = count_flops(call_of(model, 1, size, True, None))
        patchselect.remove(model)
        whole = count_flops(call_of(model, 1, size, False, None))
        records.append(
            {"size": size, "patches": (size // 16) ** 2, "rate": rate, "share": guided / own, "unpatched": whole / own}
        )
    patchselect.remove(model)
    return records


def time_rows(model: nn.Module, records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Time each size and of the unpatched encoder at its own size, all in turns."""
    measured = [record for record in records if "rate" in record]
    baseline: list[float] = []
    seconds: list[list[float]] = [[] for _ in measured]
    device, rounds = torch.device(options.device), turns(range(-1, len(measured)), options.rounds + 1)
    for turn, order in enumerate(tqdm(rounds, total=options.rounds + 1, file=sys.stderr, unit="round")):
        if steady.known(baseline, seconds):
            break
        for place in order:
            if place < 0:
                patchselect.remove(model)
                call = call_of(model, options.batch, options.own_size, False, device)
            else:
                record = measured[place]
                patchselect.apply(model, record["rate"], options.layers, relevance=options.relevance)
                call = call_of(model, options.batch, record["size"], True, device)
            taken = timed(call, device, options.clock)
            if turn:
                (baseline if place < 0 else seconds[place]).append(taken)
    for record, found in zip(measured, seconds):
        record.update(seconds=spread(found), time_ratio=steady.compared(found, baseline))
    return spread(baseline)


def table(records: Sequence[dict[str, Any]]) -> str:
    head = [
        "image",
        "patches",
        "keep rate",
        "FLOPs of the unpatched at its own size",
        "without selection",
        "time [quartiles]",
    ]
    rows = [head]
    for r in records:
        if "refused" in r:
            reach = r["refused"].split("[")[1].split("]")[0]
            rows.append([f"{r['size']} px", "", "–", f"can reach {reach}", "", ""])
            continue
        rates = r["rate"] if isinstance(r["rate"], tuple) else (r["rate"],)
        ratios = [f"{r['share']:.3f}", f"{r['unpatched']:.2f}", ratio(r["time_ratio"], 2)]
        rows.append([f"{r['size']} px", str(r["patches"]), ", ".join(f"{rate:.3f}" for rate in rates), *ratios])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None, build: Callable[[int], nn.Module] = vit) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.resolution", __doc__, add_arguments, arguments)
    settle_clock(options, options.device)
    report = report_on(options, options.device)
    model = build(options.own_size).to(options.device)
    records = rows(model, options)
    report.update(unpatched_seconds=time_rows(model, records, options), results=records)
    about = f"ViT-B/16, random weights, own size {options.own_size} px, layers {options.layers}"
    write(options.output / "resolution.json", report, f"{about}\n\n{table(records)}")
    return report


if __name__ == "__main__":
    main()
