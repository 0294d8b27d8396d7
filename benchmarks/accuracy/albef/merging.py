"""Merge, then select: against no reduction and against merging alone, at equal FLOPs, paired by question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.common.show import canvas, markdown

from .arms import LABELS, ONCE, lengthwise, reduced, spent, vision_flops
from .base import BATCH, arguments, base, digest, train_sampler
from .contrast_studies import Seeds
from .evaluate import TEST_SEED, VALIDATION_SEED, Questions, matching_hits, without_picture
from .jobs import call, run_all
from .model import USUAL, Shape
from .report import COLOURS, FREE, Record, asked, error, write
from .train import KEEP_RATES, Arm, tune

QUERIES = 1280
STEPS = (100,)
"""Of training with each way."""
BEYOND = {
    2.3: ("front", "once", "merged", "protected", "quarter"),
    2.8: ("front", "merged", "protected", "quarter"),
}
"""What gets to so many times fewer FLOPs of the blocks than without reduction; two selections cannot."""
TRIED = ("text", "values", "tome", "front", "once", "merged", "protected", "quarter")
TRAINED = ("none", "front", "merged")
CHOSEN_AMONG = ("front", *(name for name in ONCE if name != "once"))
"""What is asked on validation."""
RIVALS = ("none", "front")


def columns(shape: Shape = USUAL) -> dict[str, float]:
    """Return the share of the blocks' FLOPs of each column: of two selections at a keep rate, and beyond."""
    tower = lengthwise(100, shape)
    return {
        **{f"keep {rate:g}": spent(tower, rate) for rate in KEEP_RATES},
        **{f"{times:g}x": 1 / times for times in BEYOND},
    }


def methods_at(column: str) -> tuple[str, ...]:
    """Name what reaches the FLOPs of a column."""
    return TRIED if column.startswith("keep") else BEYOND[float(column[:-1])]


def rate_of(column: str) -> float:
    """Return the keep rate of two selections that a column names; 1 of one that names how many times fewer FLOPs."""
    return float(column.split()[1]) if column.startswith("keep") else 1.0


def asked_on(test: bool = True) -> Questions:
    """Return the questions of the tables, or those that choices are made on."""
    return Questions.make(QUERIES // 2, 8, TEST_SEED if test else VALIDATION_SEED, test=test)


def words_alone(test: bool = True) -> Tensor:
    """Return `(1, questions)`: 100 where a classifier that sees the captions alone is right."""
    return 100 * without_picture(asked_on(test))[0].double().unsqueeze(0)


def measured(
    seed: int, guidance: str | None, steps: int, folder: Path, shape: Shape = USUAL, test: bool = True
) -> list[Record]:
    """Measure a base as it is, or after training with one method: every method, or this one, in every column.

    What the folder has of the same weights is taken from there, so that a run that was broken off goes on, and one
    with more methods asks these alone. Without `test`, what is to be chosen among is asked on validation questions.
    """
    model = base(seed, folder, shape=shape)
    split = "" if test else "-validation"
    path = folder / "merging" / f"{seed}{shape}-{guidance or FREE}-{steps}-{digest(model)}{split}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    trained = FREE if guidance is None else guidance
    wanted: list[tuple[str, str, float | None]] = [("none", "", None)] if guidance in (None, "none") else []
    for column, share in columns(shape).items():
        methods = methods_at(column) if test else CHOSEN_AMONG
        wanted += [(method, column, share) for method in methods if guidance in (None, method)]
    known = {(record["method"], record["column"]) for record in records}
    lacking = [one for one in wanted if one[:2] not in known]
    if lacking:
        if guidance is not None:
            torch.manual_seed(1000 * seed + steps)
            tune(model, train_sampler(100 + seed, count=3000), Arm(guidance), steps, BATCH, seed)
        questions = asked_on(test)
        for method, column, share in lacking:
            with reduced(model, method, rate_of(column), share=share) as encode:
                hits = matching_hits(model, encode, questions).int().tolist()
            records.append({"seed": seed, "trained": trained, "method": method, "column": column, "hits": hits})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))
    return [{**record, "steps": steps} for record in records]


