"""How much faster patch selection makes a model on this machine: `python -m benchmarks.speed`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cases import GUIDED, PASSES, VIEWS
from .measure import MOST_ROUNDS
from .plot import draw
from .report import document, machine, summarise, versions
from .run import run


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Times a CLIP-like model unpatched and with patch selection guided by text, image and chance, on "
        "real photographs with captions, all in turns in one run. Nothing is downloaded unless --pretrained asks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--model", default="ViT-B-16", help="open_clip or transformers name, or a local checkpoint (folder or file)")
    add("--pretrained", help='weights: open_clip tag or file; "hub" to download a transformers checkpoint')
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="default: the model's own")
    add("--keep-rate", type=float, nargs="+", default=[0.3, 0.5, 0.7], metavar="RATE", help="shares of patches kept")
    add("--layers", type=int, nargs="+", metavar="BLOCK", help="0-based selection blocks; default: 5th and 10th of 12")
    add("--guidance", nargs="+", default=[*GUIDED], choices=GUIDED)
    add("--relevance", choices=["keys", "features", "values", "joint"], help="of text; default: the adapter's")
    add("--batch", type=int, nargs="+", default=[8, 1], metavar="IMAGES")
    add("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16", "amp"], help="amp: bf16 autocast")
    add("--pass", nargs="+", default=["forward"], choices=PASSES, dest="work", help="train: forward and backward")
    add("--view", nargs="+", default=["tower"], choices=VIEWS, help="vision tower, or whole model with the text side")
    add(
        "--tome",
        nargs="*",
        default=["published"],
        choices=["published", "fused"],
        help="token merging at the same "
        "FLOPs, its attention a map in plain torch as published or torch's fused one; nothing: without",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=140.0, help="time for everything but loading, if 3 rounds fit in it")
    add("--rounds", type=int, help=f"exactly so many rounds, however long they take (otherwise 3 to {MOST_ROUNDS})")
    add("--output", type=Path, default=Path("results/speed"), help="folder for speed.json, speed.md and speed.png")
    add("--seed", type=int, default=0)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `speed.json` holds."""
    options = parser().parse_args(arguments)
    check(options)
    torch.manual_seed(options.seed)
    about = machine(torch.device(options.device))
    with tqdm(total=0, unit="call", dynamic_ncols=True, file=sys.stderr) as bar:
        found = run(options, bar)
        bar.set_description_str("done")
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about,
        "versions": versions(),
        "model": found.model,
        "notes": [*found.notes, *busy(about)],
        "settings": {**vars(options), "output": str(options.output)},
        "flop_limit": found.limits,
        "results": summarise(found.measured, found.flops),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    text = document(report)
    (options.output / "speed.json").write_text(json.dumps(report, indent=1))
    (options.output / "speed.md").write_text(text)
    draw(report, options.output / "speed.png")
    sys.stdout.write(f"\n{text}\nWritten: speed.json, speed.md and speed.png in {options.output}\n")
    return report


def check(options: argparse.Namespace) -> None:
    """Refuse what would only fail, or mislead, after minutes."""
    if "pair" in options.view and options.work != ["forward"]:
        sys.exit("--view pair measures forward passes only: drop --pass, or use --view tower")
    if any(not 0 < rate < 1 for rate in options.keep_rate):
        sys.exit(f"--keep-rate takes shares between 0 and 1 (unpatched is always measured), got {options.keep_rate}")
    if any(batch < 1 for batch in options.batch) or (options.rounds is not None and options.rounds < 1):
        sys.exit("--batch and --rounds take whole numbers from 1")
    options.keep_rate = sorted(set(options.keep_rate))


def busy(about: dict[str, Any]) -> list[str]:
    """A warning, where other processes took so much of the machine that times scatter."""
    load, cores = about["load_before"], about["cores"]
    if load is None or about["device"] != "cpu" or load < 0.3 * cores:
        return []
    return [f"other processes were running (load {load:.1f} on {cores} cores before this one): times scatter"]


if __name__ == "__main__":
    main()
