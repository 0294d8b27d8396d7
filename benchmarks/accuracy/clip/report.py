"""The study of frozen CLIP as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.show import aligned, canvas


def _lookup(report: dict[str, Any]) -> tuple[list[str], list[float], dict[tuple[str, float], dict[str, Any]]]:
    records = report["results"]
    names = list(dict.fromkeys(record["arm"] for record in records))
    rates = sorted({record["keep_rate"] for record in records if record["keep_rate"] < 1}, reverse=True)
    found = {(record["arm"], record["keep_rate"]): record for record in records}
    # Without selection there is one figure, whatever the rate.
    found.update({(n, r): found[n, 1.0] for n in names for r in rates if (n, r) not in found})
    return names, rates, found


def accuracies(report: dict[str, Any]) -> str:
    """Accuracy ± standard error by arm and keep rate."""
    names, rates, found = _lookup(report)
    rows = [["relevance and guidance", *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = (found[name, rate] for rate in rates)
        rows.append([name, *(f"{cell['accuracy']:.3f} ± {cell['standard_error']:.3f}" for cell in cells)])
    return aligned(rows)


def differences(report: dict[str, Any]) -> str:
    """Accuracy minus that without selection on the same questions, ± its standard error."""
    names, rates, found = _lookup(report)
    rows = [["against no selection", *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = [found[name, rate].get("against_none") for rate in rates]
        if all(cells):
            rows.append([name, *(f"{gap:+.3f} ± {error:.3f}" for gap, error in cells)])  # type: ignore[misc]
    return aligned(rows)


def each_model(report: dict[str, Any]) -> str:
    """Accuracies of the models one by one, and the tokens spent over all blocks."""
    names, rates, found = _lookup(report)
    rows = [["by model (tokens over all blocks)", *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = (found[name, rate] for rate in rates)
        rows.append(
            [name, *(" / ".join(f"{one:.3f}" for one in cell["by_model"]) + f" ({cell['tokens']})" for cell in cells)]
        )
    return aligned(rows)


def verdict(bar: dict[str, Any]) -> str:
    """A difference, its standard error, and whether that is enough."""
    return f"{bar['gap']:+.3f} ± {bar['error']:.3f}: {'met' if bar['met'] else 'NOT met'}"


def document(report: dict[str, Any]) -> str:
    """All tables with what they were made on."""
    settings, about = report["settings"], report["machine"]
    parts = [
        "# Frozen CLIP: which relevance needs no training",
        f"{settings['count']} questions of the {settings['split']} scenes, one right caption of 16 (chance 0.0625), "
        f"models of seeds {settings['seeds']}, selection in blocks 2 and 4 of 6, fusion {settings['fusion']!r}. "
        "± is one standard error over the questions, each the mean of the models.",
        f"{about['processor']}, {about['threads']} threads, torch {report['versions']['torch']}.",
        accuracies(report),
        differences(report),
        each_model(report),
    ]
    if report["bars"]:
        each = report["bars_by_model"]
        head = ["values shared by the candidates, keep 0.3", "mean of the models", *(f"seed {seed}" for seed in each)]
        rows = zip(report["bars"], *each.values())
        checked = ([f"{row[0]['what']} standard error(s)", *map(verdict, row)] for row in rows)
        parts.append(aligned([head, *checked]))
    return "\n\n".join(parts) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Accuracy against keep rate, error bars of two standard errors."""
    names, rates, found = _lookup(report)
    figure, (axis,) = canvas(9.5, 5)
    colours = [f"tab:{c}" for c in ("red", "purple", "blue", "brown", "orange", "gray", "olive", "green", "cyan")]
    kinds = list(dict.fromkeys(name.split(",")[0] for name in names if name != "no selection"))
    for position, name in enumerate(names):
        cells = [found[name, rate] for rate in rates]
        values, errors = [c["accuracy"] for c in cells], [2 * c["standard_error"] for c in cells]
        if name == "no selection":
            axis.axhline(values[0], color="black", linewidth=1, label=name)
            axis.axhspan(values[0] - errors[0], values[0] + errors[0], color="black", alpha=0.08)
            continue
        colour = colours[kinds.index(name.split(",")[0]) % len(colours)]
        line = "--" if "per caption" in name else ":" if "nouns" in name else "-"
        places = [rate + 0.003 * (position - len(names) / 2) for rate in rates]  # beside each other
        axis.errorbar(
            places, values, errors, color=colour, linestyle=line, marker="o", markersize=3, capsize=2, label=name
        )
    axis.axhline(1 / 16, color="0.6", linewidth=0.8, linestyle=(0, (1, 3)), label="chance")
    axis.set_xlabel("keep rate of each of two selection layers")
    axis.set_ylabel("one right caption of 16: accuracy")
    axis.grid(alpha=0.25)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
