"""Tables and a plot of what a tiny language model answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.albef.report import COLOURS, Record, cell, error, pick
from benchmarks.common.show import canvas, markdown

from .arms import ARMS, LABELS, NONE, WORDS_ALONE, tokens_left
from .questions import ANSWERS

OLD, RENUMBERED = "old", "renumbered"
POSITIONS = (OLD, RENUMBERED)


def accuracies(records: Sequence[Record], rates: Sequence[float], kind: str) -> str:
    """Tabulate one line per arm and kind of positions, one column per keep rate; ± over the seeds."""
    rows = [["", *(f"keep {rate:g} ({tokens_left(rate)} tokens)" for rate in rates)]]
    for arm in (WORDS_ALONE, NONE):
        rows.append([LABELS[arm], *[cell(records, "accuracy", kind=kind, method=arm)] * len(rates)])
    for arm in ARMS:
        for positions in POSITIONS:
            where = dict(kind=kind, method=arm, positions=positions)
            cells = [cell(records, "accuracy", keep_rate=rate, **where) for rate in rates]
            rows.append([f"{LABELS[arm]}, {positions} positions", *cells])
    return markdown(rows)


def gaps(records: Sequence[Record], one: Record, other: Record) -> list[float]:
    """Return differences in points, seed by seed."""
    seeds = dict.fromkeys(record["seed"] for record in records)
    return [pick(records, seed=s, **one)[0] - pick(records, seed=s, **other)[0] for s in seeds]


def shown(values: Sequence[float]) -> str:
    """Show a mean difference ± its standard error over the seeds."""
    return f"{statistics.fmean(values):+.1f}" + (f" ± {error(values):.1f}" if len(values) > 1 else "")


def of_positions(records: Sequence[Record], rates: Sequence[float], kind: str) -> str:
    """Tabulate what counting anew changes."""
    rows = [["renumbered minus old", *(f"keep {rate:g}" for rate in rates)]]
    for arm in ARMS:
        cells = []
        for rate in rates:
            one, other = (dict(kind=kind, method=arm, keep_rate=rate, positions=each) for each in (RENUMBERED, OLD))
            cells.append(shown(gaps(records, one, other)))
        rows.append([LABELS[arm], *cells])
    return markdown(rows)


def of_arms(records: Sequence[Record], rates: Sequence[float], kind: str) -> str:
    """Tabulate what each arm loses against no reduction, with old positions."""
    rows = [["minus no reduction", *(f"keep {rate:g}" for rate in rates)]]
    for arm in ARMS:
        cells = []
        for rate in rates:
            own = dict(kind=kind, method=arm, keep_rate=rate, positions=OLD)
            cells.append(shown(gaps(records, own, dict(kind=kind, method=NONE))))
        rows.append([LABELS[arm], *cells])
    return markdown(rows)


def document(records: Sequence[Record], rates: Sequence[float]) -> str:
    """Return all tables."""
    parts, seeds = [], len({record["seed"] for record in records})
    spread = "the seeds" if seeds > 1 else "the questions"
    for kind, answers in ANSWERS.items():
        asked = next(record["questions"] for record in records if record["kind"] == kind)
        parts += [
            f'"{kind} …": right, %, {asked} questions (chance {100 / len(answers):.1f}), ± over {spread}:',
            accuracies(records, rates, kind),
        ]
    for kind in ANSWERS:
        parts += [f'"{kind} …": differences in points, each seed with itself:', of_positions(records, rates, kind),
                  of_arms(records, rates, kind)]  # fmt: skip
    return "\n\n".join(parts)


def draw(records: Sequence[Record], rates: Sequence[float], path: Path) -> None:
    """Draw accuracy against the tokens that are left, a panel per kind; dashed: positions counted anew."""
    figure, panels = canvas(13, 4.8, columns=len(ANSWERS))
    colours = {**COLOURS, "after, text": "tab:orange", "after, image": "tab:green"}
    tokens = [tokens_left(rate) for rate in rates]
    for axis, (kind, answers) in zip(panels, ANSWERS.items()):
        for arm in ARMS:
            for positions, line in zip(POSITIONS, ("-", "--")):
                where = dict(kind=kind, method=arm, positions=positions)
                values = [pick(records, keep_rate=rate, **where) for rate in rates]
                axis.errorbar(
                    tokens, [statistics.fmean(v) for v in values], [error(v) for v in values], color=colours[arm],
                    linestyle=line, marker="o", markersize=3, capsize=2, label=f"{LABELS[arm]}, {positions} positions",
                )  # fmt: skip
        for arm, line in ((NONE, ":"), (WORDS_ALONE, "-.")):
            value = statistics.fmean(pick(records, kind=kind, method=arm))
            axis.axhline(value, color="black", linewidth=0.8, linestyle=line, label=LABELS[arm])
        axis.set_xscale("log")
        axis.set_xticks(tokens, [str(count) for count in tokens])
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.set_xlabel("tokens left of an image's 100")
        axis.set_title(f"{kind} … (1 of {len(answers)})", fontsize=10)
        axis.grid(alpha=0.25)
    panels[0].set_ylabel("right answers, %")
    where = dict(loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.legend(*panels[0].get_legend_handles_labels(), **where)
    figure.savefig(path, dpi=150)
