"""Every image with every text: on one prefix, from a kept prefix, pair by pair. `python -m benchmarks.pairs`."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import patchselect

from .cost import count_flops
from .host import Host
from .measure import timed
from .models import load
from .report import machine, spread, versions

PAIRED, ALL, PREFIX, SHARED = (
    "guided pass per pair",
    "every text on one prefix (all)",
    "the same from a kept prefix",
    "one pass for all texts (shared)",
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.pairs",
        description="FLOPs and time of every image with every text, against as many guided passes, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--model", default="openai/clip-vit-base-patch16", help="open_clip or transformers name, or a local checkpoint")
    add("--pretrained", help="weights, as in benchmarks.speed")
    add("--texts", type=int, nargs="+", default=[1, 4, 16], help="texts per image")
    add("--images", type=int, default=1, help="images in a batch")
    add("--keep-rate", type=float, default=0.5)
    add("--layers", type=int, nargs="+", help="0-based selection blocks; default: 5th and 10th of 12")
    add("--rounds", type=int, default=5)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("results/pairs"))
    return options


def calls(host: Host, images: Tensor, texts: Tensor) -> dict[str, Callable[[], Any]]:
    """What is compared; every call encodes all images for all texts."""
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
    """GFLOPs of each call, counted on tensors that hold nothing; the prefix is what `all` costs without its suffix."""

    def counted(rows: int, text: int, pairing: str) -> float:
        def call() -> None:
            pixels, features = torch.zeros(rows, *images.shape[1:]), torch.zeros(text, texts.shape[1])
            with torch.no_grad(), patchselect.guide(host.model, features, pairing):
                host.encode_image(pixels)

        return count_flops(call) / 1e9

    size, many = len(images), len(texts)
    whole = counted(size, many, "all")
    prefix = count_flops(
        lambda: patchselect.pairs.prefix.take_prefix(patchselect.handle_of(host.model), torch.zeros(images.shape), {})
    )
    return {
        PAIRED: counted(size * many, size * many, "paired"),
        ALL: whole,
        PREFIX: whole - prefix / 1e9,
        SHARED: counted(size, many, "shared"),
    }


def compare(host: Host, options: argparse.Namespace, count: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """One record per way of encoding `count` texts per image."""
    device = torch.device(options.device)
    size, generator = host.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(options.images, 3, size, size, generator=generator).to(device)
    width = patchselect.handle_of(host.model).towers[0]
    texts = torch.randn(count, width.adapter.text_width(width), generator=generator).to(device)
    found, flops = calls(host, images, texts), flops_of(host, images, texts)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    shuffle = random.Random(0).shuffle
    for turn in range(options.rounds + 1):
        order = list(found)
        shuffle(order)
        for name in order:
            bar.set_description_str(f"{count} texts | {name}")
            taken = timed(found[name], device)
            bar.update()
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    return [
        {
            "texts": count,
            "way": name,
            "gflops": flops[name],
            "flop_ratio": flops[name] / flops[PAIRED],
            **spread(seconds[name]),
            "time_ratio": spread(seconds[name])["median"] / spread(seconds[PAIRED])["median"],
        }
        for name in found
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| texts | encoded by | GFLOPs | of the FLOPs | seconds (quartiles) | of the time |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        quartiles = f"{r['median']:.3f} ({r['q1']:.3f}–{r['q3']:.3f})"
        lines.append(
            f"| {r['texts']} | {r['way']} | {r['gflops']:.1f} | {r['flop_ratio']:.3f} | {quartiles} | "
            f"{r['time_ratio']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    host = load(options.model, pretrained=options.pretrained)
    host.model.eval().to(options.device)
    about = machine(torch.device(options.device))
    patchselect.apply(host.model, options.keep_rate, options.layers)
    with tqdm(total=len(options.texts) * 4 * (options.rounds + 1), file=sys.stderr) as bar:
        records = [record for count in options.texts for record in compare(host, options, count, bar)]
    report = {
        "machine": about,
        "versions": versions(),
        "model": {"name": host.name, "weights": host.weights},
        "settings": {**vars(options), "output": str(options.output)},
        "results": records,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pairs.json").write_text(json.dumps(report, indent=1))
    (options.output / "pairs.md").write_text(table(records) + "\n")
    sys.stdout.write(
        f"{host.name}, {host.weights}; {options.images} image(s) a batch, keep rate {options.keep_rate}\n"
        f"{table(records)}\n"
    )
    return report


if __name__ == "__main__":
    main()
