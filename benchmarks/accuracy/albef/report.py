"""Tables and plots of what was measured."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict

from benchmarks.common import command
from benchmarks.common.machine import commit
from benchmarks.common.show import canvas, markdown

from .arms import LABELS
from .train import KEEP_RATES

Record = Dict[str, Any]

COLOURS = {
    "text": "tab:red",
    "values": "tab:purple",
    "image": "tab:blue",
    "random": "tab:gray",
    "downsampled": "tab:orange",
    "tome": "tab:green",
    "front": "tab:olive",
    "once": "tab:pink",
    "merged": "tab:brown",
    "protected": "tab:cyan",
    "quarter": "navy",
}
FREE = "training-free"


def spread(values: Sequence[float]) -> str:
    """Return `mean ± standard error` over seeds; the mean alone of one."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {error(values):.1f}"


def error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def pick(records: Sequence[Record], value: str = "accuracy", **where: Any) -> list[float]:
    """Return the values of all records that agree with `where`, one per seed; `image_to_text@5` is that R@5."""
    found = [record for record in records if all(record[key] == wanted for key, wanted in where.items())]
    way, _, k = value.partition("@")
    if k:
        return [float(at(record["recall"][way], int(k))) for record in found]
    return [record[value] for record in found if record[value] is not None]


def at(recall: dict[Any, float], k: int) -> float:
    """Return R@K of a record, as it was made or as JSON gives it back."""
    return recall[k] if k in recall else recall[str(k)]


