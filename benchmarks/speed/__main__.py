"""How much faster patch selection makes a model on this machine: `python -m benchmarks.speed`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.command import (
    add_clock,
    add_device,
    add_layers,
    add_model,
    add_output,
    parse,
    report_on,
    settle_clock,
    write,
)
from benchmarks.common.objects import OUTSIDE, named
from benchmarks.common.show import threads

from . import scale
from .cases import AGAIN, GUIDED, PASSES, VIEWS
from .measure import MOST_ROUNDS
from .plot import draw
from .report import document, summarise
from .run import run, selection_of

DESCRIPTION = """\
Times a CLIP-like model unpatched, with patch selection and with merging, on real photographs with captions, all in
turns in one run, until the speed-ups have settled or the time is up. Nothing is downloaded unless --pretrained asks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser, "ViT-B-16")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="default: the model's own")
    add("--keep-rate", type=float, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE", help="shares of patches kept")
    add_layers(parser)
    about = "again: by a text that has guided an image before"
    add("--guidance", nargs="*", default=["text"], choices=[*GUIDED, AGAIN], help=about)
    add("--relevance", type=named, metavar="NAME", help=f"of text: keys, values, …, {OUTSIDE}; default: the adapter's")
    add("--fusion", type=named, default="mean", metavar="NAME", help=f"of what is not kept: sum, none, {OUTSIDE}")
    add("--batch", type=int, nargs="+", default=[1, 4], metavar="IMAGES")
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16", "amp"], help="amp: bf16 autocast")
    add("--pass", nargs="+", default=["forward"], choices=PASSES, dest="work", help="train: forward and backward")
    add("--view", nargs="+", default=["tower"], choices=VIEWS, help="vision tower, or whole model with the text side")
    add(
        "--tome",
        nargs="*",
        default=["front"],
        choices=["published", "fused", "front"],
        help="token merging at the same FLOPs, its attention a map in plain torch as published or torch's fused one; "
        "front: fused, and all merging in the first third of the blocks; nothing: without",
    )
    about = "merge this share of the removed patches before ONE selection by text, at the same FLOPs; 0: without"
    add("--merge", type=float, default=0.5, metavar="SHARE", help=about)
    add(
        "--merge-at",
        type=float,
        nargs="*",
        default=[0.5],
        metavar="RATE",
        help="keep rates that both kinds of merging are compared at; nothing: at all of --keep-rate",
    )
    add("--text-encoder", action="store_true", help="time the text encoder too")
    add("--memory", action="store_true", help="measure peak memory too")
    add("--compile", action="store_true", help="torch.compile all cases, the unpatched one too")
    add("--cuda-graphs", action="store_true", help="replay each case as one CUDA graph (on a CPU: as without)")
    add_device(parser)
    add_clock(parser)
    add(
        "--seconds",
        type=float,
        default=100.0,
        help="time for everything, if one round fits in it; short settings come first",
    )
    add("--rounds", type=int, help=f"exactly so many rounds, however long they take (otherwise at most {MOST_ROUNDS})")
    about = "curves over image size, texts, batch and depth instead (python -m benchmarks.speed.scale -h: its options)"
    add("--scale", action="store_true", help=about)
    add_output(parser, "results/speed", "folder for speed.json, speed.md and speed.png")
    add("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `speed.json` holds."""
    options = parse("benchmarks.speed", DESCRIPTION, add_arguments, arguments)
    if options.scale:
        return scale.main(["--device", options.device, "--output", str(options.output)])
    check(options)
    torch.manual_seed(options.seed)
    report = report_on(options, options.device)
    sys.stdout.write(announcement(options, report["machine"]))
    sys.stdout.flush()
    with tqdm(total=0, unit="call", dynamic_ncols=True, file=sys.stderr) as bar:
        found = run(options, bar)
        bar.set_description_str("done")
    report.update(
        model=found.model,
        notes=[*found.notes, *busy(report["machine"], options.clock)],
        flop_limit=found.limits,
        results=summarise(found.measured, found.flops, selection_of(options)),
    )
    write(options.output / "speed.json", report, document(report))
    draw(report, options.output / "speed.png")
    sys.stdout.write(f"\nWritten: speed.json, speed.md and speed.png in {options.output}\n")
    return report


def check(options: argparse.Namespace) -> None:
    """Refuse what would only fail, or mislead, after minutes."""
    settle_clock(options, options.device)
    if "pair" in options.view and options.work != ["forward"]:
        sys.exit("--view pair measures forward passes only: drop --pass, or use --view tower")
    if any(not 0 < rate < 1 for rate in options.keep_rate):
        sys.exit(f"--keep-rate takes shares between 0 and 1 (unpatched is always measured), got {options.keep_rate}")
    if any(batch < 1 for batch in options.batch) or (options.rounds is not None and options.rounds < 1):
        sys.exit("--batch and --rounds take whole numbers from 1")
    if not 0 <= options.merge < 1:
        sys.exit(f"--merge takes a share from 0 to below 1, got {options.merge}")
    if options.merge and options.layers and options.layers[0] == 0:
        sys.exit("--merge needs a block before the first of --layers: select later, or give --merge 0")
    options.keep_rate = sorted(set(options.keep_rate))


def announcement(options: argparse.Namespace, machine: dict[str, Any]) -> str:
    """Say what is about to happen, and how long it takes."""
    compared = [f"guided by {name}" for name in options.guidance]
    compared += ["merging"] * bool(options.tome) + ["merging before one selection"] * bool(options.merge)
    long = (
        f"{options.rounds} rounds, however long they take"
        if options.rounds
        else (f"at most {options.seconds:.0f} seconds, less if all speed-ups settle before")
    )
    return (
        f"How much faster {options.model} gets on this machine ({machine['processor']}, {threads(options.threads)}, "
        f"{'CPU time' if options.clock == 'cpu' else 'wall clock'}):\n"
        f"unpatched, {', '.join(compared)}; keep rates {', '.join(f'{rate:g}' for rate in options.keep_rate)}; "
        f"batch {', '.join(map(str, options.batch))}.\nThis takes {long}.\n\n"
    )


def busy(about: dict[str, Any], clock: str) -> list[str]:
    """Warn where other processes took so much of the machine that times scatter."""
    load, cores = about["load_before"], about["cores"]
    if load is None or about["device"] != "cpu" or load < 0.3 * cores:
        return []
    effect = (
        "CPU time leaves it out, but for what it does to caches and clock rates" if clock == "cpu" else "times scatter"
    )
    return [f"other processes were running (load {load:.1f} on {cores} cores before this one): {effect}"]


if __name__ == "__main__":
    main()
