"""The leaderboard as a page, made from the figures in `leaderboard.json` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.show import markdown

from .study import BASELINE, NEAR

FIGURES = Path(__file__).with_name("leaderboard.json")
PAGE = Path(__file__).parents[2] / "docs" / "leaderboard.md"

HEAD = """\
# Methods side by side

<!-- made from benchmarks/methods/leaderboard.json by `python -m benchmarks.methods --page` -->

Every method spends the FLOPs that the paper's two selections (TRIPS) spend at keep rates 0.7, 0.5, 0.3 and 0.15: its
own knob is set so that the FLOPs of the vision tower, counted with relevance, merging and all, are within 1 % of
them; a cell that is further away says where it is. Where several texts guide one selection, they are counted as one
list for 8 images. Accuracy in %, ± one standard error over questions; in brackets the difference to {baseline} on the
same questions, ± its standard error. **Bold**: the best of a column, and what is behind it by less than one standard
error of its own difference to {baseline}. Nothing was trained for a method: models are frozen. They are the small
ones of [benchmarks/accuracy/](../benchmarks/accuracy/), on scenes whose contents are known: they say which way things
go, not what your model will lose. With their width of 64, a text costs far more beside a patch than in a ViT-B.

```bash
./run accuracy methods                       # all tables, hours on one core; --task, --method and --count ask less
python -m benchmarks.methods --method mine   # yours: one file in benchmarks/methods/ways/
```

A method is one file: what ranks patches (`patchselect.Relevance`), what becomes of the others
(`patchselect.Reduction`) or both, from outside of the package. Copy one of
[benchmarks/methods/ways/](../benchmarks/methods/ways/). The tests make this page anew from the file of figures, and ask
a part of the questions again.
"""


def page(report: dict[str, Any]) -> str:
    """Return the page of a file of figures."""
    parts = [HEAD.format(baseline=BASELINE)]
    parts += [table(task) for task in report["tasks"].values()]
    if "time" in report:
        parts.append(times(report["time"]))
    sources = {name: row["source"] for task in report["tasks"].values() for name, row in task["methods"].items()}
    parts.append("## Sources\n\n" + markdown([["method", "source"], *([n, s] for n, s in sources.items())]))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def table(task: dict[str, Any]) -> str:
    """Return one task as a section."""
    rates = list(task["flops"])
    best = {rate: _leaders(task["methods"], rate) for rate in rates}
    rows = [["method", *(f"keep {rate} ({task['flops'][rate]:.0%} of the FLOPs)" for rate in rates)]]
    for name in ("text alone", "no reduction"):
        label = f"{name}, no image" if name == "text alone" else f"{name}, all FLOPs"
        rows.append([label, *[_plain(task[name])] * len(rates)])
    ranked = sorted(task["methods"].items(), key=lambda row: -sum(row[1][rate]["accuracy"][0] for rate in rates))
    rows += [[name, *(_cell(row[rate], name in best[rate]) for rate in rates)] for name, row in ranked]
    made = f"`{task['command']}`: {task['questions']}, commit {task['commit']}, torch {task['torch']}"
    return f"## {task['title']}\n\n{task['about']}. {made}.\n\n{markdown(rows)}\n"


def _leaders(methods: dict[str, Any], rate: str) -> set[str]:
    top = max(row[rate]["accuracy"][0] for row in methods.values())
    return {
        name for name, row in methods.items() if row[rate]["accuracy"][0] >= top - row[rate].get("ahead", (0, 0))[1]
    }


def _plain(value: list[float]) -> str:
    return f"{value[0]:.1f} ± {value[1]:.1f}"


def _cell(cell: dict[str, Any], bold: bool) -> str:
    text = f"{cell['accuracy'][0]:.1f}"
    text = f"**{text}**" if bold else text
    if "ahead" in cell:
        text += f" ({cell['ahead'][0]:+.1f} ± {cell['ahead'][1]:.1f})"
    return text if abs(cell["flops"] - 1) <= NEAR else f"{text}, {cell['flops']:.3f} of them"


def times(time: dict[str, Any]) -> str:
    """Return the measured times as a section."""
    rates = list(time["flops"])
    rows = [["method", *(f"keep {rate} (FLOPs {time['flops'][rate]:.2f})" for rate in rates)]]
    for name, row in time["methods"].items():
        cells = (row[rate] for rate in rates)
        rows.append([name, *(f"{c['median']:.2f} [{c['q1']:.2f}, {c['q3']:.2f}]" for c in cells)])
    return f"## Time\n\n{time['about']}\n\n{markdown(rows)}\n"


def read() -> dict[str, Any]:
    """Return the committed figures."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
