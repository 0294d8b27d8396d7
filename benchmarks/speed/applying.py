"""What `apply` costs, and the part of it that asks blocks what they compute.

`python -m benchmarks.speed.applying`
Time of `patchselect.apply` on an unpatched model, and of its checks alone (is each block what its adapter takes it
for, and does it treat a token alike wherever it stands?), in turns. Random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import patchselect
from benchmarks.common.clock import timed, turns
from benchmarks.common.command import add_clock, add_output, parse, report_on, settle_clock, write
from benchmarks.common.show import aligned, quartiles, spread
from patchselect.wiring.guard import check_blocks

SETTINGS: dict[str, dict[str, Any]] = {"select": {}, "merge, then select": {"merge": 0.5}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", default=["ViT-B-16"], help="names of open_clip; their image side is patched")
    add_clock(parser)
    add("--rounds", type=int, default=15)
    add_output(parser, "results/applying.json", "JSON file; the table goes beside it")


def image_side(name: str) -> nn.Module:
    import open_clip

    return open_clip.create_model(name, pretrained=None).visual.eval()  # type: ignore[no-any-return]


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the seconds of `apply` and of its checks, for each of the settings."""
    model, clock = image_side(name), (torch.device("cpu"), options.clock)
    seconds: dict[tuple[str, str], list[float]] = {(s, what): [] for s in SETTINGS for what in ("apply", "checks")}
    for order in turns(list(SETTINGS), options.rounds + 1):
        for setting in order:
            handle: list[patchselect.Handle] = []
            whole = timed(lambda h=handle, s=setting: h.append(patchselect.apply(model, **SETTINGS[s])), *clock)  # type: ignore[misc]
            plan, tower = handle[0].plan, handle[0].towers[0]
            patchselect.remove(model)
            checks = timed(lambda p=plan, t=tower: check_blocks(p, t), *clock)  # type: ignore[misc]
            seconds[setting, "apply"].append(whole)
            seconds[setting, "checks"].append(checks)
    return [
        {"model": name, "setting": s, **{what: spread(seconds[s, what][1:]) for what in ("apply", "checks")}}
        for s in SETTINGS
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.applying", __doc__, add_arguments, arguments)
    settle_clock(options)
    report = report_on(options)
    report["results"] = [found for name in options.model for found in measure(name, options)]
    rows = [["model", "apply", f"ms ({options.clock}), median [quartiles]", "of these, checks"]]
    for found in report["results"]:
        times = [quartiles(found[what], 1, scale=1e3) for what in ("apply", "checks")]
        rows.append([found["model"], found["setting"], *times])
    write(options.output, report, aligned(rows))
    return report


if __name__ == "__main__":
    main()
