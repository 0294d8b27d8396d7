"""What it saves to leave out the patch outputs of the last block that nobody reads.

`python -m benchmarks.speed.last_block`
CLIP's ViT-B/16 with random weights, with and without selection: counted FLOPs, time in turns, and how far the pooled
output moves (`patchselect.skip_unread_outputs` is exact but for rounding).
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
from benchmarks.common.clock import timed
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
from benchmarks.common.show import aligned, ratio

from . import steady
from .encoder import call_of, vit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image-size", type=int, default=224)
    add_layers(parser, [4, 9])
    add("--keep-rate", type=float, nargs="+", default=[1.0, 0.7, 0.5], metavar="RATE")
    add("--batch", type=int, default=2)
    add("--rounds", type=int, default=16, help="of each rate, at most: until it has settled")
    add_device(parser)
    add_clock(parser)
    add_output(parser, "results/last_block.json", "JSON file; the table goes beside it")


def measure(model: nn.Module, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return GFLOPs, seconds and pooled outputs of one keep rate, without and with the option."""
    size, batch = options.image_size, options.batch
    device = torch.device(options.device)
    guided = rate < 1
    run = call_of(model, batch, size, guided, device)
    images, text = torch.randn(batch, 3, size, size, device=device), torch.randn(batch, 512, device=device)

    def switch(skips: bool) -> None:
        patchselect.apply(model, rate, options.layers, guidance="text" if guided else "image")
        if skips:
            patchselect.skip_unread_outputs(model)

    @torch.no_grad()
    def pooled() -> torch.Tensor:
        if not guided:
            return model(images).image_embeds
        with patchselect.guide(model, text):
            return model(images).image_embeds

    flops: dict[bool, int] = {}
    outputs: dict[bool, torch.Tensor] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for skips in (False, True):
        switch(skips)
        flops[skips], outputs[skips] = count_flops(call_of(model, 1, size, guided, None)), pooled()
    for turn in range(options.rounds):
        if steady.known(seconds[False], [seconds[True]]):
            break
        for skips in (turn % 2 == 0, turn % 2 == 1):
            switch(skips)
            seconds[skips].append(timed(run, device, options.clock))
    moved = (outputs[True] - outputs[False]).abs().max() / outputs[False].abs().max()
    return {
        "keep_rate": rate,
        "gflops": flops[False] / 1e9,
        "gflops_with": flops[True] / 1e9,
        "saved": 1 - flops[True] / flops[False],
        "speed_up": steady.compared(seconds[False], seconds[True]),
        "moved": float(moved),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["keep rate", "GFLOPs", "with it", "saved", "speed-up", "output moves by"]]
    for r in records:
        flops = [f"{r['gflops']:.2f}", f"{r['gflops_with']:.2f}", f"{r['saved']:.1%}"]
        rows.append([str(r["keep_rate"]), *flops, ratio(r["speed_up"], 3), f"{r['moved']:.0e}"])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None, build: Callable[[int], nn.Module] = vit) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.last_block", __doc__, add_arguments, arguments)
    settle_clock(options, options.device)
    report = report_on(options, options.device)
    model = build(options.image_size).to(options.device)
    rates = tqdm(options.keep_rate, file=sys.stderr, unit="rate")
    report["results"] = [measure(model, rate, options) for rate in rates]
    about = f"ViT-B/16, random weights, {options.image_size} px"
    write(options.output, report, f"{about}\n\n{table(report['results'])}")
    return report


if __name__ == "__main__":
    main()