def lines_of(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return training and method in the order of the records, without repeats and without `none` and `words`,
    which no keep rate changes."""
    return list(dict.fromkeys((r["trained"], r["method"]) for r in records if r["method"] not in ("none", "words")))


def cell(records: Sequence[Record], value: str, **where: Any) -> str:
    """Return `mean ± standard error` over seeds; of a single seed, over its questions where that is known."""
    values = pick(records, value, **where)
    if not values:
        return ""
    if len(values) == 1 and value == "accuracy":
        return f"{values[0]:.1f} ± {pick(records, 'error', **where)[0]:.1f}"
    return spread(values)


def curve_table(records: Sequence[Record], value: str) -> str:
    """Return one line per method and training, one column per keep rate."""
    rows = []
    blind = [record for record in records if record["method"] == "words"][:1]  # of no base: all have the same
    if blind and value != "patches":
        rows.append([LABELS["words"], *[cell(blind, value)] * len(KEEP_RATES)])
    for trained in dict.fromkeys(record["trained"] for record in records):
        plain = pick(records, value, trained=trained, method="none")
        if plain and value != "patches" and (trained == FREE or not any(t == trained for t, _ in lines_of(records))):
            rows.append(
                [name_of(trained, "none"), *[cell(records, value, trained=trained, method="none")] * len(KEEP_RATES)]
            )
    for trained, method in lines_of(records):
        cells = [cell(records, value, trained=trained, method=method, keep_rate=rate) for rate in KEEP_RATES]
        if any(cells):
            rows.append([name_of(trained, method), *(one or "–" for one in cells)])
    return markdown([["", *(f"keep {rate:g}" for rate in KEEP_RATES)], *rows])


def curve_report(records: Sequence[Record], steps: int, queries: int, pool: int) -> str:
    """Write all tables of a run over the keep rates."""
    parts = [
        f"Matching accuracy, %, {queries} questions (chance 50), {steps} steps of training where it says so:",
        curve_table(records, "accuracy"),
        "Patches of the named objects that the first selection keeps, %:",
        curve_table(records, "patches"),
    ]
    if len({record["seed"] for record in records}) > 1:
        parts += [
            "Differences of the same base, in points, ± their standard error over the bases:",
            differences(records),
        ]
    for k in (1, 5, 10):
        for way in ("image_to_text", "text_to_image"):
            about = f"R@{k}, {way.replace('_', ' ')}, over {pool} images, %:"
            parts += [about, curve_table(records, f"{way}@{k}")]
    return "\n\n".join(parts)


def differences(records: Sequence[Record]) -> str:
    """Tabulate how far text guidance is ahead of rivals after the same training: differences by base, in points."""
    arms = {trained: method for trained, method in lines_of(records) if trained != FREE}
    pairs = [("text", "image"), ("text + alignment", "image + alignment"), ("merged", "front")]
    pairs += [(arm, rival) for arm in arms if arm.startswith(("text", "values", "merged")) for rival in ("none", FREE)]
    rows = []
    for one, other in pairs:
        if one in arms and (other in arms or pick(records, trained=other)):
            cells = []
            for rate in KEEP_RATES:
                rival = dict(method=arms.get(other, "none"), keep_rate=rate if other in arms else 1.0)
                seeds = {r["seed"]: r["accuracy"] for r in records if (r["trained"], r["method"]) == (one, arms[one])
                         and r["keep_rate"] == rate}  # fmt: skip
                gaps = [own - pick(records, seed=seed, trained=other, **rival)[0] for seed, own in seeds.items()]
                cells.append(f"{statistics.fmean(gaps):+.1f} ± {error(gaps):.1f}")
            rows.append([f"{name_of(one, arms[one])} − {name_of(other, arms.get(other, 'none'))}", *cells])
    return markdown([["", *(f"keep {rate:g}" for rate in KEEP_RATES)], *rows])


def name_of(trained: str, method: str) -> str:
    if trained == FREE:
        return f"{LABELS[method]}, as it is"
    return f"{LABELS[method]}, trained" + (" with its alignment" if "alignment" in trained else "")


def asked(name: str, seeds: Sequence[int]) -> str:
    """Return the command that measures it for these bases."""
    return f"python -m benchmarks.accuracy {name} --seed " + " ".join(str(seed) for seed in seeds)


def write(folder: Path, name: str, asked_for: str, text: str, **data: Any) -> None:
    """Write `name.md` and `name.json` in the folder, and the text on the terminal."""
    facts = command.report_on(Namespace(command=asked_for))
    where = f"{facts['machine']['processor']}, {facts['machine']['cores']} cores, torch {facts['versions']['torch']}"
    facts.update(data)
    command.write(folder / f"{name}.json", facts, f"`{asked_for}` ({where}, commit {commit()})\n\n{text}")


def draw_curves(records: Sequence[Record], speeds: Sequence[Record], path: Path) -> None:
    """Draw accuracy against keep rate (left) and, where speeds are known, against measured speed-up (right).

    Dashed: as it is; solid: trained with selection; dotted with stars: trained with its alignment too. Bars are
    standard errors over the bases. Points lie a little beside their keep rate, so that none hides another.
    """
    columns = 2 if speeds else 1
    figure, panels = canvas(5.6 * columns, 4.8, columns=columns)
    left, right = panels[0], panels[-1]
    faster = {(s["method"], s["keep_rate"]): s["speed_up"]["median"] for s in speeds}
    lines, handles = lines_of(records), {}
    for place, (trained, method) in enumerate(lines):
        rates = [rate for rate in KEEP_RATES if pick(records, trained=trained, method=method, keep_rate=rate)]
        values = [pick(records, trained=trained, method=method, keep_rate=rate) for rate in rates]
        line, marker = ("--", "o") if trained == FREE else (":", "*") if "alignment" in trained else ("-", "s")
        style = dict(
            color=COLOURS[method],
            linestyle=line,
            marker=marker,
            markersize=8 if marker == "*" else 4,
            capsize=2,
            label=name_of(trained, method),
        )
        means, errors = [statistics.fmean(v) for v in values], [error(v) for v in values]
        beside = 0.03 * (0.5 - place / max(1, len(lines) - 1))
        handles[line, method] = left.errorbar([rate + beside for rate in rates], means, errors, **style)
        if (method, rates[0]) in faster:
            right.errorbar([faster[method, rate] for rate in rates], means, errors, **style)
    plain = statistics.fmean(pick(records, method="none", trained=FREE))
    for axis in panels:
        axis.axhline(plain, color="black", linewidth=0.8, linestyle=":")
        axis.axhline(50, color="0.8", linewidth=0.8)
        axis.annotate("chance", (1, 50), (-2, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=7)
        axis.annotate(
            "no reduction, as it is", (0, plain), (4, 3), ("axes fraction", "data"), "offset points", fontsize=7
        )
        axis.set_ylabel("matching accuracy, %")
        axis.grid(alpha=0.25)
    left.invert_xaxis()
    left.set_xticks(KEEP_RATES, [f"{rate:g}" for rate in KEEP_RATES])
    left.set_xlabel("keep rate of each selection layer (less is kept to the right)")
    if speeds:
        right.plot([1.0], [plain], "k^")
        right.set_xlabel("measured speed-up of pair inference")
    columns = [[h for (style, _), h in handles.items() if style == line] for line in ("--", "-", ":")]
    longest, columns = max(map(len, columns)), [column for column in columns if column]
    # Legends fill columns from the top: one for each kind of training.
    blank = left.plot([], [], alpha=0, label=" ")[0]
    shown = [h for column in columns for h in (*column, *[blank] * (longest - len(column)))]
    where = dict(loc="outside lower center", ncols=len(columns) if speeds else 1, frameon=False, fontsize=8)
    figure.legend(handles=[h for h in shown if speeds or h is not blank], handlelength=4, **where)
    figure.savefig(path, dpi=150)
