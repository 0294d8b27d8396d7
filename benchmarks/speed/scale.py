"""How the speed-up grows with image size, texts per image, batch and depth: `python -m benchmarks.speed.scale`.

A ViT-B/16 with random weights, unpatched and guided by text, in turns as `benchmarks.speed` has them, until the
speed-up has settled; beside each what the FLOPs allow. "texts" is what one selection for all of them costs
(`pairing="shared"`); a selection for each is in `pairs`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import CLOCKS, timed, turns
from benchmarks.common.command import add_device, add_layers, add_output, parse, report_on, write
from benchmarks.common.cost import count_flops
from benchmarks.common.show import aligned, canvas, speed_up, spread
from patchselect.wiring.towers import find_towers

from . import steady
from .encoder import vit
from .lockstep import Lockstep

POINT = {"size": 224, "texts": 1, "batch": 1, "depth": 12}
"""What stays while another one changes."""
VALUES = {
    "size": [224, 288, 384, 512],
    "texts": [1, 10, 100, 1000],
    "batch": [1, 2, 4, 8, 16],
    "depth": [6, 12, 24],
}
NAMES = {"size": "image size, pixels", "texts": "texts per image, one selection", "batch": "images", "depth": "blocks"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--over", nargs="+", choices=list(VALUES), default=list(VALUES))
    for name, values in VALUES.items():
        add(f"--{name}", type=int, nargs="+", default=values, metavar="N", help=NAMES[name])
    add("--keep-rate", type=float, default=0.5)
    add_layers(parser)
    add("--rounds", type=int, default=16, help="of each point, at most")
    add("--clock", choices=CLOCKS, help="default: cpu on a CPU, with one thread")
    add_device(parser)
    add_output(parser, "results/scale", "folder for scale.json, scale.md and scale.png")


def call_of(model: nn.Module, point: dict[str, int], guided: bool, device: torch.device | None) -> Callable[[], Any]:
    """One forward at a point; without a device its inputs are made inside of it, as the FLOP counter wants."""

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        home = device or torch.device("cpu")
        images = torch.zeros(point["batch"], 3, point["size"], point["size"], device=home)
        return images, torch.zeros(point["texts"], 512, device=home)

    ready = None if device is None else tuple(map(torch.randn_like, made()))

    def call() -> None:
        images, text = ready or made()
        with torch.no_grad(), patchselect.guide(model, text, "shared") if guided else nullcontext():
            model(images, interpolate_pos_encoding=True)

    return call


def measure(name: str, value: int, options: argparse.Namespace, build: Callable[..., nn.Module]) -> dict[str, Any]:
    """FLOP ratio and speed-up at one point of one curve."""
    point, device = {**POINT, name: value}, torch.device(options.device)
    plain, guided = (build(224, point["depth"]).to(device) for _ in range(2))
    patchselect.apply(guided, options.keep_rate, options.layers)
    flops = [count_flops(call_of(model, point, model is guided, None)) for model in (plain, guided)]
    calls = [call_of(model, point, model is guided, device) for model in (plain, guided)]
    for call in calls:
        call()
    lockstep = Lockstep(CLOCKS[options.clock])
    parts: tuple[list[steady.Parts], list[steady.Parts]] = ([], [])
    with lockstep.at([block for model in (plain, guided) for block in find_towers(model)[0].blocks]):
        for number, order in enumerate(turns((0, 1), options.rounds)):
            if number and steady.settled(number, steady.speed_ups(*parts)):
                break
            if device.type == "cuda":
                ran = [[timed(calls[which], device, options.clock)] for which in order]
            else:
                ran = lockstep.run([calls[which] for which in order])
            for which, found in zip(order, ran):
                parts[which].append(found)
    speed_ups = steady.speed_ups(*parts)
    return {
        "over": name,
        **point,
        "value": value,
        "gflops": flops[1] / 1e9,
        "flop_ratio": flops[0] / flops[1],
        "seconds": spread([sum(found) for found in parts[1]]),
        "speed_up": spread(speed_ups),
        **steady.trust(len(parts[1]), speed_ups),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Write one row per point."""
    rows = [["over", "value", "GFLOPs", "seconds", "FLOP ratio", "speed-up"]]
    for r in records:
        figures = [f"{r['gflops']:.1f}", f"{r['seconds']['median']:.3f}", f"{r['flop_ratio']:.3f}"]
        rows.append([NAMES[r["over"]], str(r["value"]), *figures, speed_up(r, digits=3)])
    return aligned(rows)


def draw(records: Sequence[dict[str, Any]], path: Any) -> None:
    """Draw a panel per curve: the arithmetic dashed, quartiles of what was measured, pale where it has not settled."""
    curves = [(name, list(group)) for name, group in groupby(records, key=lambda r: r["over"])]
    figure, axes = canvas(3.2 * len(curves), 3.2, 1, len(curves))
    for axis, (name, points) in zip(axes, curves):
        places = [r["value"] for r in points]
        axis.plot(places, [r["flop_ratio"] for r in points], "k--", linewidth=1, label="FLOP limit")
        axis.plot(places, [r["speed_up"]["median"] for r in points], "-", color="tab:red", alpha=0.4)
        for r in points:
            middle = r["speed_up"]["median"]
            bars = [[middle - r["speed_up"]["q1"]], [r["speed_up"]["q3"] - middle]]
            style = dict(color="tab:red", alpha=1.0 if r["settled"] else 0.3, capsize=2, markersize=4)
            axis.errorbar([r["value"]], [middle], bars, fmt="o", **style)
        if max(places) > 20 * min(places):
            axis.set_xscale("log")
        axis.set_xlabel(NAMES[name])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("speed-up over unpatched")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None, build: Callable[..., nn.Module] = vit) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.scale", __doc__, add_arguments, arguments)
    options.clock = options.clock or ("wall" if torch.device(options.device).type == "cuda" else "cpu")
    if options.clock == "cpu":
        torch.set_num_threads(1)
    report = report_on(options, options.device)
    points = [(name, value) for name in options.over for value in getattr(options, name)]
    bar = tqdm(points, unit="point", file=sys.stderr)
    report["results"] = [measure(name, value, options, build) for name, value in bar]
    about = f"ViT-B/16 with random weights, keep rate {options.keep_rate}; where nothing else is said: {POINT}"
    write(options.output / "scale.json", report, f"{about}\n\n{table(report['results'])}")
    draw(report["results"], options.output / "scale.png")
    return report


if __name__ == "__main__":
    main()
