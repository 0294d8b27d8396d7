"""Speed-up against keep rate, under the limit that FLOPs set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.common.show import canvas, threads

from .cases import SELECTING
from .report import VIEW, WORK

STYLES = {
    "text": ("tab:red", "o-", "guided by text"),
    "again": ("tab:orange", "o:", "guided by text again"),
    "image": ("tab:blue", "s-", "guided by the image"),
    "random": ("tab:gray", "^-", "at random"),
    "merged": ("tab:purple", "P-", "merged, then one selection, same FLOPs"),
    "tome": ("tab:green", "D", "ToMe as published, same FLOPs"),
    "fused tome": ("tab:olive", "v", "ToMe with fused attention, same FLOPs"),
    "tome front": ("tab:cyan", "X", "ToMe-front with fused attention, same FLOPs"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw one panel per setting; medians with quartiles."""
    figure_of(report).savefig(path, dpi=150)


def figure_of(report: dict[str, Any]) -> Any:
    """Return the figure that `draw` saves."""
    keys = ("image_size", "batch", "precision", "work", "view")
    groups = [(k, list(g)) for k, g in groupby(report["results"], key=lambda r: tuple(r[key] for key in keys))]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = canvas(max(6.5, 4.6 * columns), 4.0 * rows + 0.9, rows, columns)
    for axis, (values, records) in zip(axes, groups):
        size, batch, precision, work, view = values
        _panel(axis, records, report["flop_limit"][f"{size}/{view}"])
        axis.set_title(f"{size} px, batch {batch}, {precision}\n{WORK[work]}, {VIEW[view]}", fontsize=10)
    for axis in axes[len(groups) :]:
        axis.remove()
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    model, machine = report["model"], report["machine"]
    figure.suptitle(f"{model['name']}: {machine['processor']}, {threads(machine['threads'])}", fontsize=10)
    return figure


def _panel(axis: Any, records: Sequence[dict[str, Any]], limit: Sequence[dict[str, float]]) -> None:
    axis.plot(
        [point["keep_rate"] for point in limit],
        [point["flop_ratio"] for point in limit],
        "k--",
        linewidth=1,
        label="FLOP limit",
    )
    methods = [m for m in STYLES if any(r["method"] == m for r in records)]
    for position, method in enumerate(methods):
        colour, line, label = STYLES[method]
        shown = sorted((r for r in records if r["method"] == method), key=lambda r: r["keep_rate"])
        _, *asked = shown[0]["label"].split(", ", 1)  # the relevance and the fusion, where they were chosen
        label += "".join(f" ({names})" for names in asked) if method in SELECTING else ""
        for sure, strength in ((True, 1.0), (False, 0.3)):
            these = [r for r in shown if r["settled"] == sure]
            # Beside each other, so that error bars can be told apart.
            places = [r["keep_rate"] + 0.006 * (position - (len(methods) - 1) / 2) for r in these]
            medians = [r["speed_up"]["median"] for r in these]
            lower = [r["speed_up"]["median"] - r["speed_up"]["q1"] for r in these]
            upper = [r["speed_up"]["q3"] - r["speed_up"]["median"] for r in these]
            name = label if sure else f"{label}, not settled"
            if these:
                style = dict(color=colour, alpha=strength, capsize=2, markersize=4)
                axis.errorbar(places, medians, (lower, upper), fmt=line, label=name, **style)
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.set_xlabel("keep rate of each selection layer")
    axis.set_ylabel("speed-up over unpatched")
    axis.grid(alpha=0.25)
