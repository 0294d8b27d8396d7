"""Every image with every text: on one prefix, from a kept prefix, pair by pair. `python -m benchmarks.speed.pairs`.

FLOPs and time against as many guided passes, in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import timed, turns
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
from benchmarks.common.cost import count_flops
from benchmarks.common.show import aligned, quartiles, ratio, spread
from benchmarks.models.host import Host
from benchmarks.models.loading import load

from . import steady

PAIRED, ALL, PREFIX, SHARED = (
    "guided pass per pair",
    "every text on one prefix (all)",
    "the same from a kept prefix",
    "one pass for all texts (shared)",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser, "openai/clip-vit-base-patch16")
    add("--texts", type=int, nargs="+", default=[1, 4, 16], help="texts per image")
    add("--images", type=int, default=1, help="images in a batch")
    add("--keep-rate", type=float, default=0.5)
    add_layers(parser)
    add("--rounds", type=int, default=12, help="at most: until all have settled")
    add_device(parser)
    add_clock(parser)
    add_output(parser, "results/pairs")


def calls(host: Host, images: Tensor, texts: Tensor) -> dict[str, Callable[[], Any]]:
    """Return what is compared; every call encodes all images for all texts."""
    model = host.model
    prefix = patchselect.encode_prefix(model, images)
    repeated, tiled = images.repeat_interleave(len(texts), dim=0), texts.repeat(len(images), 1)

    def guided(pixels: Tensor, text: Tensor, pairing: str, **options: Any) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad(), patchselect.guide(model, text, pairing, **options):
                host.encode_image(pixels)

        return call

    return {
        PAIRED: guided(repeated, tiled, "paired"),
        ALL: guided(images, texts, "all"),
        PREFIX: guided(prefix.images, texts, "all", prefix=prefix),
        SHARED: guided(images, texts, "shared"),
    }


def flops_of(host: Host, images: Tensor, texts: Tensor) -> dict[str, float]:
    """Count GFLOPs of each call on tensors that hold nothing; the prefix is what `all` costs without its suffix."""

    def counted(rows: int, text: int, pairing: str) -> float:
        def call() -> None:
            pixels, features = torch.zeros(rows, *images.shape[1:]), torch.zeros(text, texts.shape[1])
            with torch.no_grad(), patchselect.guide(host.model, features, pairing):
                host.encode_image(pixels)

        return count_flops(call) / 1e9

    size, many = len(images), len(texts)
    whole = counted(size, many, "all")
    prefix = count_flops(
        lambda: patchselect.pairs.prefix.take_prefix(
            patchselect.handle_of(host.model).wiring, torch.zeros(images.shape), {}, images.shape[1:]
        )
    )
    return {
        PAIRED: counted(size * many, size * many, "paired"),
        ALL: whole,
        PREFIX: whole - prefix / 1e9,
        SHARED: counted(size, many, "shared"),
    }


def compare(host: Host, options: argparse.Namespace, count: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Return one record per way of encoding `count` texts per image."""
    device = torch.device(options.device)
    size, generator = host.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(options.images, 3, size, size, generator=generator).to(device)
    width = patchselect.handle_of(host.model).towers[0]
    texts = torch.randn(count, width.adapter.text_width(width), generator=generator).to(device)
    found, flops = calls(host, images, texts), flops_of(host, images, texts)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn, order in enumerate(turns(list(found), options.rounds + 1)):
        if steady.known(seconds[PAIRED], seconds.values()):
            break
        for name in order:
            bar.set_description_str(f"{count} texts | {name}")
            taken = timed(found[name], device, options.clock)
            bar.update()
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    return [
        {
            "texts": count,
            "way": name,
            "gflops": flops[name],
            "flop_ratio": flops[name] / flops[PAIRED],
            "seconds": spread(seconds[name]),
            "time_ratio": steady.compared(seconds[name], seconds[PAIRED]),
        }
        for name in found
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["texts", "encoded by", "GFLOPs", "of the FLOPs", "seconds [quartiles]", "of the time [quartiles]"]]
    for r in records:
        flops = [f"{r['gflops']:.1f}", f"{r['flop_ratio']:.3f}"]
        rows.append([str(r["texts"]), r["way"], *flops, quartiles(r["seconds"], 3), ratio(r["time_ratio"], 3)])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.pairs", __doc__, add_arguments, arguments)
    settle_clock(options, options.device)
    host = load(options.model, pretrained=options.pretrained)
    host.model.eval().to(options.device)
    report = report_on(options, options.device)
    patchselect.apply(host.model, options.keep_rate, options.layers)
    with tqdm(total=len(options.texts) * 4 * (options.rounds + 1), file=sys.stderr) as bar:
        records = [record for count in options.texts for record in compare(host, options, count, bar)]
    report.update(model={"name": host.name, "weights": host.weights}, results=records)
    about = f"{host.name}, {host.weights}; {options.images} image(s) a batch, keep rate {options.keep_rate}"
    write(options.output / "pairs.json", report, f"{about}\n\n{table(records)}")
    return report


if __name__ == "__main__":
    main()
