"""How much faster patch selection makes a model on this machine: `python -m benchmarks.speed`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.command import add_device, add_layers, add_model, add_output, parse, report_on, write
from benchmarks.common.objects import OUTSIDE, named

from .cases import GUIDED, PASSES, VIEWS
from .measure import MOST_ROUNDS
from .plot import draw
from .report import document, summarise
from .run import run, selection_of

DESCRIPTION = """\
Times a CLIP-like model unpatched and with patch selection guided by text, image and chance, on real photographs with
captions, all in turns in one run. Nothing is downloaded unless --pretrained asks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser, "ViT-B-16")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="default: the model's own")
    add("--keep-rate", type=float, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE", help="shares of patches kept")
    add_layers(parser)
    add("--guidance", nargs="+", default=[*GUIDED], choices=GUIDED)
    add("--relevance", type=named, metavar="NAME", help=f"of text: keys, values, …, {OUTSIDE}; default: the adapter's")
    add("--fusion", type=named, default="mean", metavar="NAME", help=f"of what is not kept: sum, none, {OUTSIDE}")
    add("--batch", type=int, nargs="+", default=[8, 1], metavar="IMAGES")
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16", "amp"], help="amp: bf16 autocast")
    add("--pass", nargs="+", default=["forward"], choices=PASSES, dest="work", help="train: forward and backward")
    add("--view", nargs="+", default=["tower"], choices=VIEWS, help="vision tower, or whole model with the text side")
    add(
        "--tome",
        nargs="*",
        default=["published", "front"],
        choices=["published", "fused", "front"],
        help="token merging at the same FLOPs, its attention a map in plain torch as published or torch's fused one; "
        "front: fused, and all merging in the first third of the blocks; nothing: without",
    )
    about = "merge this share of the removed patches before ONE selection by text, at the same FLOPs; 0: without"
    add("--merge", type=float, default=0.5, metavar="SHARE", help=about)
    add_device(parser)
    add("--seconds", type=float, default=140.0, help="time for everything but loading, if 3 rounds fit in it")
    add("--rounds", type=int, help=f"exactly so many rounds, however long they take (otherwise 3 to {MOST_ROUNDS})")
    add_output(parser, "results/speed", "folder for speed.json, speed.md and speed.png")
    add("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `speed.json` holds."""
    options = parse("benchmarks.speed", DESCRIPTION, add_arguments, arguments)
    check(options)
    torch.manual_seed(options.seed)
    report: dict[str, Any] = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    report.update(report_on(options, options.device))
    with tqdm(total=0, unit="call", dynamic_ncols=True, file=sys.stderr) as bar:
        found = run(options, bar)
        bar.set_description_str("done")
    report.update(
        model=found.model,
        notes=[*found.notes, *busy(report["machine"])],
        flop_limit=found.limits,
        results=summarise(found.measured, found.flops, selection_of(options)),
    )
    write(options.output / "speed.json", report, document(report))
    draw(report, options.output / "speed.png")
    sys.stdout.write(f"\nWritten: speed.json, speed.md and speed.png in {options.output}\n")
    return report


def check(options: argparse.Namespace) -> None:
    """Refuse what would only fail, or mislead, after minutes."""
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


def busy(about: dict[str, Any]) -> list[str]:
    """Return a warning, where other processes took so much of the machine that times scatter."""
    load, cores = about["load_before"], about["cores"]
    if load is None or about["device"] != "cpu" or load < 0.3 * cores:
        return []
    return [f"other processes were running (load {load:.1f} on {cores} cores before this one): times scatter"]


if __name__ == "__main__":
    main()
