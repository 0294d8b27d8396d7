"""What is counted and needs no clock: `python -m benchmarks.speed.arithmetic`.

Shares of the FLOPs of an unpatched CLIP tower at 224 px, relevance and merging included: merging before one selection
beside two selections, one selection for many classes, and the floor that no keep rate passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import patchselect
from benchmarks.common.command import add_output, parse, report_on, write
from benchmarks.common.cost import count_flops
from benchmarks.common.show import aligned

TOKENS = ((134, 0.5, 0.7), (98, 0.5, 0.5), (67, 0.5, 0.3))
"""Patches kept after merging, the share that merges, and the rate at which two selections cost as much."""
TEXTS, BATCHES = 1000, (1, 8, 64)
NAMES = {16: "CLIP ViT-B/16", 32: "CLIP ViT-B/32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser, "results/arithmetic.json", "JSON file; the table goes beside it")


def clip(patch_size: int) -> nn.Module:
    """Build CLIP's ViT-B at 224 px, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=patch_size,
        image_size=224, projection_dim=512,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def spent(model: nn.Module, batch: int = 1, texts: int = 1) -> float:
    """Count the FLOPs of one image of a batch, one selection an image for all texts."""
    size = model.config.image_size

    def call() -> None:
        with torch.no_grad(), patchselect.guide(model, torch.zeros(texts, model.config.projection_dim), "shared"):
            model(torch.zeros(batch, 3, size, size))

    return count_flops(call) / batch


def merging(model: nn.Module, whole: float) -> list[dict[str, Any]]:
    """Compare merging before one selection with two selections."""
    patches, found = (model.config.image_size // model.config.patch_size) ** 2, []
    for kept, merge, rate in TOKENS:
        patchselect.apply(model, kept / patches, merge=merge)
        share = spent(model) / whole
        patchselect.apply(model, rate)
        found.append({"tokens": kept + 1, "share": share, "two_layers": spent(model) / whole, "keep_rate": rate})
        patchselect.remove(model)
    return found


def classes(model: nn.Module, whole: float) -> dict[str, Any]:
    """Count one selection for one text, and for a thousand, at several batches."""
    patchselect.apply(model, 0.5)
    found = {"one": spent(model) / whole, "many": [spent(model, batch, TEXTS) / whole for batch in BATCHES]}
    patchselect.remove(model)
    return found


def floor(model: nn.Module) -> float:
    """Return the share of the cost that is left where next to nothing is kept, as the refusal names it."""
    try:
        patchselect.keep_rate_for_budget(model, 0.01)
    except ValueError as error:
        return float(str(error).split("[")[1].split(",")[0])
    raise AssertionError("a hundredth of the cost cannot be reached")


def main(
    arguments: Sequence[str] | None = None, build: Callable[[int], nn.Module] = clip, sizes: Sequence[int] = (16, 32)
) -> dict[str, Any]:
    """Count everything; returns what the JSON file holds."""
    options = parse("benchmarks.speed.arithmetic", __doc__, add_arguments, arguments)
    report, results, rows = report_on(options), [], [["model", "question", "shares"]]
    for patch_size in sizes:
        model = build(patch_size)
        patchselect.apply(model, 1.0, guidance="image")
        whole = count_flops(lambda model=model: model(torch.zeros(1, 3, *[model.config.image_size] * 2)))
        patchselect.remove(model)
        found: dict[str, Any] = {"model": NAMES[patch_size], "classes": classes(model, whole), "floor": floor(model)}
        if patch_size == 16:
            found["merging"] = merging(model, whole)
        results.append(found)
        rows += [[found["model"], name, str(value)] for name, value in found.items() if name != "model"]
    report["results"] = results
    write(options.output, report, aligned(rows))
    return report


if __name__ == "__main__":
    main()
