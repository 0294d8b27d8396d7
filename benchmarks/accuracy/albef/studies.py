"""Studies: each one question, one table, one plot. `STUDIES` names them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.accuracy.world.scenes import PLAIN, Layout
from benchmarks.common.show import canvas, markdown
from patchselect import keep_rate_for_budget

from .arms import LABELS, reduced, vision_flops
from .base import BATCH, base, train_sampler
from .contrast import Objective
from .contrast_studies import COSINE, DELTAS, ITC, SIMILARITIES, Seeds, Study, contrast_study
from .curves import Curve, methods_of
from .curves import measure as measure_curve
from .evaluate import TEST_SEED, Questions, matching_hits, without_picture
from .jobs import call, run_all
from .merging import merging
from .model import LAYERS, MiniAlbef
from .report import FREE, Record, asked, cell, curve_table, draw_curves, error, pick, spread, write
from .scratch import train_from_scratch
from .throughput import throughput
from .train import KEEP_RATES, Arm, tune

QUERIES = 1280
SCRATCH = (1000, 500)
"""Steps of both stages of a training from scratch."""
SCRATCH_RATE = 0.5
"""Of each of the paper's two selections there; merge-then-select spends as much."""


def speed(folder: Path, seeds: Seeds) -> None:
    """Study (a) selection on and off: accuracy of the full run against measured time."""
    path = folder / "full.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python -m benchmarks.accuracy full` first")
    records, rows = json.loads(path.read_text())["results"], []
    speeds = throughput(base(seeds[0], folder))
    plain = next(r for r in speeds if r["method"] == "none")
    rows.append(
        ["no reduction", "", f"{plain['pairs_per_second']:.0f}", "1", "1", accuracy(records, FREE, "none", 1.0)]
    )
    for one in speeds:
        method, rate, ratio = one["method"], one["keep_rate"], one["speed_up"]
        if method != "none":
            trained = f"{method} + alignment" if method in ("text", "values") else method
            after = accuracy(records, trained, method, rate) if any(pick(records, trained=trained)) else ""
            speed_up = f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
            cells = [f"{one['pairs_per_second']:.0f}", speed_up, f"{one['flop_ratio']:.2f}"]
            rows.append([LABELS[method], f"{rate:g}", *cells, accuracy(records, FREE, method, rate), after])
    rows[0].append("")
    blind = [record for record in records if record["method"] == "words"][:1]
    rows += [[LABELS["words"], "", "", "", "", cell([record], "accuracy"), ""] for record in blind]
    head = ["method", "keep", "pairs/s", "speed-up [quartiles]", "FLOP ratio, image encoder", "as it is", "trained"]
    draw_curves(records, speeds, folder / "speed.png")
    write(folder, "speed", asked("study speed", seeds), markdown([head, *rows]), results=speeds)


def accuracy(records: Sequence[Record], trained: str, method: str, keep_rate: float) -> str:
    return spread(pick(records, trained=trained, method=method, keep_rate=keep_rate))


