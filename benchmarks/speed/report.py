"""From measurements to figures, a table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from typing import Any

from benchmarks.common.show import aligned, quartiles, spread, threads, unsettled

from .cases import MERGED, SELECTING, TOME, Case, Selection
from .measure import Measured, settled, speed_ups
from .steady import FEWEST_ROUNDS, SETTLED, farthest

COLUMNS = (
    "method", "keep", "images/s", "speed-up", "GFLOPs each", "FLOP ratio", "efficiency", "peak MB", "selecting",
)  # fmt: skip

LEGEND = """\
Unpatched, guided by text (TRIPS), by the image's [CLS] (EViT) and at random ran in turns, forward passes block by
block, in a new order each round.
images/s: median [quartiles] over the rounds. speed-up: unpatched time over own time, each the sum over the blocks of
the mean of the faster half of what a block took in half of the rounds; median [quartiles] over the ways to halve them.
Rounds go on until, after {fewest} or more, no half is further than {settled:.1%} from the median, or the time is up:
"not settled" are those of which one is, by ± so much. Times are {clock}.
FLOP ratio: unpatched FLOPs over FLOPs of the forward pass, the selection's own counted in: the limit of the speed-up.
efficiency: speed-up over FLOP ratio. selecting: share of the time spent on merging, relevance, selection and fusion.
ToMe (token merging) removes as many patches, evenly over all blocks, as make its FLOPs those of the text-guided case;
ToMe-front does so in the first third of the blocks. "merge": similar patches merge, then the text selects once, at the
keep rate with the same FLOPs.
peak MB: highest memory on top of weights and inputs ({memory})."""

TOWER = "The text features are ready before the clock starts; encoding them once per caption is the row 'text encoder'."
TRAIN = (
    "A contrastive loss against fixed text features: forward, backward and dropping the gradients. The peak holds the "
    "gradients of the weights too, which do not shrink with the tokens: larger batches show what selection saves."
)
PAIR = "Each call is the whole model on images and texts: the text encoder is inside, its output guides the image side."


def summarise(
    measured: Sequence[Measured], flops: dict[tuple[int, str, Case], float], selection: Selection
) -> list[dict[str, Any]]:
    """Return one record per setting and case: every figure that the table shows, and the times behind it.

    Args:
        measured: what `measure` returned, the unpatched case first in each setting.
        flops: forward FLOPs per image, by image size, view and case.
        selection: names the relevance and the fusion, where they are not the defaults.
    """
    records = []
    for _, group in groupby(measured, key=lambda entry: entry.setting):
        entries = list(group)
        base = entries[0]
        tome = {(entry.case.method, entry.case.keep_rate): entry for entry in entries if entry.case.method in TOME}
        for entry in entries:
            setting, case = entry.setting, entry.case
            cost = flops[setting.image_size, setting.view, case]
            record = {
                **vars(setting),
                "method": case.method,
                "label": selection.label(case.method),
                "keep_rate": case.keep_rate,
                "rounds": len(entry.seconds),
                "seconds": entry.seconds,
                "parts": entry.parts,
                "images_per_second": spread([setting.batch / s for s in entry.seconds]),
                "gflops_per_image": cost / 1e9,
                "peak_memory_bytes": entry.peak_memory,
                "selecting_share": None,
                "tome_removed_patches": case.removed or None,
                "own_keep_rate": case.own_rate if case.method == MERGED else None,
            }
            if case.method != "text encoder":
                found = speed_ups(base, entry)
                record["speed_up"], record["farthest_half"] = spread(found), farthest(found)
                record["settled"] = settled(base, entry)
                record["flop_ratio"] = flops[setting.image_size, setting.view, base.case] / cost
                record["efficiency"] = record["speed_up"]["median"] / record["flop_ratio"]
            if case.method in SELECTING and entry.selecting and setting.work == "forward":
                record["selecting_share"] = spread([p / s for p, s in zip(entry.selecting, entry.seconds)])
            if case.method in ("text", MERGED) and tome:
                rivals = {name: tome[name, case.keep_rate] for name in TOME if (name, case.keep_rate) in tome}
                record["against_tome"] = {name: spread(speed_ups(rival, entry)) for name, rival in rivals.items()}
            records.append(record)
    return records


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    def shown(key: str, digits: int, unit: str = "", scale: float = 1.0) -> str:
        value = record.get(key)
        if value is None:
            return "–"
        if not isinstance(value, dict):
            return f"{value * scale:.{digits}f}{unit}"
        return quartiles(value, digits, unit, scale)

    method = record["method"]
    plain = method in ("unpatched", "text encoder")
    share = record["selecting_share"]
    return (
        record["label"],
        "–" if plain else f"{record['keep_rate']:g}",
        shown("images_per_second", 2),
        "1" if method == "unpatched" else shown("speed_up", 3) if record.get("settled", True) else unsettled(record),
        f"{record['gflops_per_image']:.4g}",
        "1" if method == "unpatched" else shown("flop_ratio", 3),
        "–" if plain else shown("efficiency", 3),
        "–" if record["peak_memory_bytes"] is None else f"{record['peak_memory_bytes'] / 1e6:.4g}",
        "–" if share is None else f"{100 * share['median']:.2f} %",
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Write one row per case."""
    return aligned([COLUMNS, *map(_cells, records)])


