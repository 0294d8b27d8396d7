"""The study of frozen CLIP as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.world.candidates import LEAKY
from benchmarks.common.show import aligned, canvas

from .arms import EARLY, SHARED


def _lookup(report: dict[str, Any]) -> tuple[list[str], list[float], dict[tuple[str, float], dict[str, Any]]]:
    records = report["results"]
    names = list(dict.fromkeys(record["arm"] for record in records))
    rates = sorted({record["keep_rate"] for record in records if record["keep_rate"] < 1}, reverse=True)
    found = {(record["arm"], record["keep_rate"]): record for record in records}
    # Without selection there is one figure, whatever the rate.
    found.update({(n, r): found[n, 1.0] for n in names for r in rates if (n, r) not in found})
    return names, rates, found


def accuracies(report: dict[str, Any]) -> str:
    """Return accuracy ± standard error by arm and keep rate."""
    names, rates, found = _lookup(report)
    rows = [["relevance and guidance", *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = (found[name, rate] for rate in rates)
        rows.append([name, *(f"{cell['accuracy']:.3f} ± {cell['standard_error']:.3f}" for cell in cells)])
    return aligned(rows)


def differences(report: dict[str, Any], key: str, head: str) -> str:
    """Show a difference of accuracies on the same questions, ± its standard error; nothing where no record has it."""
    names, rates, found = _lookup(report)
    rows = [[head, *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = [found[name, rate].get(key) for rate in rates]
        if all(cells):
            rows.append([name, *(f"{gap:+.3f} ± {error:.3f}" for gap, error in cells)])  # type: ignore[misc]
    return aligned(rows) if len(rows) > 1 else ""


def each_model(report: dict[str, Any]) -> str:
    """Return accuracies of the models one by one, and the FLOPs of all blocks."""
    names, rates, found = _lookup(report)
    rows = [["by model (FLOPs of the blocks)", *(f"keep {rate:g}" for rate in rates)]]
    for name in names:
        cells = (found[name, rate] for rate in rates)
        rows.append(
            [
                name,
                *(" / ".join(f"{one:.3f}" for one in cell["by_model"]) + f" ({cell['flops']:.3f})" for cell in cells),
            ]
        )
    return aligned(rows)


def by_objects(report: dict[str, Any]) -> str:
    """Return accuracies where the right caption names one object, and where it names two."""
    names, rates, found = _lookup(report)
    kinds = report["questions"]
    rows = [[f"{' / '.join(map(str, kinds))} named ({' / '.join(map(str, kinds.values()))} questions)"]]
    rows[0] += [f"keep {rate:g}" for rate in rates]
    for name in names:
        cells = (found[name, rate]["by_objects"].values() for rate in rates)
        rows.append([name, *(" / ".join(f"{value:.3f}" for value, _ in cell) for cell in cells)])
    return aligned(rows)


WARNING = (
    "**These questions give the answer away:** the wrong captions are the right one with one object swapped, and text "
    'alone answers what the rows "text alone" say. What all candidates choose together can use that; read no row '
    '"shared by the candidates" against another.'
)


def document(report: dict[str, Any]) -> str:
    """Write all tables with what they were made on."""
    settings, about = report["settings"], report["machine"]
    parts = [
        "# Frozen CLIP: which relevance needs no training",
        f"{settings['count']} questions of the {settings['split']} scenes, one right caption of 16 (chance 0.0625; "
        f"{settings['questions']}), models of seeds {settings['seeds']}, selection in blocks 2 and 4 of 6, "
        f"fusion {settings['fusion']!r}. "
        "± is one standard error over the questions, each the mean of the models.",
        f"{about['processor']}, {about['threads']} threads, torch {report['versions']['torch']}.",
        WARNING if settings["questions"] == LEAKY else "",
        accuracies(report),
        differences(report, "against_none", "against no selection"),
        differences(report, "against_merging", f"against {EARLY}"),
        # On leaky questions that row is no measure of anything, and what it is ahead of none of its merit.
        differences(report, "shared_values_ahead", f"{SHARED}, minus") if settings["questions"] != LEAKY else "",
        by_objects(report),
        each_model(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy against keep rate, error bars of two standard errors."""
    names, rates, found = _lookup(report)
    figure, (axis,) = canvas(9.5, 5)
    colours = [
        f"tab:{c}" for c in ("red", "purple", "blue", "brown", "orange", "gray", "olive", "green", "cyan", "pink")
    ]
    kinds = list(dict.fromkeys(name.split(",")[0] for name in names if (name, 1.0) not in found))
    for position, name in enumerate(names):
        cells = [found[name, rate] for rate in rates]
        values, errors = [c["accuracy"] for c in cells], [2 * c["standard_error"] for c in cells]
        if (name, 1.0) in found:  # the same whatever the rate
            plain = name == "no selection"
            axis.axhline(
                values[0], color="black" if plain else "0.4", linewidth=1, linestyle="-" if plain else "-.", label=name
            )
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