@lru_cache(maxsize=None)
def words(layout: Layout = PLAIN) -> str:
    """Measure the matching accuracy of the captions alone, on the questions of the studies: the floor of tables."""
    hits, _ = without_picture(Questions.make(QUERIES // 2, 8, TEST_SEED, layout))
    hits = 100 * hits.float()
    return f"{float(hits.mean()):.1f} ± {float(hits.std() / len(hits) ** 0.5):.1f}"


WHERE = ((0,), (2,), (4,), (1, 3), (2, 4), (3, 5))


def tuned_at(seed: int, layers: tuple[int, ...], folder: Path, steps: int) -> list[Record]:
    """Train a base with selection in other blocks, at every keep rate."""
    model = base(seed, folder)
    torch.manual_seed(seed)
    sampler = train_sampler(100 + seed, count=3000)
    tune(model, sampler, Arm("text", aligned=True), steps, BATCH, seed, layers=layers)
    questions, records = Questions.make(QUERIES // 2, 8, TEST_SEED), []
    for rate in KEEP_RATES:
        with reduced(model, "text", rate, layers) as encode:
            hits = matching_hits(model, encode, questions).float().mean()
        ratio = vision_flops(80, 1.0) / vision_flops(80, rate, layers)
        records.append(
            {"seed": seed, "layers": layers, "keep_rate": rate, "accuracy": 100 * float(hits), "ratio": ratio}
        )
    return records


def layers(folder: Path, seeds: Seeds) -> None:
    """Study (b) where and how much: layers against keep rate, after 200 steps with selection there."""
    tasks = [(tuned_at, (seed, where, folder, 200)) for where in WHERE for seed in seeds]
    records = [record for made in run_all(call, tasks, "layers") for record in made]
    rows = []
    for where in WHERE:
        cells = [pick(records, layers=where, keep_rate=rate) for rate in KEEP_RATES]
        ratios = [pick(records, "ratio", layers=where, keep_rate=rate)[0] for rate in KEEP_RATES]
        blocks = " and ".join(str(block + 1) for block in where)
        rows.append([blocks, *(f"{spread(cell)} at {ratio:.2f}x" for cell, ratio in zip(cells, ratios))])
    figure, (axis,) = canvas(6.4, 4.2)
    for where in WHERE:
        points = [
            (pick(records, "ratio", layers=where, keep_rate=r), pick(records, layers=where, keep_rate=r))
            for r in KEEP_RATES
        ]
        style = "o-" if len(where) == 2 else "s--"
        axis.errorbar(
            [x[0] for x, _ in points], [statistics.fmean(y) for _, y in points], [error(y) for _, y in points],
            fmt=style, markersize=4, capsize=2, label="blocks " + " and ".join(str(b + 1) for b in where),
        )  # fmt: skip
    axis.set_xlabel("FLOP ratio of the image encoder")
    axis.set_ylabel("matching accuracy, %")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    figure.savefig(folder / "layers.png", dpi=150)
    rows.append([LABELS["words"], *[words()] * len(KEEP_RATES)])
    head = ["selection inside block", *(f"keep {rate:g}" for rate in KEEP_RATES)]
    write(folder, "layers", asked("study layers", seeds), markdown([head, *rows]), results=records)


SMALL = (11, 15)
"""Drawings of the resolution study, in pixels of 80: hard to tell apart at the base's own size."""


def at_resolution(seed: int, size: int, guidance: str, folder: Path, steps: int) -> Record:
    """Train a base on at another image size; with guidance at the keep rate that costs what 80 px cost without."""
    model, layout = base(seed, folder), Layout(size=size, glyph=SMALL)
    trained_on = replace(layout, varied=True)
    torch.manual_seed(seed)
    arm = Arm(guidance, aligned=guidance != "none")
    rate = keep_rate_for_budget(model.vision, 1.0, LAYERS, size) if arm.aligned else 1.0
    assert isinstance(rate, float)
    tune(model, train_sampler(100 + seed, trained_on, 3000), arm, steps, BATCH, seed, keep_rates=(rate,))
    with reduced(model, arm.guidance, rate) as encode:
        hits = matching_hits(model, encode, Questions.make(QUERIES // 2, 8, TEST_SEED, layout)).float().mean()
    cost = vision_flops(size, rate) / vision_flops(80, 1.0)
    return {
        "seed": seed,
        "size": size,
        "guidance": arm.guidance,
        "rate": rate,
        "accuracy": 100 * float(hits),
        "cost": cost,
    }


def resolution(folder: Path, seeds: Seeds) -> None:
    """Study (g) larger images at equal cost, on scenes of small drawings, after 300 steps of training at that size."""
    cases = [(80, "none"), (88, "text"), (96, "text"), (88, "image"), (96, "image"), (96, "none")]
    tasks = [(at_resolution, (seed, size, guidance, folder, 300)) for size, guidance in cases[::-1] for seed in seeds]
    records = run_all(call, tasks, "resolution")
    rows, bars = [], []
    for size, guidance in cases:
        found = [r for r in records if (r["size"], r["guidance"]) == (size, guidance)]
        values = [r["accuracy"] for r in found]
        rows.append(
            [f"{size} px", LABELS[guidance], f"{found[0]['rate']:.3f}", f"{found[0]['cost']:.3f}", spread(values)]
        )
        bars.append((f"{size} px\n{guidance}\ncost {found[0]['cost']:.2f}", statistics.fmean(values), error(values)))
    figure, (axis,) = canvas(6.4, 4.2)
    axis.bar(range(len(bars)), [b[1] for b in bars], yerr=[b[2] for b in bars], capsize=3, color="tab:orange")
    axis.set_xticks(range(len(bars)), [b[0] for b in bars])
    axis.set_ylim(50, 100)
    axis.set_ylabel("matching accuracy, %")
    figure.savefig(folder / "resolution.png", dpi=150)
    rows += [[f"{s} px", LABELS["words"], "", "", words(Layout(size=s, glyph=SMALL))] for s in (80, 88, 96)]
    head = ["image", "guidance", "keep rate", "cost (FLOPs of 80 px = 1)", "accuracy"]
    write(folder, "resolution", asked("study resolution", seeds), markdown([head, *rows]), results=records)


def alignment(folder: Path, seeds: Seeds) -> None:
    """Study (h) selection alignment, with and without, from a base whose text attention was never trained."""
    arms = (Arm("none"), Arm("image"), Arm("text", aligned=True), Arm("text"))
    curves = [Curve(seed, arm, 300, methods_of(arm), QUERIES, 32, folder, 1) for arm in arms for seed in seeds]
    curves += [Curve(seed, None, 0, ("text", "image", "random"), QUERIES, 32, folder, 1) for seed in seeds]
    records = [record for made in run_all(measure_curve, curves, "alignment") for record in made]
    draw_curves(records, [], folder / "alignment.png")
    text = (
        curve_table(records, "accuracy")
        + "\n\nPatches of the named objects kept, %:\n\n"
        + curve_table(records, "patches")
    )
    write(folder, "alignment", asked("study alignment", seeds), text, results=records)


def from_scratch(seed: int, method: str, aligned: bool, steps: tuple[int, int], folder: Path) -> Record:
    """Train one model from nothing with one of `none`, `text` and `merged`; what the folder has is taken from there."""
    facts = {"seed": seed, "method": method, "aligned": aligned, "steps": list(steps)}
    path = folder / "scratch" / f"{seed}-{method}{'-aligned' * aligned}-{steps[0]}-{steps[1]}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.manual_seed(seed)
    model = MiniAlbef()
    train_from_scratch(model, train_sampler(seed), method, SCRATCH_RATE, aligned, steps, BATCH)
    with reduced(model, method, SCRATCH_RATE) as encode:
        hits = matching_hits(model, encode, Questions.make(QUERIES // 2, 8, TEST_SEED)).float()
    record = {**facts, "accuracy": 100 * float(hits.mean()), "error": 100 * float(hits.std() / len(hits) ** 0.5)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return record


def scratch(folder: Path, seeds: Seeds) -> None:
    """Study (i) training with selection from the first step, as the papers do, against the same training without."""
    cases = [("none", False), ("text", False), ("text", True), ("merged", False), ("merged", True)]
    tasks = [(from_scratch, (seed, *case, SCRATCH, folder)) for case in cases[::-1] for seed in seeds]
    records = run_all(call, tasks, "from scratch")
    rows, bars = [], []
    for method, aligned in cases:
        values = pick(records, method=method, aligned=aligned)
        name = "as in the papers" if method == "text" else LABELS[method]
        name = f"{name}, with selection alignment" if aligned else name
        rows.append([name, "1" if method == "none" else f"{SCRATCH_RATE:g}"])
        rows[-1].append(cell(records, "accuracy", method=method, aligned=aligned))
        bars.append((name.replace(", ", ",\n"), statistics.fmean(values), error(values)))
    figure, (axis,) = canvas(9, 4.2)
    axis.bar(range(len(bars)), [b[1] for b in bars], yerr=[b[2] for b in bars], capsize=3, color="tab:green")
    axis.set_xticks(range(len(bars)), [b[0] for b in bars], fontsize=8)
    axis.set_ylim(50, 100)
    axis.set_ylabel("matching accuracy, %")
    figure.savefig(folder / "scratch.png", dpi=150)
    rows.append([LABELS["words"], "", words()])
    head = ["training", "keep", "accuracy"]
    write(folder, "scratch", asked("study scratch", seeds), markdown([head, *rows]), results=records)


STUDIES: dict[str, Study] = {
    "speed": speed,
    "layers": layers,
    "delta": contrast_study(
        "delta", "Study (c) how sharply SRCL tells true negatives from false ones.", (ITC, *DELTAS), ("same",)
    ),
    "similarity": contrast_study(
        "similarity", "Study (d) whose similarities SRCL weighs by.", (ITC, *SIMILARITIES), ("same",)
    ),
    "negatives": contrast_study(
        "negatives",
        "Study (e) what SRCL does to the weights of negatives.",
        (ITC, Objective("srcl", 1.0), Objective("srcl", 4.0)),
        ("same",),
    ),
    "objectives": contrast_study(
        "objectives", "Study (f) SRCL against ITC and a loss on cosines.", (ITC, Objective("srcl", 1.0), COSINE)
    ),
    "resolution": resolution,
    "alignment": alignment,
    "scratch": scratch,
    "merging": merging,
}
"""(a) to (j), by name."""
FROM_STAGE_1 = ("delta", "similarity", "negatives", "objectives", "alignment")
"""Those that start from a base before its selection alignment, of which none is committed."""
