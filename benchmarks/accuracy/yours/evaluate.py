"""Every batch through every arm, in turns: accuracy on the same images, throughput under the same load."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import timed
from benchmarks.common.objects import name_of
from benchmarks.common.show import spread
from benchmarks.models.host import Host, first_line

from .outliers import Diagnosis, diagnose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arm:
    """One way to run the tower."""

    guidance: str
    """`none`, `text` (all classes share one selection per image), `image` or `random`."""
    relevance: Any = None
    """A name or an object; `None` is the adapter's choice."""
    keep_rate: float = 1.0

    def __str__(self) -> str:
        if self.guidance == "none":
            return "no selection"
        return f"text, {name_of(self.relevance)}" if self.guidance == "text" else self.guidance


@dataclass
class Seen:
    """What an arm did so far."""

    right: list[Tensor] = field(default_factory=list)
    """`(B,)` bool of each batch."""
    seconds: list[float] = field(default_factory=list)
    """Of each full batch."""
    diagnosis: Diagnosis = field(default_factory=Diagnosis)


def arms_of(options: argparse.Namespace, host: Host) -> tuple[list[Arm], list[str]]:
    """Return what this host can do of what was asked for, and why it cannot do the rest."""
    asked = [(g, r) for g in options.guidance for r in (options.relevance if g == "text" else [None])]
    arms, notes = [Arm("none")], []
    for guidance, relevance in asked:
        try:
            patchselect.apply(host.model, 0.5, options.layers, guidance, relevance).remove()
        except ValueError as error:
            notes.append(f"{Arm(guidance, relevance)} is left out: {first_line(error)}")
            continue
        arms += [Arm(guidance, relevance, rate) for rate in options.keep_rate]
    return arms, notes


@contextmanager
def selecting(host: Host, arm: Arm, layers: Sequence[int] | None, classes: Tensor) -> Iterator[Any]:
    """Let the model be as this arm wants it; yields the handle, or `None` without selection."""
    if arm.guidance == "none":
        yield None
        return
    handle = patchselect.apply(host.model, arm.keep_rate, layers, arm.guidance, arm.relevance)
    try:
        if arm.guidance == "text":
            with patchselect.guide(host.model, classes, "shared"):
                yield handle
        else:
            yield handle
    finally:
        handle.remove()


@torch.inference_mode()
def evaluate(
    host: Host, options: argparse.Namespace, data: Any, classes: Tensor, arms: Sequence[Arm]
) -> tuple[dict[Arm, Seen], int]:
    """Run every batch through all arms, in a new order each time; returns what came out and the number of images."""
    device, dtype = torch.device(options.device), DTYPES[options.precision]
    loader = torch.utils.data.DataLoader(data, options.batch, num_workers=options.workers)
    seen, shuffle = {arm: Seen() for arm in arms}, random.Random(options.seed).shuffle
    for number, (images, labels) in enumerate(tqdm(loader, "batches", file=sys.stderr)):
        pixels = images.to(device, dtype)
        order = list(arms)
        shuffle(order)
        for arm in order:
            torch.manual_seed(options.seed + number)
            features: list[Tensor] = []

            def call(pixels: Tensor = pixels, features: list[Tensor] = features) -> None:
                features.append(host.encode_image(pixels))

            with selecting(host, arm, options.layers, classes):
                taken = timed(call, device)
            # The first batch warms up, the last may be short.
            if len(images) == options.batch and (number or len(loader) == 1):
                seen[arm].seconds.append(taken)
            cosines = F.normalize(features[0].float(), dim=-1) @ classes.float().T
            seen[arm].right.append(cosines.argmax(-1).cpu() == labels)
        if number < options.diagnose:
            diagnose(host, pixels, {arm: one.diagnosis for arm, one in seen.items()}, options, classes, selecting)
    return seen, len(data)


def summarise(seen: dict[Arm, Seen]) -> list[dict[str, Any]]:
    """Return one record per arm: accuracy and throughput, both against no selection on the same images and batches."""
    base = seen[Arm("none")]
    base_right, records = torch.cat(base.right).double(), []
    for arm, one in seen.items():
        right = torch.cat(one.right).double()
        root = len(right) ** 0.5
        record: dict[str, Any] = {
            **vars(arm),
            "relevance": name_of(arm.relevance),
            "arm": str(arm),
            "images": len(right),
            "accuracy": float(right.mean()),
        }
        record["standard_error"] = float(right.std(unbiased=False) / root)
        gap = right - base_right
        record["against_none"] = (float(gap.mean()), float(gap.std(unbiased=False) / root))
        if one.seconds:
            record["speed_up"] = spread([b / s for b, s in zip(base.seconds, one.seconds)])
        record["outliers"] = one.diagnosis.report()
        records.append(record)
    return records
