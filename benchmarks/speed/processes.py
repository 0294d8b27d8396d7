"""`score_pairs` over several processes of one machine, one thread each: `python -m benchmarks.speed.processes`.

Wall clock, since what is asked is how long one waits; and how far the scores are from those of one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import patchselect
from benchmarks.common.command import add_layers, add_model, add_output, parse, report_on, write
from benchmarks.common.show import aligned, quartiles, spread
from benchmarks.models.loading import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser, "ViT-B-16")
    add("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="COUNT", help="the first is compared with")
    add("--images", type=int, default=8)
    add("--texts", type=int, default=4)
    add("--keep-rate", type=float, default=0.5)
    add_layers(parser)
    add("--rounds", type=int, default=3)
    add_output(parser, "results/processes.json", "JSON file; the table goes beside it")


def one_process(rank: int, world: int, options: argparse.Namespace, folder: str) -> None:
    """Score all pairs with the other processes; rank 0 writes scores and seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    torch.manual_seed(0)
    host = load(options.model, pretrained=options.pretrained)
    handle = patchselect.apply(host.model.eval(), options.keep_rate, options.layers)
    size, width = host.image_size, handle.towers[0].text_width()
    images, texts = torch.randn(options.images, 3, size, size), torch.randn(options.texts, width)
    seconds = []
    for _ in range(1 + options.rounds):  # the first one warms up
        dist.barrier()
        start = time.perf_counter()
        scores = patchselect.score_pairs(host.model, images, texts, progress=False)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        torch.save((scores, seconds[1:]), f"{folder}/{world}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo can wait for ever for peers that have left, if the group is taken down


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["processes", "seconds [quartiles]", "times as fast", "scores apart by"]]
    for r in records:
        rows.append([str(r["processes"]), quartiles(r["seconds"], 2), f"{r['speed_up']:.2f}", f"{r['apart']:.0e}"])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.processes", __doc__, add_arguments, arguments)
    report, records, first = report_on(options), [], None
    with tempfile.TemporaryDirectory() as folder:
        for world in tqdm(options.processes, unit="group", file=sys.stderr):
            torch.multiprocessing.spawn(one_process, (world, options, folder), nprocs=world)
            scores, seconds = torch.load(Path(folder) / f"{world}.pt")
            first = first or (scores, spread(seconds)["median"])
            speed_up = first[1] / spread(seconds)["median"]
            apart = float((scores - first[0]).abs().max())
            records.append({"processes": world, "seconds": spread(seconds), "speed_up": speed_up, "apart": apart})
    report["results"] = records
    about = f"{options.model}, {options.images} images with {options.texts} texts, keep rate {options.keep_rate}"
    cores = report["machine"]["cores"]
    write(options.output, report, f"{about}, one thread a process, {cores} cores\n\n{table(records)}")
    return report


if __name__ == "__main__":
    main()
