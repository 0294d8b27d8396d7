"""A short alignment: contrastive fine-tuning under selection, for your own image-caption pairs.

    python -m benchmarks.accuracy align --model ViT-B-16 --pretrained openai --data pairs.tsv
    torchrun --nproc-per-node 8 -m benchmarks.accuracy.align --model … --data pairs.tsv

`accelerate launch -m benchmarks.accuracy.align …` sets the same variables as torchrun. Without `--data` the pairs are
emoji scenes and the model is the small CLIP of this benchmark (`--model small-clip-0` or `small-clip-1`); `--study`
compares the arms on it. What comes out is `OUTPUT/model`, a folder that `--model` of every benchmark takes;
`OUTPUT/model.pt` of the small CLIP.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.common import command
from benchmarks.models.loading import load

from .clip.align_study import study
from .clip.host import scene_pairs, small_host
from .clip.model import LAYERS
from .yours.alignment import Plan, align
from .yours.pairs import table_pairs

SMALL = "small-clip-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    command.add_model(parser, f"{SMALL}0")
    add("--random-weights", action="store_true", help="a dry run: go on where weights or tokenizer are missing")
    add("--data", type=Path, help="lines of PATH<TAB>CAPTION; default: emoji scenes, for the small CLIP")
    add("--images", type=Path, help="folder that the paths start from; default: that of --data")
    add("--relevance", help="default: the adapter's")
    add("--keep-rate", type=float, nargs="+", default=list(Plan.keep_rates), help="one is drawn for each step")
    command.add_layers(parser)
    add("--pairing", choices=("shared", "paired"), default=Plan.pairing)
    add("--selection-alignment", type=float, default=0.0, help="weight of selection_alignment_loss; needs paired")
    add("--steps", type=int, default=Plan.steps)
    add("--batch", type=int, default=Plan.batch, help="pairs per process")
    add("--rate", type=float, help=f"highest learning rate; default: {Plan.rate} for the small CLIP, 1e-5 for others")
    add("--seed", type=int, default=0)
    add("--precision", choices=("fp32", "amp"), default="fp32", help="amp: bf16 autocast")
    command.add_device(parser)
    add("--workers", type=int, default=0, help="processes that load data")
    add("--save-every", type=int, default=100, help="steps")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="of the small CLIP")
    add("--study", action="store_true", help="compare the arms on both small CLIPs")
    add("--count", type=int, default=512, help="questions of the study")
    command.add_output(parser, "results/align", "folder; a run there that was interrupted goes on")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Align one model, on as many processes as it was launched with; or compare the arms."""
    torch.set_num_threads(options.threads)
    if options.study:
        return study(options)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched:
        dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
    if options.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        return _run(options)
    finally:
        if launched:
            dist.destroy_process_group()


def _run(options: argparse.Namespace) -> dict[str, Any]:
    small = options.model.startswith(SMALL)
    if small != (options.data is None):
        raise ValueError(
            f"emoji scenes are for {SMALL}0 and {SMALL}1, --data is for other models: give both or neither"
        )
    if small:
        host, layers = small_host(int(options.model[len(SMALL) :]), options.checkpoints), LAYERS
        pairs = scene_pairs(6000, options.seed)
    else:
        host, layers = load(options.model, None, options.pretrained), None
        if not options.random_weights:
            host.check_accuracy()
        pairs = table_pairs(options.data, options.images, host)
    host.model.to(options.device)
    plan = Plan(
        options.relevance, tuple(options.keep_rate), tuple(options.layers) if options.layers else layers,
        options.pairing, options.selection_alignment, options.steps, options.batch,
        options.rate or (Plan.rate if small else 1e-5), options.seed, options.precision,
    )  # fmt: skip
    first = int(os.environ.get("RANK", "0")) == 0
    for note in host.notes if first else ():
        sys.stdout.write(f"Note: {note}.\n")
    losses = align(host, pairs, plan, options.output, options.save_every, options.workers)
    report: dict[str, Any] = {"model": host.name, "weights": host.weights, "notes": host.notes, "plan": vars(plan)}
    report.update({"pairs": len(pairs), "losses": losses})
    if first:
        saved = options.output / ("model.pt" if small else "model")
        if small:
            torch.save(host.model.state_dict(), saved)
        else:
            host.save(saved)
        (options.output / "align.json").write_text(json.dumps(report, indent=1) + "\n")
        shown = f"loss {np.mean(losses[-20:]):.3f} at the end; " if losses else "nothing was left to do; "
        sys.stdout.write(f"{shown}weights in {saved}{'' if small else f', for --model {saved}'}\n")
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy align", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main(parse())
