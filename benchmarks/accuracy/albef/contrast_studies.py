"""The studies of contrastive objectives: exponents and similarities of SRCL, and ITC against cosine alignment."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Callable, Sequence, Tuple

from benchmarks.common.show import canvas, markdown

from .arms import LABELS
from .contrast import POOL, Objective, Run
from .contrast import train as contrast
from .jobs import run_all
from .report import Record, asked, at, error, spread, write

Seeds = Sequence[int]
Study = Callable[[Path, Seeds], None]
Bar = Tuple[str, float, float]
KINDS = ("weight_true", "weight_false")


def contrasts(folder: Path, seeds: Seeds, objectives: Sequence[Objective], steps: int = 300) -> list[Record]:
    """Train the objectives on every seed; a run that the folder has is read, for the studies share some."""
    runs = [Run(seed, objective, steps, folder) for seed in seeds for objective in objectives]
    return [record for made in run_all(contrast, runs, "objectives") for record in made]


ITC, COSINE = Objective("itc"), Objective("cosine")
DELTAS = tuple(Objective("srcl", delta) for delta in (1.0, 2.0, 4.0))
SIMILARITIES = tuple(Objective("srcl", 2.0, similarity) for similarity in ("teacher", "own", "progressive"))


def contrast_study(name: str, about: str, question: Sequence[Objective], scenes: Sequence[str] | None = None) -> Study:
    """Make a study of contrastive objectives: R@K both ways, and the weights that negatives got."""

    def study(folder: Path, seeds: Seeds) -> None:
        records = contrasts(folder, seeds, question)
        places = list(dict.fromkeys(r["scenes"] for r in records if scenes is None or r["scenes"] in scenes))
        rows, bars, weighed = [], [], []
        for place in places:
            for objective in question:
                found = [r for r in records if r["objective"] == str(objective) and r["scenes"] == place]
                cells = [
                    " / ".join(spread([at(r[way], k) for r in found]) for k in (1, 5, 10))
                    for way in ("image_to_text", "text_to_image")
                ]
                weights = [spread_fine([r[kind] for r in found]) if objective.loss == "srcl" else "–" for kind in KINDS]
                rows.append([str(objective), place, *cells, *weights])
                firsts = [statistics.fmean(at(r[way], 1) for way in ("image_to_text", "text_to_image")) for r in found]
                label = named(objective) + (f"\n{place}" if len(places) > 1 else "")
                bars.append((label, statistics.fmean(firsts), error(firsts)))
                if objective.loss == "srcl" and place == places[0]:
                    weighed.append((label, *(statistics.fmean(r[kind] for r in found) for kind in KINDS)))
        # Texts alone rank the captions alike for every picture: one of the pool's is right.
        blind = " / ".join(f"{100 * k / POOL:.1f}" for k in (1, 5, 10))
        rows += [[LABELS["words"], place, blind, blind, "–", "–"] for place in places]
        draw(bars, weighed, folder / f"{name}.png")
        head = [
            "objective",
            "scenes",
            "image to text R@1/5/10",
            "text to image R@1/5/10",
            "weight of true negatives",
            "of false negatives",
        ]
        write(folder, name, asked(f"study {name}", seeds), markdown([head, *rows]), results=records)

    study.__doc__ = about
    return study


def named(objective: Objective) -> str:
    """Name it for the axis of a plot."""
    if objective.loss != "srcl":
        return {"itc": "ITC", "cosine": "cosine"}[objective.loss]
    return f"SRCL, δ = {objective.delta:g}\n{objective.similarity}"


def draw(bars: Sequence[Bar], weighed: Sequence[Bar], path: Path) -> None:
    """Draw R@1 with its standard error over the bases and, for a choice of SRCL, what its negatives weigh."""
    columns = 2 if len(weighed) > 1 else 1
    figure, panels = canvas(columns * max(5.6, 0.75 * len(bars)), 4.2, columns=columns)
    panels[0].bar(range(len(bars)), [b[1] for b in bars], yerr=[b[2] for b in bars], color="tab:blue", capsize=3)
    panels[0].axhline(100 / POOL, color="black", linewidth=0.8, linestyle=":", label="chance")
    panels[0].set_xticks(range(len(bars)), [b[0] for b in bars], fontsize=7)
    panels[0].set_ylabel(f"R@1 of {POOL}, mean of both directions, %")
    panels[0].legend(frameon=False)
    if len(weighed) > 1:
        for side, colour, label in ((1, "tab:gray", "true negatives"), (2, "tab:red", "false negatives: they fit")):
            places = [place + 0.4 * (side - 1.5) for place in range(len(weighed))]
            panels[1].bar(places, [one[side] for one in weighed], 0.38, color=colour, label=label)
        panels[1].axhline(1, color="black", linewidth=0.8, linestyle=":", label="ITC: all alike")
        panels[1].set_xticks(range(len(weighed)), [one[0] for one in weighed], fontsize=7)
        panels[1].set_ylabel("mean weight of a negative")
        panels[1].set_ylim(0, 1.5)
        panels[1].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def spread_fine(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {error(values):.3f}"
