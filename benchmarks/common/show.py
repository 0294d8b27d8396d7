"""Show figures: medians with quartiles, tables in Markdown, and axes to plot on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

APART = 0.05
"""How far quartiles of single rounds may lie from their median, where a command times whole calls so many times."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def apart(value: Mapping[str, float]) -> float:
    """Return how far the farther quartile of what `spread` returned lies from the median, as a share of it."""
    return max(value["q3"] - value["median"], value["median"] - value["q1"]) / value["median"]


def unsettled(record: Mapping[str, Any], digits: int = 2) -> str:
    """Write of a speed-up that it is none yet, and how far off its farthest half of the rounds is, or its quartiles."""
    if record.get("rounds") == 1:
        return "not settled: one round"
    middle = f"not settled: {record['speed_up']['median']:.{digits}f}"
    if "farthest_half" in record:
        return f"{middle} ±{record['farthest_half']:.0%} in {record['rounds']} rounds"
    return f"{middle} ±{apart(record['speed_up']):.0%}"


def quartiles(value: Mapping[str, float], digits: int, unit: str = "", scale: float = 1.0) -> str:
    """Write `median [first quartile, third quartile]` of what `spread` returned."""
    middle, low, high = (f"{value[name] * scale:.{digits}f}" for name in ("median", "q1", "q3"))
    return f"{middle}{unit} [{low}, {high}]"


def speed_up(record: Mapping[str, Any], digits: int = 2, digits_unsettled: int = 2) -> str:
    """Write the speed-up of a record with its quartiles, or that it has not settled."""
    if record["settled"]:
        return quartiles(record["speed_up"], digits)
    return unsettled(record, digits_unsettled)


def ratio(value: Mapping[str, Any], digits: int = 2) -> str:
    """Write a ratio with its quartiles, or that it has not settled.

    What `speed.steady` has compared says so itself; older files hold quartiles of single rounds, see `APART`.
    """
    sure = value["settled"] if "settled" in value else apart(value) <= APART
    return quartiles(value, digits) if sure else unsettled({"speed_up": value, **value}, digits)


def threads(count: int) -> str:
    """Write how many threads."""
    return "one thread" if count == 1 else f"{count} threads"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Write a table whose columns are aligned, so that it also reads well in a terminal; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure of so many inches that needs no display, and its axes row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())