def of_questions(records: Sequence[Record], **where: object) -> Tensor:
    """Return `(bases, questions)`, in the order of the bases: 100 where the answer was right."""
    found = sorted(pick_all(records, **where), key=lambda record: record["seed"])
    return 100 * torch.tensor([record["hits"] for record in found], dtype=torch.float64)


def pick_all(records: Sequence[Record], **where: object) -> list[Record]:
    return [record for record in records if all(record[key] == wanted for key, wanted in where.items())]


def shown(values: Tensor, sign: str = "") -> str:
    """Show the mean ± its standard error over the bases, of `(bases, questions)`; of one base, over the questions."""
    means = values.mean(1).tolist()
    spare = error(means) if len(means) > 1 else float(values.std() / values.numel() ** 0.5)
    return f"{fmean(means):{sign}.1f} ± {spare:.1f}"


def over_questions(values: Tensor) -> str:
    """Show the standard error over the questions, each the mean of the bases; nothing of one base."""
    each = values.mean(0)
    return f" [± {float(each.std() / len(each) ** 0.5):.1f}]" if len(values) > 1 else ""


def names(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name what was trained and the method, in the order in which they were asked."""
    return list(dict.fromkeys((r["trained"], r["method"]) for r in records))


def title(trained: str, method: str) -> str:
    about = LABELS[method].replace(", same FLOPs", "")
    return about if trained == FREE else f"{about}, trained"


def accuracies(records: Sequence[Record], trained: Sequence[str], blind: Tensor) -> str:
    """Tabulate one line per method, one column per cost; `blind` `(1, questions)` is of the texts alone."""
    rows = [["", *columns()], [LABELS["words"], *[shown(blind)] * len(columns())]]
    for one, method in names(records):
        if one in trained:
            cells = []
            for column in columns():
                found = of_questions(records, trained=one, method=method, column="" if method == "none" else column)
                cells.append(shown(found) if len(found) else "–")
            rows.append([title(one, method), *cells])
    return markdown(rows)


def differences(records: Sequence[Record], trained: Sequence[str], rival: str, rival_trained: str) -> str:
    """Tabulate differences of the same base on the same questions, ± over bases, in brackets over questions."""
    rows = [[f"minus {title(rival_trained, rival)}", *columns()]]
    for one, method in names(records):
        if one not in trained or method == "none" or (one, method) == (rival_trained, rival):
            continue
        cells = []
        for column in columns():
            own = of_questions(records, trained=one, method=method, column=column)
            where = "" if rival == "none" else column
            gap = own - of_questions(records, trained=rival_trained, method=rival, column=where) if len(own) else own
            cells.append(shown(gap, "+") + over_questions(gap) if len(gap) else "–")
        rows.append([title(one, method), *cells])
    return markdown(rows)


def costs(shape: Shape = USUAL) -> str:
    """Tabulate counted FLOPs of the image encoder, 1 being without reduction, and how much each method differs."""
    whole = vision_flops(80, 1.0, shape=shape)
    rows = [["image encoder, counted", *columns()]]
    for method in TRIED[:1] + TRIED[2:]:
        cells = []
        for column, share in columns(shape).items():
            if method in methods_at(column):
                counted = vision_flops(80, rate_of(column), method=method, share=share, shape=shape)
                cells.append(f"{counted / whole:.3f}")
            else:
                cells.append("–")
        rows.append([title(FREE, method), *cells])
    return markdown(rows)


def merging(folder: Path, seeds: Seeds, shape: Shape = USUAL, steps: Sequence[int] = STEPS) -> None:
    """Study (j) merge, then select: every way at equal FLOPs, as it is and after some steps of training with it."""
    arms = [(arm, count) for count in steps for arm in TRAINED]
    tasks = [(measured, (seed, arm, count, folder, shape)) for arm, count in (*arms, (None, 0)) for seed in seeds]
    records = [record for made in run_all(call, tasks, "merging") for record in made]
    records.sort(key=lambda record: record["trained"] != FREE)
    blind = words_alone()
    bases = "over the bases [± over the questions]" if len(seeds) > 1 else "over the questions"
    parts = [
        f"Matching accuracy of bases as they are, %, {QUERIES} questions (chance 50), ± {bases}:",
        accuracies(records, [FREE], blind),
        "FLOPs, counted, those without reduction being 1:",
        costs(shape),
        f"Differences in points on the same questions, ± {bases}:",
        *(differences(records, [FREE], rival, FREE) for rival in RIVALS),
    ]
    for count in steps:
        mine = after(records, count)
        parts += [
            f"After {count} steps of training with each, the keep rate drawn per step from {KEEP_RATES}:",
            accuracies(mine, TRAINED, blind),
            differences(mine, TRAINED, "none", "none"),
            differences(mine, TRAINED, "none", FREE),
            differences(mine, TRAINED, "front", "front"),
        ]
    name = f"merging{shape}"
    draw(records, steps, columns(shape), folder / f"{name}.png")
    given = [*arguments(shape), *(["--steps", *map(str, steps)] if tuple(steps) != STEPS else [])]
    command = " ".join([asked("study merging", seeds), *given])
    write(folder, name, command, "\n\n".join(parts), results=records)


def choosing(folder: Path, seeds: Seeds, shape: Shape = USUAL) -> None:
    """Ask on validation what the study's settings were chosen among, of bases as they are."""
    tasks = [(measured, (seed, None, 0, folder, shape, False)) for seed in seeds]
    records = [record for made in run_all(call, tasks, "choosing") for record in made]
    blind = words_alone(test=False)
    parts = [
        f"Matching accuracy of bases as they are, %, {QUERIES} validation questions (chance 50):",
        accuracies(records, [FREE], blind),
        "Differences in points on the same questions:",
        *(differences(records, [FREE], rival, FREE) for rival in RIVALS),
    ]
    command = " ".join([asked("study merging", seeds), *arguments(shape), "--validation"])
    write(folder, f"merging-validation{shape}", command, "\n\n".join(parts), results=records)


def after(records: Sequence[Record], steps: int) -> list[Record]:
    """Return those of bases as they are, and after so many steps."""
    return [record for record in records if record["steps"] in (0, steps)]


def draw(records: Sequence[Record], steps: Sequence[int], shares: dict[str, float], path: Path) -> None:
    """Draw accuracy against the FLOPs of the blocks, as it is and trained; bars are standard errors over the bases."""
    figure, panels = canvas(5.5 * (1 + len(steps)), 4.4, columns=1 + len(steps))
    times = [1 / share for share in shares.values()]
    for axis, count in zip(panels, (0, *steps)):
        mine = [record for record in records if record["steps"] == count]
        for one, method in names(mine):
            if method == "none":
                continue
            found = [of_questions(mine, trained=one, method=method, column=column) for column in shares]
            points = [(x, values.mean(1).tolist()) for x, values in zip(times, found) if len(values)]
            axis.errorbar(
                [x for x, _ in points], [fmean(means) for _, means in points], [error(means) for _, means in points],
                color=COLOURS[method], marker="o", markersize=4, capsize=2, label=title(one, method),
            )  # fmt: skip
        plain = of_questions(mine, trained="none" if count else FREE, method="none", column="")
        axis.axhline(float(plain.mean()), color="black", linewidth=0.8, linestyle=":", label="no reduction")
        axis.set_xlabel("FLOPs of the blocks without reduction over those spent")
        axis.set_ylabel("matching accuracy, %")
        axis.set_title(f"after {count} steps with it" if count else "as it is", fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
