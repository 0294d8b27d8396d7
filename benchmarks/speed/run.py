"""The whole benchmark: load, count, measure, setting by setting, within a time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.photographs import Photo, batch_of, load_photos
from benchmarks.models.host import Host, first_line
from benchmarks.models.loading import load
from patchselect.wiring.plan import check_layers
from patchselect.wiring.towers import find_towers

from .cases import MERGED, TOME, Case, Inputs, Selection, Setting, dtype_of
from .counting import FlopBook
from .measure import How, Measured, measure
from .steady import FEWEST_ROUNDS

KINDS = {"tome": "published", "fused tome": "fused", "tome front": "front"}
"""Cases of ToMe, as `--tome` names them."""


@dataclass
class Found:
    """What a run learned."""

    model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    flops: dict[tuple[int, str, Case], float] = field(default_factory=dict)
    """Forward FLOPs per image, by image size, view and case."""
    limits: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """FLOP ratio of text guidance against keep rate, by `size/view`."""


def run(options: argparse.Namespace, bar: tqdm[Any]) -> Found:
    """Measure what the options of `benchmarks.speed` ask for."""
    photos, found, end = load_photos(), Found(), time.monotonic() + options.seconds
    selection = selection_of(options)
    sizes = options.image_size or [None]
    combinations = list(product(options.batch, options.precision, options.work, options.view))
    how = how_of(options)
    pace = 0.0  # seconds of a round by `weight`, the most of what was measured so far
    for size in sizes:
        bar.set_description_str(f"loading {options.model}")
        host = load(options.model, size, options.pretrained)
        host.model.to(options.device)
        describe(host, options, found)
        bar.set_description_str("counting FLOPs")
        book = FlopBook(host, selection, inputs_of(host, photos, 1))
        cases = {view: cases_of(options, book, view, found.notes) for view in options.view}
        for view in options.view:
            found.limits[f"{host.image_size}/{view}"] = book.limit(options.keep_rate, view)
            found.flops.update({(host.image_size, view, case): book.of(case, view) for case in cases[view]})
        measured = {}
        # The short ones first, each until it has settled: what can be known in the time shall be.
        for mine in sorted(combinations, key=lambda combination: weight(*combination)):
            batch, precision, work, view = mine
            needed = FEWEST_ROUNDS * pace * weight(*mine)
            if pace and options.rounds is None and time.monotonic() + needed > end:
                found.notes.append(
                    f"batch {batch}, {precision}, {work}, {view} was left out: the {FEWEST_ROUNDS} rounds that it "
                    f"takes at least to settle would take about {needed:.0f} s here: give more --seconds"
                )
                continue
            host.model.to(dtype=dtype_of(precision))
            start = time.monotonic()
            measured[mine] = measure(
                host,
                Setting(host.image_size, *mine),
                [case for case in cases[view] if suits(case, work)],
                inputs_of(host, photos, batch),
                selection,
                how,
                end,
                bar,
            )
            rounds = 1 + len(measured[mine][0].seconds)
            pace = max(pace, (time.monotonic() - start) / rounds / weight(*mine))
        found.measured += [entry for combination in combinations for entry in measured.get(combination, ())]
    return found


def how_of(options: argparse.Namespace) -> How:
    """Return how calls are timed."""
    return How(options.clock, options.rounds, options.memory, options.compile, options.cuda_graphs, options.seed)


def selection_of(options: argparse.Namespace) -> Selection:
    """Return what all selecting cases share."""
    return Selection(options.layers, options.relevance, options.fusion, options.merge)


def weight(batch: int, precision: str, work: str, view: str) -> float:
    """Return about how long a round takes, beside those of other settings."""
    return float(batch**0.9 * (1 if work == "forward" else 3))


def describe(host: Host, options: argparse.Namespace, found: Found) -> None:
    """Write what the report says about the model."""
    (tower,) = find_towers(host.model)
    found.model = {
        "name": host.name,
        "library": host.library,
        "weights": host.weights,
        "random_weights": host.random_weights,
        "depth": len(tower.blocks),
        "width": tower.width,
        "layers": list(check_layers(options.layers, len(tower.blocks))),
    }
    found.notes += [note for note in host.notes if note not in found.notes]


def cases_of(options: argparse.Namespace, book: FlopBook, view: str, notes: list[str]) -> list[Case]:
    """List unpatched first, each guidance at each rate, then merging, with and without one selection, at their cost.

    What a model does not take is left out, and `notes` say so.
    """
    cases = [Case("unpatched"), *(Case(g, rate) for g in options.guidance for rate in options.keep_rate)]
    kinds: dict[str, Callable[[Case], Case]] = {}
    if options.merge:
        kinds[MERGED] = lambda text: Case(MERGED, text.keep_rate, own_rate=book.merged_rate(text))
    for name, kind in KINDS.items():
        if kind in options.tome:
            kinds[name] = lambda text, name=name: Case(name, text.keep_rate, book.tome_removals(text, name))
    if view == "tower":
        for name, made in kinds.items():
            try:
                cases += [made(Case("text", rate)) for rate in options.merge_at or options.keep_rate]
            except (TypeError, ValueError) as error:
                notes.append(f"{TOME.get(name, 'merging before one selection')} is left out: {first_line(error)}")
        if options.text_encoder:
            cases.append(Case("text encoder"))
    return cases


def suits(case: Case, work: str) -> bool:
    """Tell whether a case is measured in this pass. Recomputation breaks ToMe, which hands sizes on by block."""
    if case.method == "text encoder":
        return work == "forward"
    return case.method not in TOME or work != "checkpointed"


def inputs_of(host: Host, photos: Sequence[Photo], batch: int) -> Inputs:
    """Return photographs and captions as the model wants them, the captions already encoded."""
    pictures, captions = zip(*batch_of(photos, batch))
    tokens = host.tokens(list(captions))
    with torch.no_grad():
        text = host.encode_text(tokens)
    return Inputs(host.images(pictures), tokens, text)
