"""Tables of the pages, made from committed results: `python -m benchmarks.pages` writes them anew.

A page says what it wants in a comment that a browser does not show, and what stands between this and the next is made:

    <!-- figures: NAME benchmarks/results/MACHINE/FILE.json -->
    <!-- end of figures -->

NAME is one of `TABLES`. A test compares every page with its files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import FOLDER, read
from benchmarks.common.show import markdown, speed_up, threads
from benchmarks.speed import steadiness as runs
from benchmarks.speed import tables

ROOT = FOLDER.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md")
BLOCK = re.compile(r"(<!-- figures: (\S+) (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
DEVICES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs (`python -m benchmarks.everything --device cuda` makes one)"}


def origin(report: dict[str, Any]) -> str:
    """Say where figures come from."""
    about, settings = report["machine"], report["settings"]
    clock = "CPU time" if settings.get("clock") == "cpu" else "wall clock"
    return (
        f"{about['processor']}, {threads(about['threads'])}, {clock}, torch {report['versions']['torch']}, "
        f"commit {report['commit']}, {report['created'][:10]}"
    )


def of(report: dict[str, Any], batch: int, **wanted: Any) -> list[dict[str, Any]]:
    """Return the records of one batch without the unpatched, highest keep rate first."""
    wanted = {"batch": batch, **wanted}
    found = [r for r in report["results"] if all(r[name] == value for name, value in wanted.items())]
    return sorted(
        (r for r in found if r["method"] != "unpatched"), key=lambda r: (r["method"] != "text", -r["keep_rate"])
    )


def measured(report: dict[str, Any]) -> list[int]:
    """List the batches that there was time for, in the order in which they were asked for."""
    return list(dict.fromkeys(r["batch"] for r in report["results"]))


def speed(report: dict[str, Any]) -> str:
    """Write what the default run of the speed benchmark found."""
    parts = []
    for batch in measured(report):
        rows = [["", "keep rate", "FLOP ratio (the limit)", "speed-up, median [quartiles]", "time spent selecting"]]
        for r in of(report, batch):
            share = r["selecting_share"]
            selecting = "–" if share is None else f"{100 * share['median']:.1f} %"
            rows.append([r["label"], f"{r['keep_rate']:g}", f"{r['flop_ratio']:.3f}", speed_up(r, 3), selecting])
        parts.append(f"Batch {batch}, {of(report, batch)[0]['rounds']} rounds:\n\n{markdown(rows)}")
    return "\n\n".join([*parts, f"{report['model']['name']}, {origin(report)}."])


def short(report: dict[str, Any]) -> str:
    """Write text guidance at the first batch, and a sentence on the others."""
    first, *others = measured(report)
    rows = [["keep rate", "FLOP ratio (the limit)", "speed-up, median [quartiles]"]]
    texts = of(report, first, method="text")
    rows += [[f"{r['keep_rate']:g}", f"{r['flop_ratio']:.2f}", speed_up(r)] for r in texts]
    sentences = [
        f"At batch {batch}: {', '.join(speed_up(r) for r in of(report, batch, method='text'))}." for batch in others
    ]
    about = f"{report['model']['name']}, batch {first}, text guidance; {origin(report)}."
    return "\n\n".join([markdown(rows), " ".join([about, *sentences])])


def again(report: dict[str, Any]) -> str:
    """Compare a text that guides for the first time, one that has guided before, and chance."""
    names = {"text": "text, its first image", "again": "text, from its second image on", "random": "random"}
    rows = [["guidance", "keep rate", "speed-up, median [quartiles]", "efficiency", "time spent selecting"]]
    for r in of(report, 1):
        share = f"{100 * r['selecting_share']['median']:.1f} %"
        rows.append([names[r["method"]], f"{r['keep_rate']:g}", speed_up(r, 3), f"{r['efficiency']:.3f}", share])
    return f"{markdown(rows)}\n\n{report['model']['name']}, batch 1, {origin(report)}."


def precision(report: dict[str, Any]) -> str:
    """Write speed-ups in several precisions; `compile` is in the settings."""
    rows = [["both sides", "keep rate", "batch", "speed-up, median [quartiles]", "FLOP ratio"]]
    done = "compiled, " if report["settings"]["compile"] else ""
    for batch in measured(report):
        rows += [
            [f"{done}{r['precision']}", f"{r['keep_rate']:g}", str(batch), speed_up(r, 3), f"{r['flop_ratio']:.3f}"]
            for r in of(report, batch, method="text")
        ]
    return f"{markdown(rows)}\n\n{report['model']['name']}, {origin(report)}."


def scale(report: dict[str, Any]) -> str:
    """Write the curves as a table."""
    rows = [["over", "", "FLOP ratio (the limit)", "speed-up, median [quartiles]", "seconds"]]
    for r in report["results"]:
        rows.append(
            [r["over"], str(r["value"]), f"{r['flop_ratio']:.3f}", speed_up(r), f"{r['seconds']['median']:.3f}"]
        )
    return f"{markdown(rows)}\n\nViT-B/16, keep rate {report['settings']['keep_rate']:g}, {origin(report)}."


def estimators(report: dict[str, Any]) -> str:
    """Write how far runs of each estimate scatter."""
    settings, rates = report["settings"], list(report["results"][0]["speed_up"])
    rows = [["threads", "clock", "estimate", "scatter", "worst", *(f"keep {rate}" for rate in rates)]]
    for r in report["results"]:
        found = [f"{r['speed_up'][rate]:.2f}" for rate in rates]
        rows.append([str(r["threads"]), r["clock"], r["estimate"], f"{r['typical']:.1%}", f"{r['worst']:.1%}", *found])
    about = f"{settings['runs']} runs of {settings['rounds']} rounds, batch {settings['batch']}, one-minute load"
    return (
        f"{markdown(rows)}\n\n{about} {report['machine']['load_before']:.1f} when it began; "
        f"{report['machine']['processor']}, commit {report['commit']}, {report['created'][:10]}."
    )


def steadiness(report: dict[str, Any]) -> str:
    """Write what runs of the speed benchmark found, one after the other."""
    rows = [list(runs.COLUMNS), *map(runs.cells, report["results"])]
    estimates = [list(runs.COLUMNS_OF_ESTIMATES), *map(runs.cells_of_estimate, report["estimates"])]
    about = f"{runs.about(report)}; {report['machine']['processor']}, commit {report['commit']}, "
    return (
        f"{markdown(rows)}\n\nBy these and other estimates of the same times, settled or not:\n\n"
        f"{markdown(estimates)}\n\n{about}{report['created'][:10]}."
    )


def machines(folder: Path) -> str:
    """List all machines that there are results of, and the kinds that there are none of."""
    rows = [["machine", "device", "torch", "commit", "text, keep 0.7 / 0.5 / 0.3", "file"]]
    seen = set()
    for path in sorted(folder.glob("*/speed.json")):
        report = read(path)
        seen.add(report["machine"]["device"])
        shown = " / ".join(speed_up(r) for r in of(report, measured(report)[0], method="text"))
        about = [report["machine"]["processor"], report["machine"]["device"], report["versions"]["torch"]]
        rows.append([*about, report["commit"], shown, f"`{path.relative_to(folder.parent.parent)}`"])
    missing = [f"There is no file for {about}." for device, about in DEVICES.items() if device not in seen]
    return "\n\n".join([markdown(rows), *missing])


TABLES: dict[str, Callable[[Any], str]] = {
    "speed": speed, "short": short, "again": again, "precision": precision, "scale": scale, "estimators": estimators,
    "steadiness": steadiness,
    **tables.TABLES,
}  # fmt: skip


PICTURES = {
    "speed": "speed-up against keep rate, with the limit that FLOPs set",
    "scale": "speed-up over each of the four",
}
"""What is seen on the picture beside a file; for pages in docs/."""


def filled(page: str, root: Path = ROOT) -> str:
    """Return a page with its figures made anew.

    Raises:
        ValueError: no table of that name.
    """

    def made(found: re.Match[str]) -> str:
        head, name, source, end = found.groups()
        path = root / source
        if name not in (*TABLES, "machines"):
            raise ValueError(f"figures: {name} {source}: there is no such table")
        if name == "machines":
            text = machines(path)
        elif path.exists():
            report = read(path)
            text = TABLES[name](report)
            if name in tables.TABLES:
                text += f"\n\n{origin(report)}."
            if name in PICTURES and path.with_suffix(".png").exists():
                text += f"\n\n![{PICTURES[name]}](../{Path(source).with_suffix('.png')})"
        else:
            text = f"Not measured yet: `python -m benchmarks.everything --only {path.stem}` writes `{source}`."
        return f"{head}\n{text}\n\n{end}"

    return BLOCK.sub(made, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all pages anew."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}: figures made anew\n")


if __name__ == "__main__":
    main()
