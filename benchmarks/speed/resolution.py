"""Resolution at constant cost: which keep rate pays for larger images. `python -m benchmarks.resolution`.

The second claim of the TRIPS papers. For each image size, the keep rate at which the guided vision encoder costs what
the unpatched one costs at its own size, from token arithmetic, with counted FLOPs and measured time next to it.
"""

from __future__ import annotations

import argparse
import json
import random
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

SIZES = [224, 240, 256, 272, 288, 304, 320, 352, 384, 448, 512]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.resolution",
        description="Image sizes against the keep rate that keeps the cost of the unpatched encoder at its own size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--own-size", type=int, default=224, help="image size of the unpatched ViT-B/16: 224 (CLIP), 256, 384 (ALBEF)")
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="PIXELS")
    add("--layers", type=int, nargs="+", default=[4, 9], metavar="BLOCK")
    add("--relevance", choices=["keys", "values"], default="values", help="values: CLIP; keys: ALBEF and mPLUG")
    add("--budget", type=float, default=1.0)
    add("--batch", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--per-layer", action="store_true", help="one rate per layer, early layers keep more")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("results/resolution"))
    return options


def vit(size: int) -> nn.Module:
    """A ViT-B/16 of real size with random weights, as in CLIP and (up to its norms) in ALBEF."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
        image_size=size, projection_dim=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(config).eval()


def call_of(model: nn.Module, batch: int, size: int, guided: bool, device: torch.device | None) -> Callable[[], Any]:
    """One forward; without a device its inputs are made inside of it, as the FLOP counter wants."""
    home = device or torch.device("cpu")

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch, 3, size, size, device=home), torch.zeros(batch, 512, device=home)

    ready = None if device is None else (torch.randn_like(made()[0]), torch.randn_like(made()[1]))

    def call() -> None:
        images, text = ready or made()
        with torch.no_grad():
            if guided:
                with patchselect.guide(model, text):
                    model(images, interpolate_pos_encoding=True)
            else:
                model(images, interpolate_pos_encoding=True)

    return call


def rows(model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The sizes that the budget can pay for, with their rates and counted FLOPs; others with the reason why not."""
    own = count_flops(call_of(model, 1, options.own_size, False, None))
    records: list[dict[str, Any]] = []
    for size in options.sizes:
        patchselect.apply(model, 0.5, options.layers, relevance=options.relevance)
        try:
            rate = patchselect.keep_rate_for_budget(model, options.budget, image_size=size, per_layer=options.per_layer)
        except ValueError as error:
            records.append({"size": size, "refused": str(error)})
            continue
        patchselect.apply(model, rate, options.layers, relevance=options.relevance)
        guided = count_flops(call_of(model, 1, size, True, None))
        patchselect.remove(model)
        whole = count_flops(call_of(model, 1, size, False, None))
        records.append(
            {"size": size, "patches": (size // 16) ** 2, "rate": rate, "share": guided / own, "unpatched": whole / own}
        )
    patchselect.remove(model)
    return records


def time_rows(model: nn.Module, records: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each size and of the unpatched encoder at its own size, all in turns."""
    device = torch.device(options.device)
    measured = [record for record in records if "rate" in record]
    baseline: list[float] = []
    seconds: list[list[float]] = [[] for _ in measured]
    order, shuffle = list(range(-1, len(measured))), random.Random(0).shuffle
    for turn in tqdm(range(options.rounds + 1), file=sys.stderr, unit="round"):
        shuffle(order)
        for place in order:
            if place < 0:
                patchselect.remove(model)
                taken = timed(call_of(model, options.batch, options.own_size, False, device), device)
            else:
                record = measured[place]
                patchselect.apply(model, record["rate"], options.layers, relevance=options.relevance)
                taken = timed(call_of(model, options.batch, record["size"], True, device), device)
            if turn:
                (baseline if place < 0 else seconds[place]).append(taken)
    for record, found in zip(measured, seconds):
        record.update({**spread(found), "time_ratio": spread(found)["median"] / spread(baseline)["median"]})
    return spread(baseline)


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| image | patches | keep rate | FLOPs of the unpatched at its own size | without selection | time |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        if "refused" in r:
            reach = r["refused"].split("[")[1].split("]")[0]
            lines.append(f"| {r['size']} px | | – | can reach {reach} | | |")
            continue
        rate = r["rate"] if isinstance(r["rate"], tuple) else (r["rate"],)
        shown = ", ".join(f"{x:.3f}" for x in rate)
        lines.append(
            f"| {r['size']} px | {r['patches']} | {shown} | {r['share']:.3f} | {r['unpatched']:.2f} | "
            f"{r['time_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    about = machine(torch.device(options.device))
    model = vit(options.own_size).to(options.device)
    records = rows(model, options)
    baseline = time_rows(model, records, options)
    report = {
        "machine": about,
        "versions": versions(),
        "settings": {**vars(options), "output": str(options.output)},
        "unpatched_seconds": baseline,
        "results": records,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "resolution.json").write_text(json.dumps(report, indent=1))
    (options.output / "resolution.md").write_text(table(records) + "\n")
    sys.stdout.write(
        f"ViT-B/16, random weights, own size {options.own_size} px, layers {options.layers}\n{table(records)}\n"
    )
    return report


if __name__ == "__main__":
    main()
