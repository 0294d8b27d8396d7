"""What it saves to leave out the patch outputs of the last block that nobody reads. `python -m benchmarks.last_block`.

CLIP's ViT-B/16 with random weights, with and without selection: counted FLOPs, time in turns, and how far the pooled
output moves (`patchselect.skip_unread_outputs` is exact but for rounding).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import patchselect

from .cost import count_flops
from .measure import timed
from .report import machine, spread, versions
from .resolution import call_of, vit


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.last_block",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--image-size", type=int, default=224)
    add("--layers", type=int, nargs="+", default=[4, 9], metavar="BLOCK")
    add("--keep-rate", type=float, nargs="+", default=[1.0, 0.7, 0.5], metavar="RATE")
    add("--batch", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("results/last_block.json"))
    return options


def measure(model: nn.Module, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """GFLOPs, seconds and pooled outputs of one keep rate, without and with the option."""
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
        for skips in (turn % 2 == 0, turn % 2 == 1):
            switch(skips)
            seconds[skips].append(timed(run, device))
    moved = (outputs[True] - outputs[False]).abs().max() / outputs[False].abs().max()
    ratios = [plain / skipped for plain, skipped in zip(seconds[False], seconds[True])]
    return {
        "keep_rate": rate,
        "gflops": flops[False] / 1e9,
        "gflops_with": flops[True] / 1e9,
        "saved": 1 - flops[True] / flops[False],
        "speed_up": spread(ratios),
        "moved": float(moved),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = ["| keep rate | GFLOPs | with it | saved | speed-up | output moves by |", "|---|---|---|---|---|---|"]
    for r in records:
        speed = "{median:.3f} [{q1:.3f}, {q3:.3f}]".format(**r["speed_up"])
        lines.append(
            f"| {r['keep_rate']} | {r['gflops']:.2f} | {r['gflops_with']:.2f} | {r['saved']:.1%} | {speed} | "
            f"{r['moved']:.0e} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, build: Callable[[int], nn.Module] = vit) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parser().parse_args(arguments)
    model = build(options.image_size).to(options.device)
    rates = tqdm(options.keep_rate, file=sys.stderr, unit="rate")
    report = {
        "machine": machine(torch.device(options.device)),
        "versions": versions(),
        "settings": {**vars(options), "output": str(options.output)},
        "results": [measure(model, rate, options) for rate in rates],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1))
    sys.stdout.write(f"ViT-B/16, random weights, {options.image_size} px\n{table(report['results'])}\n")
    return report


if __name__ == "__main__":
    main()