def timing(report: dict[str, Any]) -> str:
    """Say what the times are, and what was done to the calls."""
    settings, machine = report["settings"], report["machine"]
    cpu = f"CPU seconds of {threads(machine['threads'])}, which other work hardly changes"
    clock = cpu if settings["clock"] == "cpu" else "wall clock"
    done = [name for name, flag in (("compiled", "compile"), ("CUDA graphs", "cuda_graphs")) if settings[flag]]
    return "; ".join([clock, *(f"all cases, the unpatched one too, are {name}" for name in done)])


def document(report: dict[str, Any]) -> str:
    """Write the whole report in words and tables (Markdown)."""
    model, machine = report["model"], report["machine"]
    memory = "CUDA allocator" if machine["device"] == "cuda" else "torch's CPU allocations"
    parts = [
        f"# Speed of {model['name']} with patch selection",
        f"{model['library']}; selection in blocks {model['layers']} (0-based) of {model['depth']}; {model['weights']}.",
        f"{machine['processor']}, {threads(machine['threads'])}, torch {report['versions']['torch']}.",
        *(f"Note: {note}." for note in report["notes"]),
        LEGEND.format(memory=memory, settled=SETTLED, fewest=FEWEST_ROUNDS, clock=timing(report)),
    ]
    keys = ("image_size", "batch", "precision", "work", "view")
    for values, group in groupby(report["results"], key=lambda record: tuple(record[key] for key in keys)):
        size, batch, precision, work, view = values
        records = list(group)
        title = f"## {size} px, batch {batch}, {precision}, {WORK[work]}, {VIEW[view]}, {records[0]['rounds']} rounds"
        parts += [title, TRAIN if work != "forward" else PAIR if view == "pair" else TOWER, table(records)]
        for method, (name, label) in product(("text", MERGED), TOME.items()):
            rivals = [r for r in records if r["method"] == method and name in r.get("against_tome", {})]
            ahead = [f"{quartiles(r['against_tome'][name], 2)} at keep {r['keep_rate']:g}" for r in rivals]
            if ahead:
                ours = rivals[0]["label"]
                parts.append(f"Throughput of {ours} over {label} at the same FLOPs: {', '.join(ahead)}.")
    return "\n\n".join(parts) + "\n"


WORK = {
    "forward": "forward",
    "train": "forward and backward",
    "checkpointed": "forward and backward with gradient checkpointing",
}
VIEW = {"tower": "vision tower", "pair": "whole model"}
