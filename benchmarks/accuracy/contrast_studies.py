"""The studies of contrastive objectives: exponents and similarities of SRCL, and ITC against cosine alignment."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .contrast import Objective, Run
from .contrast import train as contrast
from .jobs import run_all
from .report import Record, asked, at, axes, error, spread, table, write

Seeds = Sequence[int]
Study = Callable[[Path, Seeds], None]


def contrasts(folder: Path, seeds: Seeds, objectives: Sequence[Objective], steps: int = 300) -> list[Record]:
    """The objectives on every seed; a run that the folder has is read, for the studies share some."""
    runs = [Run(seed, objective, steps, folder) for seed in seeds for objective in objectives]
    return [record for made in run_all(contrast, runs, "objectives") for record in made]


ITC, COSINE = Objective("itc"), Objective("cosine")
DELTAS = tuple(Objective("srcl", delta) for delta in (1.0, 2.0, 4.0))
SIMILARITIES = tuple(Objective("srcl", 2.0, similarity) for similarity in ("teacher", "own", "progressive"))


def contrast_study(name: str, question: Sequence[Objective], scenes: Sequence[str] | None = None) -> Study:
    """A study over contrastive objectives: R@K both ways, and the weights that negatives got."""

    def study(folder: Path, seeds: Seeds) -> None:
        records = contrasts(folder, seeds, question)
        places = list(dict.fromkeys(r["scenes"] for r in records if scenes is None or r["scenes"] in scenes))
        rows, bars = [], []
        for place in places:
            for objective in question:
                found = [r for r in records if r["objective"] == str(objective) and r["scenes"] == place]
                cells = [
                    " / ".join(spread([at(r[way], k) for r in found]) for k in (1, 5, 10))
                    for way in ("image_to_text", "text_to_image")
                ]
                weights = [
                    spread_fine([r[kind] for r in found]) if objective.loss == "srcl" else "–"
                    for kind in ("weight_true", "weight_false")
                ]
                rows.append([str(objective), place, *cells, *weights])
                firsts = [statistics.fmean(at(r[way], 1) for way in ("image_to_text", "text_to_image")) for r in found]
                bars.append((f"{objective}\n{place}", statistics.fmean(firsts), error(firsts)))
        figure, (axis,) = axes(max(6.4, 1.1 * len(bars)), 4.2)
        axis.bar(range(len(bars)), [b[1] for b in bars], yerr=[b[2] for b in bars], color="tab:blue", capsize=3)
        axis.set_xticks(range(len(bars)), [b[0].replace(", ", "\n") for b in bars], fontsize=7)
        axis.set_ylabel("R@1, mean of both directions, %")
        figure.savefig(folder / f"{name}.png", dpi=150)
        head = [
            "objective",
            "scenes",
            "image to text R@1/5/10",
            "text to image R@1/5/10",
            "weight of true negatives",
            "of false negatives",
        ]
        write(folder, name, asked(f"study {name}", seeds), table(head, rows), records=records)

    return study


def spread_fine(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {error(values):.3f}"
